"""Block hashes that start from a random seed: kvtier says that the next process will not find this one's blocks."""

from types import SimpleNamespace

import pytest
from vllm_engine import Engine, prompt

from kvtier.adapters.vllm import compat, core

SAID = "Set PYTHONHASHSEED to any fixed number"


@pytest.mark.parametrize(
    ("reproducible", "algorithm", "seed", "said"),
    [
        (False, "sha256", None, True),
        (False, "sha256", "0", False),
        (True, "sha256", None, False),
        (True, "xxhash", None, True),
        (True, "xxhash_cbor", "0", False),
    ],
)
def test_the_log_says_so_where_it_is_so(monkeypatch, log, reproducible, algorithm, seed, said):
    if seed is None:
        monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    else:
        monkeypatch.setenv("PYTHONHASHSEED", seed)
    is_random = compat.hash_seed_is_random(algorithm, reproducible)
    core.warn_of_random_seed(SimpleNamespace(persistent_tiers=[]), is_random)
    assert SAID not in log.text
    core.warn_of_random_seed(SimpleNamespace(persistent_tiers=["disk"]), is_random)
    assert (SAID in log.text) == said


def test_an_engine_without_a_seed_says_so_and_serves(model, baseline, tmp_path):
    if compat.HAS_REPRODUCIBLE_SEED:
        pytest.skip("NO RANDOM SEED IN THIS VERSION OF VLLM: run this with VLLM=0.28.0")
    keys = {"secondary_tiers": [{"type": "disk", "path": str(tmp_path / "disk"), "capacity": "64MiB"}]}
    asked = prompt(1300, 700)
    with Engine(model, tmp_path / "log", kvtier=keys, environment={"PYTHONHASHSEED": None}) as engine:
        assert engine.generate(asked) == baseline(asked)
        engine.reset()
        assert engine.generate(asked) == baseline(asked)
        assert engine.external_hits() == 5 * 128
        assert SAID in engine.log()
