"""DESIGN: reset with its epoch, quarantine under unfinished copies, bounded shutdown."""

import threading

import pytest
from engine import make_keys, payload

from kvtier.events import CacheReset, TierState, UnexpectedCall
from kvtier.testing.patience import TEST_SECONDS, wait_for
from kvtier.tiering.settings import ResetPolicy
from kvtier.types import LookupResult

HIT, MISS, PENDING = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING


def hang(tier, method):
    """Make a method of the tier never come back; return the event that lets it."""
    release = threading.Event()
    setattr(tier, method, lambda: release.wait(2 * TEST_SECONDS))
    return release


def test_a_reset_forgets_everything_and_starts_an_epoch(make_engine):
    engine, keys = make_engine(num_tiers=2), make_keys(3)
    context = engine.request()
    engine.store(keys, context)
    engine.step()
    engine.manager.reset_cache()
    engine.step()
    assert engine.scan(keys, context) == [MISS]
    assert engine.table.num_free == engine.table.num_slots
    (event,) = engine.log.of(CacheReset)
    assert len(event.epoch) == 16
    assert engine.tiers[0].epochs == engine.tiers[1].epochs == [event.epoch]
    engine.manager.reset_cache()
    assert engine.log.of(CacheReset)[1].epoch != event.epoch


def test_a_reset_may_keep_what_tiers_hold(make_engine):
    engine, keys = make_engine(on_reset=ResetPolicy.KEEP), make_keys(3)
    engine.store(keys, engine.request("a"))
    engine.step()
    engine.manager.reset_cache()
    assert not engine.tier.epochs
    assert engine.wait_hits(keys, engine.request("b")) == 3


def test_jobs_in_flight_are_drained_before_the_primary_is_forgotten(make_engine):
    engine, keys = make_engine(), make_keys(3)
    engine.tier.auto = False
    context = engine.request("a")
    engine.store(keys, context)
    engine.plant(make_keys(2, "tier"))
    engine.scan(make_keys(2, "tier"), engine.request("b"))
    engine.step()
    engine.manager.reset_cache()
    engine.manager.check_invariants()
    assert not engine.tier.waiting
    assert engine.table.num_free == engine.table.num_slots


def test_requests_go_on_after_a_reset(make_engine):
    engine, keys = make_engine(), make_keys(3)
    engine.plant(keys)
    context = engine.request()
    engine.scan(keys, context)
    engine.step()
    engine.manager.reset_cache()
    engine.step()
    assert engine.scan(keys, context) == [MISS]
    assert engine.store(keys, context, version=1) == keys
    assert engine.load(keys, context) == [payload(key, 1) for key in keys]


def test_slots_under_a_device_copy_stay_quarantined_until_the_worker_published_its_end(make_engine):
    engine, keys = make_engine(num_blocks=6, num_tiers=0), make_keys(2, "loaded")
    storer, loader = engine.request("storer"), engine.request("loader")
    engine.store(keys, loader)
    load = engine.manager.prepare_load(keys, loader)
    store = engine.manager.prepare_store(make_keys(2, "stored"), storer)
    engine.manager.reset_cache()
    engine.step()
    assert engine.table.num_quarantined == 4
    later = engine.manager.prepare_store(make_keys(6, "later"), storer)
    assert len(later.keys_to_store) == 2
    assert set(later.store_spec.block_ids.tolist()).isdisjoint({*load.block_ids.tolist(), *store.store_spec.block_ids})
    engine.arena.control.publish(0, load.sequence)
    engine.step()
    assert engine.table.num_quarantined == 4  # not all transfers from before the reset have ended
    engine.arena.control.publish(0, store.store_spec.sequence)
    engine.step()
    assert engine.table.num_quarantined == 0
    engine.manager.complete_store(set(later.keys_to_store), storer)
    assert engine.hits(later.keys_to_store, storer) == 2


def test_only_transfers_that_reach_a_worker_are_numbered(make_engine):
    engine, keys = make_engine(num_tiers=0), make_keys(2)
    context = engine.request()
    assert engine.manager.prepare_store(keys, context).store_spec.sequence == 1
    assert engine.manager.prepare_store(keys, context).store_spec.sequence == 0  # nothing left to store
    engine.manager.complete_store(set(keys), context)
    assert engine.manager.prepare_load([], context).sequence == 0
    assert engine.manager.prepare_load(keys, context).sequence == 2


