"""Engines that start and serve while their weights are still being read."""

import pytest
from vllm_engine import Engine, prompt, written

from kvtier.testing.patience import wait_for
from kvtier.weights.file_digests import DigestMemory

pytestmark = pytest.mark.timeout(900)

PROMPT = prompt(1500, 700)
TOKENS = 5 * 128


@pytest.fixture
def own_model(tmp_path):
    from vllm_models import save_llama

    return save_llama(tmp_path / "model")


@pytest.fixture
def claim(own_model, tmp_path):
    """Hold the claim on the model's weights, as another engine does that is reading them."""
    memory = DigestMemory(tmp_path / "cache" / "kvtier" / "weights")
    entry = memory.open_entry((own_model / "model.safetensors").stat())
    assert entry.try_to_lock()
    yield entry
    memory.close()


@pytest.fixture
def engine(own_model, claim, tmp_path):
    keys = {"secondary_tiers": [{"type": "disk", "path": str(tmp_path / "disk"), "capacity": "64MiB"}]}
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with Engine(own_model, tmp_path / "log", kvtier=keys, environment=environment) as engine:
        yield engine


def serves_from_host_memory(engine):
    before, first = engine.external_hits(), engine.generate(PROMPT)
    engine.reset()
    assert engine.generate(PROMPT) == first
    return engine.external_hits() - before >= TOKENS


def test_host_memory_serves_at_once_and_the_disk_opens_later(engine, claim):
    assert serves_from_host_memory(engine)
    assert "['disk'] open when the weights have been read" in engine.log()
    assert written(engine) == 0
    claim.close()
    seeds = iter(range(1510, 2000))
    wait_for(lambda: engine.generate(prompt(next(seeds), 140)) and written(engine) > 0, "a store on disk")
    assert engine.log().count("kvtier knows the weights: ") == 1


def test_weights_deleted_during_hashing_turn_off_only_the_disk(engine, claim, own_model):
    assert serves_from_host_memory(engine)
    (own_model / "model.safetensors").unlink()
    claim.close()
    wait_for(lambda: "tier disk cannot be used" in engine.log(), "a line in the log")
    assert serves_from_host_memory(engine)
    assert written(engine) == 0
    assert engine.log().count("tier disk cannot be used") == 1
