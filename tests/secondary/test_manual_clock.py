"""Tiers over the inline executor: every step is the test's, on a clock that stands still."""

from types import SimpleNamespace

import pytest
from fault_rigs import QUICK, Recorder, faulty_tier, make_rig

from kvtier.abc import TierContext
from kvtier.errors import ConfigError
from kvtier.events import BlocksEvicted, BlocksFailed, TierState
from kvtier.eviction.lru import LRUPolicy
from kvtier.namespace import Namespace
from kvtier.secondary.disk import DiskTierManager
from kvtier.secondary.memory_tier import MemoryTierManager
from kvtier.testing.clock import ManualClock
from kvtier.testing.stores import make_key
from kvtier.types import FailureCause, LookupResult


@pytest.fixture
def rig():
    clock, recorder = ManualClock(), Recorder()
    rig = make_rig(clock=clock, observer=recorder, inline_io=True)
    rig.clock, rig.recorder = clock, recorder
    yield rig
    rig.close()


def disk(rig, tmp_path, **options):
    tier = DiskTierManager(rig.spec, rig.arena.view, "disk", path=str(tmp_path / "d"), **options)
    rig.attach(tier)
    return tier


def test_a_constructor_has_no_side_effects(rig, tmp_path):
    tier = disk(rig, tmp_path, capacity="1MiB")
    assert not (tmp_path / "d").exists()
    assert tier.state is TierState.STARTING
    tier.start()
    assert tier.state is TierState.UP


@pytest.mark.parametrize("first_call", ["lookup", "submit", "can_store"])
def test_a_tier_that_nobody_started_starts_at_its_first_use(rig, tmp_path, first_call):
    tier = disk(rig, tmp_path, capacity="1MiB")
    if first_call == "lookup":
        tier.lookup(make_key(1), rig.request)
    elif first_call == "submit":
        assert rig.store([1]).success
    else:
        assert tier.can_store(1)
    assert tier.state is TierState.UP


def test_the_policy_chooses_who_goes_and_it_is_said(rig, tmp_path):
    tier = disk(rig, tmp_path, capacity="128KiB")
    tier.start()
    capacity = int(tier.get_stats()["capacity_blocks"])
    assert 8 <= capacity <= 16
    rig.store(range(capacity))
    tier.touch([make_key(number) for number in range(2)], rig.request)
    rig.store([100, 101])
    assert [rig.lookup(number) for number in (0, 1, 100, 101)] == [LookupResult.HIT] * 4
    (evicted,) = rig.recorder.of(BlocksEvicted)
    assert len(evicted.keys) == 2
    assert all(tier.lookup(key, rig.request) is LookupResult.MISS for key in evicted.keys)
    assert tier.get_stats()["blocks"] == capacity
    events = list(tier.take_events())
    assert [event.removed for event in events] == [False, True, False]
    assert list(tier.take_events()) == []
    left = {make_key(number) for number in (*range(capacity), 100, 101)} - set(evicted.keys)
    tier.start_epoch(b"other weights")
    (gone,) = tier.take_events()
    assert (gone.removed, set(gone.keys)) == (True, left)


def test_more_blocks_than_slots_store_the_head(rig, tmp_path):
    tier = disk(rig, tmp_path, capacity="128KiB")
    tier.start()
    capacity = int(tier.get_stats()["capacity_blocks"])
    result = rig.store(range(capacity + 5))
    assert not result.success
    assert set(result.successful_keys) == {make_key(number) for number in range(capacity)}
    assert {event.cause for event in rig.recorder.of(BlocksFailed)} == {FailureCause.NO_SPACE}


def test_blocks_in_use_are_not_evicted(rig, tmp_path):
    tier = disk(rig, tmp_path, capacity="128KiB")
    tier.start()
    capacity = int(tier.get_stats()["capacity_blocks"])
    rig.store(range(capacity))
    load = rig.submit([make_key(number) for number in range(capacity)], range(30, 30 + capacity), load=True)
    store = rig.submit([make_key(200)], [0], load=False)
    assert rig.finish(load).success
    assert not rig.finish(store).success
    assert rig.store([200]).success


def test_results_have_their_numbers_and_failed_blocks_are_said_once(rig, tmp_path):
    disk(rig, tmp_path, capacity="1MiB").start()
    stored = rig.finish(rig.submit([make_key(number) for number in (1, 2, 3)], [0, 1, 2], load=False))
    loaded = rig.finish(rig.submit([make_key(1), make_key(9)], [3, 4], load=True))
    assert (stored.success, stored.successful_keys, stored.transfer_bytes) == (True, None, 3 * 8192)
    assert (loaded.success, set(loaded.successful_keys), loaded.transfer_bytes) == (False, {make_key(1)}, 8192)
    assert [(event.cause, event.num_blocks) for event in rig.recorder.of(BlocksFailed)] == [(FailureCause.ABSENT, 1)]


