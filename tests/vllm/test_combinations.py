"""Kinds of models and options of vLLM: each row of docs/vllm.md's table that no other test starts."""

import pytest
from combinations import COMBINATIONS
from vllm_engine import Engine, prompt, transfer_config
from vllm_models import MAMBA_CONFIG, MLA_CHANGES, llama_config, save_config, save_llama

STARTED_HERE = [row for row in COMBINATIONS if row.model]


def make_model(folder, name):
    if name == "mistral":
        window = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 256}
        return save_llama(folder / name, **window)
    configs = {
        "llama": llama_config(),
        "draft": llama_config(num_hidden_layers=1),
        "mla": llama_config(**MLA_CHANGES),
        "mamba": MAMBA_CONFIG,
    }
    return save_config(folder / name, configs[name])


@pytest.mark.parametrize("row", STARTED_HERE, ids=lambda row: row.name)
def test_a_prompt_that_comes_again_is_found_or_the_log_says_why_not(row, model, tmp_path):
    options = dict(row.options)
    folder = make_model(tmp_path, row.model) if row.model != "llama" else model
    if options.get("speculative_config", {}).get("model") == "draft":
        options["speculative_config"] = {**options["speculative_config"], "model": str(make_model(tmp_path, "draft"))}
    options["kv_transfer_config"] = transfer_config(cpu_bytes_to_use="64MiB") | {"kv_role": row.role}
    asked = prompt(60, 700)
    with Engine(folder, tmp_path / "log", **options) as engine:
        first = engine.generate(asked)
        engine.reset()
        assert engine.generate(asked) == first
        assert (engine.external_hits() > 0) is row.finds
        assert (row.says in engine.log()) if row.says else ("kvtier will find nothing" not in engine.log())
