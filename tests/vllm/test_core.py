"""What the core makes of what its workers say."""

import logging

import pytest

from kvtier.adapters.vllm.core import CoreHalf, warn_of_random_seed
from kvtier.adapters.vllm.handover import Announcement
from kvtier.adapters.vllm.identity import digest_files
from kvtier.adapters.vllm.metrics import StatsReporter
from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.errors import ConfigError
from kvtier.events import TierState
from kvtier.spec.tiering import TieringOffloadingSpec

IDENTITY = {"weights": "w", "hash": "sha256", "rank": 0}


def first_spec(tmp_path, world_size=1, **keys):
    tiers = [
        {"type": "disk", "path": str(tmp_path / "disk"), "capacity": "1MiB"},
        {"type": "memory", "capacity": "1MiB"},
    ]
    extra = {"cpu_bytes_to_use": "64KiB", "secondary_tiers": tiers} | keys
    return TieringOffloadingSpec(OffloadingConfig(extra, (KVCacheGroup(16),), 4096 * world_size, world_size=world_size))


def identified(spec, *announcements):
    core = CoreHalf(spec)
    try:
        made = core._identified(announcements)
        namespace = made.tier_context.namespace
        states = made.get_manager().tier_states()
        on = [name for name, (state, _) in states.items() if state is not TierState.DOWN]
        return on, namespace.fingerprint if namespace else None
    finally:
        made.get_manager().shutdown()
        core.shutdown()


def says(rank=0, identity=IDENTITY, lora=False, problem=""):
    return Announcement(rank, 16, 4096, identity, lora, problem)


def test_tiers_open_under_the_workers_identity(tmp_path):
    names, namespace = identified(first_spec(tmp_path), says())
    assert names == ["disk", "memory"]
    assert namespace != identified(first_spec(tmp_path), says(identity=IDENTITY | {"weights": "other"}))[1]
    assert namespace == identified(first_spec(tmp_path), says(identity=dict(reversed(IDENTITY.items()))))[1]


def test_every_ranks_identity_counts(tmp_path):
    both = [says(0), says(1, IDENTITY | {"rank": 1})]
    _, namespace = identified(first_spec(tmp_path, 2), *both)
    _, other = identified(first_spec(tmp_path, 2), both[0], says(1, IDENTITY | {"rank": 1, "weights": "other"}))
    assert namespace not in (other, identified(first_spec(tmp_path), says())[1])


@pytest.fixture
def log(caplog):
    loggers = [logging.getLogger("vllm"), logging.getLogger("kvtier")]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.propagate = True
    yield caplog
    for logger, propagates in zip(loggers, before, strict=True):
        logger.propagate = propagates


def test_without_an_identity_nothing_outlives_the_engine(tmp_path, log):
    names, namespace = identified(first_spec(tmp_path), says(identity=None, problem="no files of weights in /nowhere"))
    assert (names, namespace) == (["memory"], None)
    assert "kvtier: tier disk cannot be used" in log.text
    assert "no files of weights in /nowhere" in log.text


def test_what_breaks_while_the_workers_attach_costs_one_tier_only(tmp_path, log, monkeypatch):
    monkeypatch.setenv("KVTIER_TEST_SECRET", "long enough to be one")
    guarded = {"type": "disk", "path": str(tmp_path / "disk"), "capacity": "1MiB", "secret_env": "KVTIER_TEST_SECRET"}
    spec = first_spec(tmp_path, secondary_tiers=[guarded, {"type": "memory", "capacity": "1MiB"}])
    monkeypatch.delenv("KVTIER_TEST_SECRET")
    core = CoreHalf(spec)
    try:
        core._open([says()])
        states = core.manager.tier_states()
        assert states["disk"][0] is TierState.DOWN
        assert "secret_env" in states["disk"][1]
        assert states["memory"][0] is not TierState.DOWN
        reported = StatsReporter().report(core.manager.get_stats())
        assert "vllm:kvtier_tier_up" in str(vars(reported))
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
    assert identified(first_spec(tmp_path), says(lora=True))[0] == ["memory"]
    assert "set allow_lora" in log.text
    assert identified(first_spec(tmp_path, allow_lora=True), says(lora=True))[0] == ["disk", "memory"]


def test_a_random_seed_is_said_if_blocks_shall_outlive_the_engine(tmp_path, log, monkeypatch):
    spec = first_spec(tmp_path)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    warn_of_random_seed(spec, "xxhash")
    assert "PYTHONHASHSEED" not in log.text
    monkeypatch.delenv("PYTHONHASHSEED")
    warn_of_random_seed(spec, "xxhash")
    assert "Set PYTHONHASHSEED to any fixed number" in log.text


def test_files_are_told_apart_by_name_size_head_and_pages(tmp_path):
    file = tmp_path / "model.safetensors"
    raw = bytearray(3 << 20)
    file.write_bytes(raw)
    digests = {digest_files([file])}
    for position in (0, (1 << 20) + 5, len(raw) - 1):
        changed = bytearray(raw)
        changed[position] = 1
        file.write_bytes(changed)
        digests.add(digest_files([file]))
    file.write_bytes(raw[:-1])
    digests.add(digest_files([file]))
    renamed = file.rename(tmp_path / "other.safetensors")
    renamed.write_bytes(raw)
    assert len(digests | {digest_files([renamed])}) == 6
