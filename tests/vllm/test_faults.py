"""Tiers that hang, lie, raise or cannot start, and reset, sleep and exit while they do."""

import pytest
from vllm_engine import TIERS_OF_TESTS, Engine, prompt


def engine_with(model, tmp_path, kind, **keys):
    tier = {"type": kind, "module_path": "hanging_tier"}
    return Engine(
        model,
        tmp_path / "log",
        kvtier={"secondary_tiers": [tier], "load_deadline": 1.0, "drain_timeout": 1.0, "tier_deadline": 2.0} | keys,
        environment=TIERS_OF_TESTS,
    )


def test_a_tier_that_never_brings_what_it_has_costs_at_most_the_deadline(model, baseline, tmp_path):
    baseline(prompt(200, 700), prompt(201, 700))
    with engine_with(model, tmp_path, "HangingTier") as engine:
        engine.wait_until_started()
        for seed in (200, 201):
            assert engine.generate(prompt(seed, 700)) == baseline(prompt(seed, 700))
        assert engine.metrics().get("kvtier_requests_gave_up.deadline", 0) >= 1
        engine.reset()
        assert engine.generate(prompt(200, 700)) == baseline(prompt(200, 700))
        assert engine.metrics()["kvtier_hit_blocks.primary"] == 5
        assert engine.reset(reset_connector=True)
        assert engine.generate(prompt(200, 700)) == baseline(prompt(200, 700))


@pytest.mark.parametrize("kind", ["SilentTier", "RaisingTier"])
def test_a_tier_that_is_of_no_use_harms_nobody(model, baseline, tmp_path, kind):
    with engine_with(model, tmp_path, kind) as engine:
        assert engine.generate(prompt(210, 700)) == baseline(prompt(210, 700))
        engine.reset()
        before = engine.external_hits()
        assert engine.generate(prompt(210, 700)) == baseline(prompt(210, 700))
        assert engine.external_hits() - before == 5 * 128
        assert not [name for name in engine.metrics() if name.startswith("kvtier_errors")]


def test_a_disk_without_room_leaves_the_engine_running(model, baseline, tmp_path):
    tier = {"type": "disk", "path": str(tmp_path / "disk"), "capacity": "64MiB", "min_free": "1000TiB"}
    with Engine(model, tmp_path / "log", kvtier={"secondary_tiers": [tier]}) as engine:
        assert engine.generate(prompt(220, 700)) == baseline(prompt(220, 700))
        engine.reset()
        assert engine.generate(prompt(220, 700)) == baseline(prompt(220, 700))
        assert engine.external_hits() == 5 * 128


def test_a_directory_in_use_leaves_the_second_engine_running(model, baseline, tmp_path):
    keys = {"secondary_tiers": [{"type": "disk", "path": str(tmp_path / "disk"), "capacity": "64MiB"}]}
    with (
        Engine(model, tmp_path / "log-1", kvtier=keys) as first,
        Engine(model, tmp_path / "log-2", kvtier=keys) as second,
    ):
        first.wait_until_started()
        for engine in (first, second):
            assert engine.generate(prompt(230, 700)) == baseline(prompt(230, 700))
            engine.reset()
            assert engine.generate(prompt(230, 700)) == baseline(prompt(230, 700))
            assert engine.external_hits() >= 5 * 128


def test_a_wrong_configuration_is_said_in_one_line(model, tmp_path):
    engine = Engine(model, tmp_path / "log", kvtier={"load_dedline": 1})
    with pytest.raises(RuntimeError, match='load_dedline=1: unknown key, did you mean "load_deadline"'):
        engine.wait_until_started()
    engine.kill()