def test_a_key_of_another_length_fails_its_job_and_nothing_else(rig, tmp_path):
    disk(rig, tmp_path, capacity="1MiB").start()
    rig.store([1])
    for bad in (b"short", b"", "text", None):
        assert not rig.finish(rig.submit([make_key(2), bad], [0, 1], load=False)).success
        assert not rig.finish(rig.submit([bad], [0], load=True)).success
    assert not rig.finish(rig.submit([make_key(2)], [64], load=False)).success
    assert not rig.finish(rig.submit([make_key(2)], [-1], load=False)).success
    assert not rig.finish(rig.submit([make_key(2)], [1, 2], load=False)).success
    assert rig.load([1])[1] == [1]
    rig.assert_each_job_answered_once()


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_the_same_key_twice_in_one_job(rig, tmp_path, kind):
    if kind == "disk":
        disk(rig, tmp_path, capacity="1MiB").start()
    else:
        faulty_tier(rig).start()
    assert rig.store([1, 2, 1]).success
    assert rig.load([1, 1, 2])[1] == [1, 1, 2]
    rig.tier.check_invariants()


def test_a_network_that_fails_and_comes_back(rig, tmp_path):
    bad = tmp_path / "bad"
    bad.touch()
    tier = faulty_tier(rig, {"fault": "raise", "while_path": str(bad)})
    tier.start()
    for number in range(3):
        rig.load([number])
    assert tier.state is TierState.DOWN
    assert tier.lookup(make_key(1), rig.request) is LookupResult.MISS
    assert not tier.can_store(1)
    bad.unlink()
    rig.clock.advance(QUICK.first_backoff)
    rig.poll()
    assert tier.state is TierState.UP
    assert rig.store([1]).success
    assert rig.recorder.states() == ["up", "down", "up"]


def test_probes_that_fail_open_the_breaker_too(rig, tmp_path):
    bad = tmp_path / "bad"
    bad.touch()
    tier = faulty_tier(rig, {"fault": "raise", "calls": ["contains"], "while_path": str(bad)})
    tier.start()
    for number in range(3):
        assert rig.lookup(number) is LookupResult.MISS
    assert tier.state is TierState.DOWN


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"capacity": "lots"}, "capacity"),
        ({"capacity": 0}, "capacity"),
        ({"capacity": 100}, "capacity"),
        ({"capacity": True}, "capacity"),
        ({"capacity": "1MiB", "eviction_policy": "fifo"}, "eviction_policy"),
        ({"capacity": "1MiB", "threads": 0}, "threads"),
        ({"capacity": "1MiB", "threads": "4"}, "threads"),
        ({"capacity": "1MiB", "job_deadline": 0}, "job_deadline"),
        ({"capacity": "1MiB", "min_free": -1}, "min_free"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_it(rig, tmp_path, options, key):
    with pytest.raises(ConfigError) as caught:
        disk(rig, tmp_path, **options)
    assert caught.value.key == key


def test_an_unknown_policy_is_answered_with_those_that_exist(rig, tmp_path):
    with pytest.raises(ConfigError, match="arc, auto, lru"):
        disk(rig, tmp_path, capacity="1MiB", eviction_policy="fifo")


def test_a_policy_of_the_engines_own(tmp_path):
    rig = make_rig(inline_io=True, policies={"mine": LRUPolicy})
    disk(rig, tmp_path, capacity="1MiB", eviction_policy="mine").start()
    assert rig.store([1]).success
    rig.close()


def test_a_disk_without_a_namespace_is_refused_and_memory_is_not(rig, tmp_path):
    nobody = SimpleNamespace(tier_context=TierContext())
    with pytest.raises(ConfigError) as caught:
        DiskTierManager(nobody, rig.arena.view, "disk", path=str(tmp_path), capacity="1MiB")
    assert caught.value.key == "namespace"
    with pytest.raises(ConfigError, match="one block of 8192"):
        MemoryTierManager(object(), rig.arena.view, "memory", capacity=8192)  # header and key take room, too
    rig.attach(MemoryTierManager(object(), rig.arena.view, "memory", capacity="1MiB"))
    rig.tier.start()
    rig.wait_up()
    assert rig.store([1]).success
    assert Namespace() != Namespace({"a": 1})