def test_a_late_completion_ends_the_old_copy_and_not_a_newer_one_of_the_same_key(make_engine):
    engine, keys = make_engine(num_tiers=0), make_keys(2)
    context = engine.request()
    engine.manager.prepare_store(keys, context)
    engine.manager.reset_cache()
    engine.manager.prepare_store(keys, context)
    engine.manager.complete_store(set(keys), context)  # of the copy from before the reset
    engine.step()
    assert engine.table.num_quarantined == 0
    assert engine.scan(keys, context) == [PENDING, PENDING]
    engine.manager.complete_store(set(keys), context)
    assert engine.scan(keys, context) == [HIT, HIT]
    assert not engine.log.of(UnexpectedCall)


def test_an_engine_that_completes_no_old_copies_ends_the_newer_ones(make_engine):
    engine, keys = make_engine(num_tiers=0), make_keys(2)
    context, other = engine.request(), engine.request("other")
    engine.store(keys, other)
    old = engine.manager.prepare_load(keys, context)
    engine.manager.reset_cache(late_completions=False)
    assert engine.store(keys, context) == keys
    assert engine.load(keys, context) == [payload(key) for key in keys]
    assert engine.table.num_quarantined == 2  # the old load goes on
    engine.arena.control.publish(0, old.sequence)
    engine.finish(context)
    engine.step()
    assert engine.table.num_free == engine.table.num_slots - 2
    assert not engine.table.pins
    assert not engine.log.of(UnexpectedCall)


def test_late_completions_of_loads_release_their_slots(make_engine):
    engine, keys = make_engine(num_tiers=0), make_keys(3)
    context = engine.request()
    engine.store(keys, context)
    engine.manager.prepare_load(keys, context)
    engine.manager.prepare_load(keys[:1], context)
    engine.manager.reset_cache()
    assert engine.table.num_quarantined == 3
    engine.manager.complete_load(keys, context)
    engine.step()
    assert engine.table.num_quarantined == 1
    engine.manager.complete_load(keys[:1], context)
    engine.step()
    assert engine.table.num_quarantined == 0


def test_loads_of_a_key_before_and_after_a_reset_hold_their_slots_until_both_have_ended(make_engine):
    engine, keys = make_engine(num_tiers=0), make_keys(2)
    context = engine.request()
    engine.store(keys, context)
    engine.manager.prepare_load(keys, context)
    engine.manager.reset_cache()
    assert engine.store(keys, context) == keys
    engine.manager.prepare_load(keys, context)
    engine.manager.complete_load(keys, context)  # of one of the two
    engine.step()
    assert engine.table.num_quarantined == 2
    assert len(engine.table.pins) == 4
    engine.manager.complete_load(keys, context)
    engine.step()
    assert engine.table.num_quarantined == 0
    assert not engine.table.pins
    assert not engine.log.of(UnexpectedCall)


def test_a_reset_waits_for_a_hung_tier_no_longer_than_its_deadline(make_engine):
    engine, keys = make_engine(num_tiers=2, drain_timeout=0.2), make_keys(3)
    engine.tiers[0].auto = False
    context = engine.request()
    engine.store(keys, context)
    (job,) = engine.tiers[0].waiting
    release = hang(engine.tiers[0], "drain_jobs")
    engine.manager.reset_cache()
    engine.step()
    assert engine.table.num_quarantined == 3  # the tier may still read them
    assert engine.tiers[1].epochs
    assert not engine.tiers[0].epochs
    engine.clock.advance(100)
    engine.step()
    assert engine.manager.tier_states()["tier0"][0] is TierState.DOWN
    assert engine.scan(keys, engine.request("b")) == [MISS]
    release.set()
    engine.tiers[0].finish(job)
    wait_for(lambda: (engine.step(), engine.tiers[0].epochs)[1])
    assert engine.table.num_quarantined == 0
    assert not engine.tiers[0].blocks  # its epoch began before it was used again
    for _ in range(3):
        engine.clock.advance(100)
        engine.step()
    assert engine.manager.tier_states()["tier0"][0] is TierState.UP


def test_shutdown_is_bounded_and_idempotent_with_jobs_in_flight(make_engine):
    engine, keys = make_engine(num_tiers=2, drain_timeout=0.2), make_keys(3)
    engine.tiers[0].auto = False
    engine.store(keys, engine.request())
    release = hang(engine.tiers[0], "shutdown")
    engine.manager.shutdown()
    engine.manager.shutdown()
    release.set()


