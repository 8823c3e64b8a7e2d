"""What the core makes of what its workers say."""

from dataclasses import replace

import pytest

from kvtier.adapters.vllm.core import CoreHalf, warn_of_random_seed
from kvtier.adapters.vllm.handover import Announcement, Weights
from kvtier.adapters.vllm.metrics import StatsReporter
from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.errors import ConfigError
from kvtier.events import TierState
from kvtier.spec.tiering import TieringOffloadingSpec
from kvtier.tiering.manager import TieringOffloadingManager

LAYOUT = {"layout": "l", "hash": "sha256", "rank": 0}
WEIGHTS = Weights({"weights": "w"})


def first_spec(tmp_path, world_size=1, **keys):
    tiers = [
        {"type": "disk", "path": str(tmp_path / "disk"), "capacity": "1MiB"},
        {"type": "memory", "capacity": "1MiB"},
    ]
    extra = {"cpu_bytes_to_use": "64KiB", "secondary_tiers": tiers} | keys
    return TieringOffloadingSpec(OffloadingConfig(extra, (KVCacheGroup(16),), 4096 * world_size, world_size=world_size))


def opened(spec, *announcements, weights=WEIGHTS):
    """Return the states of the tiers, and the namespace, of a core that all workers have told everything."""
    core = CoreHalf(spec)
    try:
        core._open(list(announcements))
        core._identify(weights)
        states = core._spec.wait_for_tiers(60)
        namespace = core._spec.tier_context.namespace
        return {name: state.value for name, state in states.items()}, namespace.fingerprint if namespace else None
    finally:
        core.shutdown()


def says(rank=0, identity=LAYOUT, lora=False, problem=""):
    return Announcement(rank, 16, 4096, identity, lora, problem)


@pytest.mark.parametrize(("given", "expected"), [({}, 40.0), ({"prefill_rate": 7.0}, 7.0)], ids=["guessed", "given"])
def test_the_slowest_workers_guess_is_the_engines_until_it_is_measured(tmp_path, given, expected):
    core = CoreHalf(first_spec(tmp_path, 2, **given))
    try:
        core._open([replace(says(0), prefill_rate=50.0), replace(says(1), prefill_rate=40.0)])
        assert core.manager.prefill_rate == expected
    finally:
        core.shutdown()


BOTH_UP, DISK_DOWN = {"disk": "up", "memory": "up"}, {"disk": "down", "memory": "up"}


def test_tiers_open_under_the_workers_identity(tmp_path):
    states, namespace = opened(first_spec(tmp_path), says())
    assert states == BOTH_UP
    assert namespace != opened(first_spec(tmp_path), says(identity=LAYOUT | {"layout": "other"}))[1]
    assert namespace != opened(first_spec(tmp_path), says(), weights=Weights({"weights": "other"}))[1]
    assert namespace == opened(first_spec(tmp_path), says(identity=dict(reversed(LAYOUT.items()))))[1]


def test_every_ranks_identity_counts(tmp_path):
    both = [says(0), says(1, LAYOUT | {"rank": 1})]
    _, namespace = opened(first_spec(tmp_path, 2), *both)
    _, other = opened(first_spec(tmp_path, 2), both[0], says(1, LAYOUT | {"rank": 1, "layout": "other"}))
    assert namespace not in (other, opened(first_spec(tmp_path), says())[1])


@pytest.mark.parametrize(
    ("said", "weights"),
    [
        (says(identity=None, problem="of unknown shape"), WEIGHTS),
        (says(), Weights(None, "of unknown shape")),
    ],
    ids=["a worker's layout", "the weights"],
)
def test_without_an_identity_nothing_outlives_the_engine(tmp_path, log, said, weights):
    states, namespace = opened(first_spec(tmp_path), said, weights=weights)
    assert (states, namespace) == (DISK_DOWN, None)
    assert log.text.count("of unknown shape") == 1
    assert "kvtier: tier disk cannot be used" in log.text


def test_what_breaks_while_the_workers_attach_costs_one_tier_only(tmp_path, log, monkeypatch):
    monkeypatch.setenv("KVTIER_TEST_SECRET", "long enough to be one")
    guarded = {"type": "disk", "path": str(tmp_path / "disk"), "capacity": "1MiB", "secret_env": "KVTIER_TEST_SECRET"}
    spec = first_spec(tmp_path, secondary_tiers=[guarded, {"type": "memory", "capacity": "1MiB"}])
    monkeypatch.delenv("KVTIER_TEST_SECRET")
    core = CoreHalf(spec)
    try:
        core._open([says()])
        core._identify(WEIGHTS)
        states = core.manager.tier_states()
        assert states["disk"][0] is TierState.DOWN
        assert "secret_env" in states["disk"][1]
        assert states["memory"][0] is not TierState.DOWN
        reported = StatsReporter().report(core.manager.get_stats())
        assert reported.data["data"]["vllm:kvtier_tier_up"][("disk",)] == 0
        assert reported.data["data"]["vllm:kvtier_tier_times_down"][("disk",)] == 1
    finally:
        core.shutdown()
    assert "kvtier: tier disk cannot be used" in log.text
    assert "kvtier is off" not in log.text


