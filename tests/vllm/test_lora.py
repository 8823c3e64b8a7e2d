"""LoRA adapters: block hashes carry their names, not their contents."""

import shutil
from types import SimpleNamespace

import pytest
from vllm_engine import Engine, prompt, wait_until_up, written

from kvtier.testing.patience import wait_for

TOKENS = 5 * 128
PROMPT = prompt(500, 700)
LORA = {"enable_lora": True, "max_lora_rank": 8}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Return the folders of two adapters."""
    from vllm_models import save_adapter

    folder = tmp_path_factory.mktemp("adapters")
    return [save_adapter(folder / name, seed) for seed, name in enumerate(("first", "second"), 1)]


def named(folder):
    return ["assistant", 1, str(folder), True]


@pytest.fixture(scope="module")
def expected(model, adapters, tmp_path_factory):
    """Return what vLLM without kvtier answers: without an adapter, and with each of the two."""
    with Engine(model, tmp_path_factory.mktemp("plain") / "log", enable_prefix_caching=False, **LORA) as engine:
        answers = [engine.generate(PROMPT, adapter=adapter) for adapter in (None, *map(named, adapters))]
    assert len({tuple(answer[0]) for answer in answers}) == 3
    return answers


def over(directory, **keys):
    return {"secondary_tiers": [{"type": "disk", "path": str(directory), "capacity": "64MiB"}]} | keys


def hits_of(engine, folder):
    """Return (answer under the adapter in `folder`, tokens that came from kvtier)."""
    before = engine.external_hits()
    return engine.generate(PROMPT, adapter=named(folder)), engine.external_hits() - before


def hashes_carry_paths():
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.kv_cache_utils import _gen_lora_extra_hash_keys

    asked = [SimpleNamespace(lora_request=LoRARequest("assistant", 1, path)) for path in ("/a", "/b")]
    return _gen_lora_extra_hash_keys(asked[0]) != _gen_lora_extra_hash_keys(asked[1])


def test_adapters_are_served_from_host_memory_and_never_from_what_outlives_the_engine(
    model, adapters, expected, tmp_path
):
    plain, with_first, with_second = expected
    folder = shutil.copytree(adapters[0], tmp_path / "adapter")
    with Engine(model, tmp_path / "log", kvtier=over(tmp_path / "disk"), **LORA) as engine:
        assert engine.generate(PROMPT) == plain
        assert hits_of(engine, folder) == (with_first, 0)
        engine.reset()
        assert hits_of(engine, folder) == (with_first, TOKENS)
        assert "tier disk cannot be used, and the engine runs without it: with LoRA, block hashes carry" in engine.log()
        assert "set allow_lora to trust them" in engine.log()
        metrics = engine.metrics()
        assert metrics["kvtier_tier_up.disk"] == 0
        moved = [
            name for name in metrics if "disk" in name and any(word in name for word in ("hit", "read", "written"))
        ]
        assert not any(metrics[name] for name in moved)  # that it refused blocks is counted, and right
        assert not list(tmp_path.glob("disk/**/data-*"))
        # Another folder under the same name: vLLM's hashes say so, or the engine must be told to forget.
        if not hashes_carry_paths():
            engine.reset(reset_connector=True)
        assert hits_of(engine, adapters[1]) == (with_second, 0)
        # The same name and the same folder with other contents: vLLM's own cache is told to forget, and so is kvtier.
        shutil.copytree(adapters[1], folder, dirs_exist_ok=True)
        assert engine.reset(reset_connector=True)
        assert hits_of(engine, folder) == (with_second, 0)
        engine.reset()
        assert hits_of(engine, folder) == (with_second, TOKENS)
        assert engine.generate(PROMPT) == plain


def test_names_are_trusted_across_engines_if_the_user_says_so(model, adapters, expected, tmp_path):
    keys = over(tmp_path / "disk", allow_lora=True)
    with Engine(model, tmp_path / "log-1", kvtier=keys, **LORA) as engine:
        wait_until_up(engine)
        assert engine.generate(PROMPT) == expected[0]
        assert hits_of(engine, adapters[0]) == (expected[1], 0)
        wait_for(lambda: written(engine) == 10, what="writing 10 blocks")
    with Engine(model, tmp_path / "log-2", kvtier=keys, **LORA) as engine:
        wait_until_up(engine)
        assert hits_of(engine, adapters[0]) == (expected[1], TOKENS)
        assert engine.generate(PROMPT) == expected[0]
        assert engine.external_hits() == 2 * TOKENS
        assert engine.metrics()["kvtier_hit_blocks.disk"] == 10