@pytest.mark.parametrize("during", ["waiting", "leased", "storing", "loading", "finished"])
def test_a_reset_at_any_moment_of_a_request_leaks_nothing(make_engine, during):
    engine, keys = make_engine(), make_keys(3)
    context = engine.request()
    if during == "waiting":
        engine.plant(keys)
        engine.tier.auto = False
        engine.scan(keys, context)
        engine.step()
    elif during == "leased":
        engine.plant(keys)
        engine.wait_hits(keys, context)
    elif during == "storing":
        engine.manager.prepare_store(keys, context)
    else:
        engine.store(keys, context)
        engine.manager.prepare_load(keys, context)
        if during == "finished":
            engine.finish(context)
    engine.manager.reset_cache()
    engine.manager.complete_store(keys, context)
    engine.manager.complete_load(keys, context)
    engine.finish(context)
    engine.step()
    assert engine.table.num_free == engine.table.num_slots
    assert len(engine.manager._requests) == 0


def test_a_tier_that_hangs_in_its_drain_is_not_called_on_the_engines_thread(make_engine):
    engine = make_engine(drain_timeout=0.1)
    release = hang(engine.tier, "drain_jobs")
    engine.manager.reset_cache()
    called = []
    for method in ("on_new_request", "on_request_finished", "on_schedule_end", "get_stats", "take_events", "touch"):
        setattr(engine.tier, method, lambda *args, method=method: called.append(method))
    context = engine.request()
    engine.store(make_keys(2), context)
    engine.load(make_keys(2), context)
    engine.finish(context)
    engine.step()
    engine.manager.get_stats()
    engine.manager.take_events()
    assert called == []  # it might hold a lock that its drain holds, too
    release.set()


def test_calls_after_the_shutdown_reach_no_tier(make_engine):
    engine, keys = make_engine(), make_keys(2)
    engine.tier.auto = False
    context = engine.request()
    engine.store(keys, context)
    engine.manager.prepare_store(make_keys(2, "late"), context)
    engine.manager.shutdown()
    engine.step()
    engine.manager.complete_store(make_keys(2, "late"), context)
    engine.manager.reset_cache()
    engine.step()
    assert len(engine.tier.stores) == 1


@pytest.mark.parametrize("copy", ["store", "load"])
def test_a_copy_that_workers_ended_takes_no_completion_from_a_newer_one(make_engine, copy):
    engine, keys = make_engine(num_tiers=0), make_keys(2)
    context, other = engine.request(), engine.request("other")
    if copy == "load":
        engine.store(keys, other)
        old = engine.manager.prepare_load(keys, context)
    else:
        old = engine.manager.prepare_store(keys, context).store_spec
    engine.manager.reset_cache()
    if copy == "load":
        engine.store(keys, other)
        engine.manager.prepare_load(keys, context)
    else:
        engine.manager.prepare_store(keys, context)
    engine.arena.control.publish(0, old.sequence + 1)
    (engine.manager.complete_load if copy == "load" else engine.manager.complete_store)(set(keys), context)
    assert engine.hits(keys, other) == 2
    engine.finish(context)
    engine.finish(other)
    assert len(engine.manager._requests) == 0


def test_a_tier_whose_drain_leaves_jobs_unanswered_is_not_used_before_its_epoch(make_engine):
    engine, keys = make_engine(tier_deadline=1000.0), make_keys(3)
    engine.tier.auto = False
    engine.tier.drain_jobs = lambda: None
    engine.plant(keys)
    engine.store(make_keys(2, "cascaded"), engine.request("a"))
    engine.manager.reset_cache()
    for _ in range(5):
        engine.clock.advance(50)
        engine.step()
        assert engine.scan(keys, engine.request("b")) == [MISS]  # bytes of the former weights
    engine.tier.finish(engine.tier.waiting[0])
    engine.step()
    assert len(engine.tier.epochs) == 1
    assert engine.table.num_quarantined == 0


def test_a_flush_that_the_engine_reports_ends_the_quarantine_of_its_reset(make_engine):
    engine, keys = make_engine(num_blocks=6, num_tiers=0), make_keys(2, "loaded")
    storer, loader = engine.request("storer"), engine.request("loader")
    engine.store(keys, loader)
    engine.manager.prepare_load(keys, loader)
    engine.manager.prepare_load(keys[:1], loader)
    engine.manager.prepare_store(make_keys(2, "stored"), storer)
    engine.manager.reset_cache()
    later = engine.manager.prepare_store(make_keys(1, "later"), storer)
    assert engine.table.num_quarantined == 4
    engine.manager.on_reset_flushed()
    assert engine.table.num_quarantined == 0
    engine.manager.check_invariants()
    assert len(engine.manager.prepare_store(make_keys(5, "more"), storer).keys_to_store) == 5
    engine.manager.complete_store(set(later.keys_to_store), storer)
    assert engine.hits(later.keys_to_store, storer) == 1, "a copy from after the reset has not ended by the flush"
