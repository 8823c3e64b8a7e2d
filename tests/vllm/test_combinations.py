"""Kinds of models and options of vLLM: each row of docs/vllm.md's table that no other test starts."""

import pytest
from combinations import COMBINATIONS
from vllm_engine import Engine, prompt, transfer_config
from vllm_models import (
    MAMBA_CONFIG,
    MLA_CHANGES,
    SOUND,
    llama_config,
    save_audio_model,
    save_config,
    save_llama,
    save_whisper,
)

SERVED = [row for row in COMBINATIONS if row.model and not row.stops]
STOPPED = [row for row in COMBINATIONS if row.stops]


def make_model(folder, name):
    if name == "mistral":
        window = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 256}
        return save_llama(folder / name, **window)
    if name in ("audio", "whisper"):
        return {"audio": save_audio_model, "whisper": save_whisper}[name](folder / name)
    configs = {
        "llama": llama_config(),
        "draft": llama_config(num_hidden_layers=1),
        "mla": llama_config(**MLA_CHANGES),
        "mamba": MAMBA_CONFIG,
    }
    return save_config(folder / name, configs[name])


def start(row, model, tmp_path, connector=None):
    """Start an engine with the row's model and options; without kvtier, if vLLM stops without it, too."""
    options = dict(row.options)
    folder = make_model(tmp_path, row.model) if row.model != "llama" else model
    if options.get("speculative_config", {}).get("model") == "draft":
        options["speculative_config"] = {**options["speculative_config"], "model": str(make_model(tmp_path, "draft"))}
    if "pipeline_parallel_size" in options:
        options |= {"processes": True, "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}}
    if not row.alone:
        options["kv_transfer_config"] = transfer_config(connector, cpu_bytes_to_use="64MiB") | {"kv_role": row.role}
    return Engine(folder, tmp_path / "log", **options)


def check(row, engine):
    """Check that a prompt that comes again is found, or that the log says why not."""
    asked, media = prompt(60, 700), {}
    if row.model == "audio":
        asked = [*(min(token, 508) for token in asked[:100]), *SOUND, *(min(token, 508) for token in asked[100:])]
        media = {"audio": 1}
    first = engine.generate(asked, **media)
    engine.reset()
    assert engine.generate(asked, **media) == first
    hits = engine.external_hits()
    assert (hits > 0) is row.finds
    assert (row.says in engine.log()) if row.says else ("kvtier will find nothing" not in engine.log())
    if media:
        engine.reset()
        engine.generate(asked, audio=2)
        assert engine.external_hits() == hits, "another sound is another prompt"


@pytest.mark.parametrize("row", SERVED, ids=lambda row: row.name)
def test_a_prompt_that_comes_again_is_found_or_the_log_says_why_not(row, model, tmp_path):
    with start(row, model, tmp_path) as engine:
        try:
            check(row, engine)
        except RuntimeError:
            if row.lacks and row.lacks in engine.log():
                pytest.skip(f"THIS VLLM CANNOT RUN {row.name} ON CPUS: use another version ({row.lacks})")
            raise


def test_kvtiers_connector_says_in_a_line_that_it_does_not_serve_encoders(model, tmp_path):
    (row,) = (row for row in STOPPED if row.model == "whisper")
    engine = start(row, model, tmp_path, "kvtier")
    try:
        with pytest.raises(RuntimeError):
            engine.generate(prompt(60, 300))
        assert row.stops[0] in engine.log() or "one without an encoder: vLLM cannot offload" in engine.log()
    finally:
        engine.kill()


@pytest.mark.parametrize("row", STOPPED, ids=lambda row: row.name)
def test_where_vllm_stops_it_says_why(row, model, tmp_path):
    engine = start(row, model, tmp_path)
    try:
        engine.generate(prompt(60, 300))
    except RuntimeError:
        assert any(said in engine.log() for said in row.stops)
    else:
        pytest.skip(f"THIS VLLM SERVES {row.name} HERE: docs/vllm.md says that it could not be tested")
    finally:
        engine.kill()
