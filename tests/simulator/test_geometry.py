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


BASE = {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 512, "torch_dtype": "float16"}
FALCON = {"num_hidden_layers": 32, "num_attention_heads": 71, "hidden_size": 4544, "multi_query": True}


@pytest.mark.parametrize(
    ("config", "kind", "kv_heads"),
    [
        (FALCON, "MQA", 1),
        (FALCON | {"num_kv_heads": 71}, "MQA", 1),
        (BASE | {"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 2}, "GQA", 2),
        (BASE | {"multi_query": True, "new_decoder_architecture": True, "n_head_kv": 4}, "GQA", 4),
        (BASE | {"multi_query": False}, "MHA", 8),
        (BASE | {"multi_query_attention": True, "multi_query_group_num": 2}, "GQA", 2),
        (BASE | {"multi_query_attention": False, "multi_query_group_num": 2}, "MHA", 8),
        (BASE | {"num_key_value_heads": None}, "MHA", 8),
        (BASE | {"layer_types": ["full_attention", "sliding_attention", "chunked_attention"]}, "MHA", 8),
        (BASE | {"num_kv_heads": 1}, "MQA", 1),
    ],
)
def test_heads_by_every_name(config, kind, kv_heads):
    geometry = geometry_of("m", config)
    assert geometry.kind == kind
    assert geometry.layer_elements == 2 * kv_heads * 64
    assert geometry.num_layers == config["num_hidden_layers"]


def test_a_model_by_the_names_of_chatglm():
    config = {"num_layers": 28, "num_attention_heads": 32, "kv_channels": 128, "hidden_size": 4096}
    config |= {"multi_query_attention": True, "multi_query_group_num": 2, "torch_dtype": "float16"}
    assert geometry_of("m", config).token_bytes == 28 * 1024


@pytest.mark.parametrize(
    "more",
    [
        {"full_attention_interval": 4},
        {"attn_layer_period": 8},
        {"layer_types": ["full_attention", "linear_attention"]},
        {"layer_types": ["conv", "full_attention"]},
        {"layers_block_type": ["mamba", "hybrid"]},
        {"hybrid_override_pattern": "M-M*-"},
        {"mamba_d_state": 128},
        {"ssm_cfg": {"layer": "Mamba2"}},
    ],
)
def test_refuses_layers_without_a_cache_a_token(more):
    with pytest.raises(ConfigError, match="a state instead of a cache a token are not understood") as caught:
        geometry_of("m", {"text_config": BASE | more})
    assert caught.value.key in more


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"num_hidden_layers": "32"}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": -8}, "num_attention_heads"),
        ({"num_attention_heads": 7}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_attention_heads"),
        ({"num_key_value_heads": 16}, "num_attention_heads"),
        ({"num_key_value_heads": -1}, "num_key_value_heads"),
        ({"num_key_value_heads": [8]}, "num_key_value_heads"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"head_dim": 64.5}, "head_dim"),
        ({"head_dim": 0}, "head_dim"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 4}, "hidden_size"),
        ({"kv_lora_rank": "512"}, "kv_lora_rank"),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": -64}, "qk_rope_head_dim"),
        ({"layer_types": 5}, "layer_types"),
        ({"layer_types": [{}]}, "layer_types"),
        ({"torch_dtype": {"a": 1}}, "kv_dtype"),
    ],
)
def test_refuses_what_no_model_can_have(more, key):
    with pytest.raises(ConfigError) as caught:
        geometry_of("m", BASE | more)
    assert caught.value.key == key
