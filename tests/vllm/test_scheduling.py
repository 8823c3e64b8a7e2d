"""What vLLM's scheduler does to requests while their blocks are on the way: preemption, and aborts."""

import pytest
from vllm_engine import TIERS_OF_TESTS, Engine, prompt

from kvtier.testing.patience import wait_for

BLOCK = 128
LONG = [prompt(seed, 5 * BLOCK) for seed in (700, 701, 702, 703)]
TOKENS = 260


def test_preempted_requests_end_as_if_they_had_not_been(model, tmp_path):
    with Engine(model, tmp_path / "plain", enable_prefix_caching=False) as engine:
        expected = [engine.generate(asked, max_tokens=TOKENS)[0] for asked in LONG]
    keys = {"secondary_tiers": [{"type": "disk", "path": str(tmp_path / "disk"), "capacity": "64MiB"}]}
    few = {"num_gpu_blocks_override": 16, "max_model_len": 1024}
    with Engine(model, tmp_path / "log", kvtier=keys | {"cpu_bytes_to_use": "2MiB"}, **few) as engine:
        preemptions = [0]
        for _ in range(3):  # computed, then from host memory and from the disk
            assert engine.generate(*LONG, max_tokens=TOKENS) == expected
            preemptions.append(engine.metrics()["num_preemptions"])
            engine.reset()
        assert 0 < preemptions[1] < preemptions[-1]
        metrics = engine.metrics()
        assert metrics["kvtier_hit_blocks.primary"] > 0
        assert metrics["kvtier_hit_blocks.disk"] > 0
        assert not [name for name in metrics if name.startswith(("kvtier_errors", "kvtier_unexpected"))]


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    """Return the file that keeps the tier from answering while it is there."""
    return tmp_path_factory.mktemp("gate") / "closed"


@pytest.fixture(scope="module")
def engine(model, gate, tmp_path_factory):
    """Return an engine whose host memory holds 8 blocks, over a tier that answers when the gate is open."""
    keys = {
        "secondary_tiers": [{"type": "GatedTier", "module_path": "gated_tier", "name": "gated"}],
        "cpu_bytes_to_use": 8 * 2 * 2 * BLOCK * 64 * 4,
        "load_deadline": 60.0,
    }
    environment = TIERS_OF_TESTS | {"KVTIER_TEST_GATE": str(gate)}
    log = tmp_path_factory.mktemp("gated") / "log"
    with Engine(model, log, kvtier=keys, environment=environment, num_gpu_blocks_override=24) as engine:
        yield engine


def jobs(engine):
    """Return how many jobs the tier has not answered, after a step."""
    engine.generate(prompt(1, 20))
    return engine.metrics()["kvtier_jobs.gated"]


def nothing_is_left(engine):
    wait_for(lambda: jobs(engine) == 0, what="answers to all jobs")
    metrics = engine.metrics()
    assert metrics["kvtier_quarantined_blocks.primary"] == 0
    assert metrics["num_requests_waiting"] == metrics["num_requests_running"] == 0
    assert not [name for name in metrics if name.startswith(("kvtier_errors", "kvtier_unexpected"))]


def test_a_request_aborted_while_its_blocks_are_stored(engine, baseline, gate):
    asked = prompt(720, 5 * BLOCK + 20)
    gate.touch()
    name = engine.ask("begin", prompt=asked, max_tokens=64, steps=4)
    assert engine.metrics()["kvtier_jobs.gated"] >= 1
    assert engine.ask("end", name=name, abort=True)
    assert jobs(engine) >= 1
    gate.unlink()
    nothing_is_left(engine)
    engine.reset()
    before = engine.external_hits()
    assert engine.generate(asked) == baseline(asked)
    assert engine.external_hits() - before == 5 * BLOCK


def test_a_request_aborted_while_it_waits_for_its_blocks(engine, baseline, gate):
    asked, others = prompt(730, 5 * BLOCK + 20), [prompt(seed, 5 * BLOCK + 20) for seed in (731, 732)]
    for one in (asked, *others):  # the others leave no room for the first one's blocks in host memory
        assert engine.generate(one) == baseline(one)
        nothing_is_left(engine)
    engine.reset()
    read = engine.metrics().get("kvtier_read_blocks.gated", 0)
    gate.touch()
    name = engine.ask("begin", prompt=asked, steps=5)
    assert engine.metrics()["kvtier_jobs.gated"] == 1
    assert engine.ask("end", name=name, abort=True) == []
    assert jobs(engine) == 1
    assert engine.generate(prompt(733, 100)) == baseline(prompt(733, 100))
    gate.unlink()
    nothing_is_left(engine)
    before = engine.external_hits()

    def is_loaded():
        # A closed gate or a busy machine may have shown the tier as slower than computing. Then kvtier computes the
        # prompt, and measures the tier anew beside it.
        assert engine.generate(asked) == baseline(asked)
        if engine.metrics()["kvtier_read_blocks.gated"] >= read + 5:
            return True
        for one in others:  # as above: out of host memory
            engine.generate(one)
            nothing_is_left(engine)
        engine.reset()
        return False

    wait_for(is_loaded, what="loading from the tier")
    assert engine.external_hits() - before >= 5 * BLOCK