def test_a_tier_that_cannot_work_stops_the_engines_start(tmp_path, monkeypatch):
    monkeypatch.delenv("KVTIER_TEST_SECRET", raising=False)
    guarded = {"type": "disk", "path": str(tmp_path / "disk"), "capacity": "1MiB", "secret_env": "KVTIER_TEST_SECRET"}
    with pytest.raises(ConfigError, match="secret_env"):
        first_spec(tmp_path, secondary_tiers=[guarded])


def test_adapters_names_are_not_trusted_unless_asked(tmp_path, log):
    assert opened(first_spec(tmp_path), says(lora=True))[0] == DISK_DOWN
    assert "set allow_lora" in log.text
    assert opened(first_spec(tmp_path, allow_lora=True), says(lora=True))[0] == BOTH_UP


def test_host_memory_serves_while_the_weights_are_read(tmp_path, log):
    core = CoreHalf(first_spec(tmp_path))
    try:
        core._open([says()])
        assert core.manager.tier_states()["disk"][0] is TierState.STARTING
        core._identify(WEIGHTS)
        core._spec.wait_for_tiers(60)
        assert core.manager.tier_states()["disk"][0] is TierState.UP
    finally:
        core.shutdown()
    core._identify(WEIGHTS)  # after the end nothing opens


def test_a_random_seed_is_said_if_blocks_shall_outlive_the_engine(tmp_path, log):
    spec = first_spec(tmp_path)
    warn_of_random_seed(spec, False)
    assert "PYTHONHASHSEED" not in log.text
    warn_of_random_seed(spec, True)
    assert "Set PYTHONHASHSEED to any fixed number" in log.text


def test_the_log_says_once_what_there_is_and_warns_if_a_tier_is_down(tmp_path, log):
    (tmp_path / "file").write_text("no directory")
    down = {"type": "disk", "path": str(tmp_path / "file"), "capacity": "1MiB"}
    core = CoreHalf(first_spec(tmp_path, secondary_tiers=[down, {"type": "memory", "capacity": "1MiB"}]))
    assert core.off_reason == "starting"
    core._is_late = True
    try:
        core._open([says()])
        core._identify(WEIGHTS)
        assert core.off_reason is None
        core._spec.wait_for_tiers(60)
        log.records.clear()
        core._say_ready()
    finally:
        core.shutdown()
    (said,) = [record for record in log.records if "is ready" in record.getMessage()]
    assert said.levelname == "WARNING"
    assert said.getMessage() == (
        "kvtier is ready: blocks of 16 tokens; 64.0 KiB of host memory for 16 blocks; tier disk is down; "
        "tier memory is up, 1.0 MiB"
    )


def test_workers_that_attach_late_are_said(tmp_path, log):
    core = CoreHalf(first_spec(tmp_path, secondary_tiers=[]))
    try:
        core.start(0.01)
        assert core.off_reason == "starting"
        assert "kvtier starts later" in log.text
        core._open([says()])
        assert core.off_reason is None
        assert log.text.count("kvtier is ready") == 1
    finally:
        core.shutdown()


@pytest.mark.parametrize("is_late", [True, False], ids=["late workers", "workers in time"])
def test_a_fault_in_what_the_log_is_told_does_not_stop_the_engine(tmp_path, log, monkeypatch, is_late):
    def raise_fault(self):
        raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(TieringOffloadingManager, "get_stats", raise_fault)
    core = CoreHalf(first_spec(tmp_path, secondary_tiers=[]))
    try:
        if is_late:
            core.start(0.01)
        core._open([says()])
        if not is_late:
            core.start(60)
        assert core.manager is not None
        assert core.off_reason is None
        assert log.text.count("cannot tell the state of its tiers") == 1
    finally:
        core.shutdown()


def test_an_engine_id_that_another_engine_uses_is_a_reason(tmp_path, log):
    first, second = (CoreHalf(first_spec(tmp_path, secondary_tiers=[])) for _ in range(2))
    try:
        first.start(0.01)
        second.start(0.01)
        assert second.off_reason == "engine_id"
        assert "kvtier is off: another engine of this machine has the id" in log.text
    finally:
        second.shutdown()
        first.shutdown()
