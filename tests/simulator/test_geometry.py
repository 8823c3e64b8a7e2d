"""Bytes a token, against what is published."""

import json

import pytest

from kvtier.errors import ConfigError
from kvtier.simulator.geometry import find_geometry, geometry_of


@pytest.mark.parametrize(
    ("model", "kind", "kib"),
    [
        ("meta-llama/Llama-3.1-8B", "GQA", 128),
        ("Qwen/Qwen3-32B", "GQA", 256),
        ("deepseek-ai/DeepSeek-V3", "MLA", 68.625),
        ("HuggingFaceTB/SmolLM2-135M", "GQA", 22.5),
        ("llama-3.1-70b", "GQA", 320),
    ],
)
def test_known_models(model, kind, kib):
    geometry = find_geometry(model)
    assert (geometry.kind, geometry.token_bytes / 1024) == (kind, kib)


def test_configs_as_their_makers_wrote_them(tmp_path):
    llama2 = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096, "torch_dtype": "float16"}
    assert (geometry_of("m", llama2).kind, geometry_of("m", llama2).token_bytes) == ("MHA", 512 * 1024)
    gqa = llama2 | {"num_key_value_heads": 8, "dtype": "bfloat16"}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"text_config": gqa}))
    assert find_geometry(str(folder)).token_bytes == 128 * 1024
    assert find_geometry(str(folder / "config.json"), "fp8").token_bytes == 64 * 1024
    mla = {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 128}
    assert geometry_of("m", mla).token_bytes == 61 * 576 * 2


@pytest.mark.parametrize(
    ("model", "dtype", "complaint"),
    [("no-such-model", "auto", "one of meta-llama"), ("Qwen3-8B", "int3", "kv_dtype='int3'")],
)
def test_refuses_what_it_cannot_size(model, dtype, complaint):
    with pytest.raises(ConfigError, match=complaint):
        find_geometry(model, dtype)


def test_refuses_a_config_without_sizes(tmp_path):
    path = tmp_path / "config.json"
    for text, complaint in (("{}", "num_hidden_layers"), ("[]", "JSON object"), ("{", "no readable")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=complaint):
            find_geometry(str(path))
