"""Loads to the device that fail: host memory forgets the blocks, and the request may ask once more."""

import pytest
from engine import make_keys, payload

from kvtier.errors import BlockNotReadyError
from kvtier.events import LoadFailed, UnexpectedCall
from kvtier.types import LookupResult, Medium

HIT, PENDING, MISS = LookupResult.HIT, LookupResult.HIT_PENDING, LookupResult.MISS


def fail(engine, keys, context):
    engine.manager.prepare_load(keys, context)
    engine.manager.complete_load(set(keys), context, success=False)


def test_what_could_not_be_loaded_is_found_no_more(make_engine):
    engine, keys = make_engine(num_tiers=0), make_keys(4)
    context = engine.request()
    engine.store(keys, context)
    assert engine.scan(keys, context) == [HIT] * 4
    fail(engine, keys[1:3], context)
    engine.step()
    assert [engine.manager.lookup(key, context) for key in keys] == [HIT, MISS, MISS, HIT]
    assert engine.table.num_free == engine.table.num_slots - 2
    assert engine.manager.get_stats()["failed_loads"] == 1
    assert engine.store(keys, context) == keys[1:3]


def test_a_tier_below_brings_it_once_more(make_engine):
    engine, keys = make_engine(), make_keys(3)
    engine.plant(keys)
    context = engine.request()
    assert engine.wait_hits(keys, context) == 3
    fail(engine, keys, context)
    assert engine.wait_hits(keys, context) == 3
    assert engine.load(keys, context) == [payload(key) for key in keys]
    assert engine.manager.get_stats()["loaded_blocks.tier0"] == 3  # once, although they were sent twice


def test_others_go_on_with_the_slots_that_they_hold(make_engine):
    engine, keys = make_engine(), make_keys(3)
    one, two, three = (engine.request(name) for name in "123")
    engine.plant(keys)
    assert engine.wait_hits(keys, three) == 3  # holds them until it loads
    slots = engine.manager.prepare_load(keys, one).block_ids.tolist()
    fail(engine, keys, two)
    engine.step()
    assert engine.table.num_quarantined == 3
    assert [bytes(engine.arena.row(slot)) for slot in slots] == [payload(key) for key in keys]
    engine.manager.complete_load(set(keys), one)
    engine.finish(three)
    engine.step()
    assert engine.table.num_free == engine.table.num_slots


@pytest.mark.parametrize("num_failed", [1, 3])
def test_whoever_held_the_blocks_for_a_load_gets_them_from_the_tier_again_at_once(make_engine, num_failed):
    engine, keys = make_engine(), make_keys(3)
    one, other = engine.request("one"), engine.request("other")
    engine.plant(keys)
    assert engine.wait_hits(keys, other) == 3  # holds them until it loads
    fail(engine, keys[:num_failed], one)
    engine.step()
    assert engine.wait_hits(keys, other) == 3
    assert engine.load(keys, other) == [payload(key) for key in keys]
    for context in (one, other):
        engine.finish(context)
    engine.step()
    assert not engine.table.pins
    assert not engine.table.num_quarantined


def test_two_loads_of_one_block_may_both_fail(make_engine):
    engine, (key, *_) = make_engine(num_tiers=0), make_keys(1)
    context = engine.request()
    engine.store([key], context)
    engine.manager.prepare_load([key], context)
    fail(engine, [key], context)
    engine.manager.complete_load({key}, context, success=False)
    engine.step()
    assert engine.table.num_free == engine.table.num_slots
    assert [event.dropped for event in engine.log.of(LoadFailed)] == [[key], []]


def test_a_load_that_could_not_be_prepared_may_be_completed_as_failed(make_engine):
    engine, keys = make_engine(num_tiers=0), make_keys(2)
    context = engine.request()
    engine.store(keys[:1], context)
    with pytest.raises(BlockNotReadyError):
        engine.manager.prepare_load(keys, context)
    engine.manager.complete_load(set(keys), context, success=False)
    engine.step()
    assert engine.scan(keys, context) == [HIT, MISS]
    assert engine.manager.get_stats()["failed_loads"] == 1
    assert not engine.log.of(UnexpectedCall)


def test_a_block_that_was_stored_anew_meanwhile_stays(make_engine):
    engine, keys = make_engine(num_tiers=0), make_keys(2)
    one, two = engine.request("1"), engine.request("2")
    engine.store(keys, one)
    engine.manager.prepare_load(keys, one)
    fail(engine, keys, two)
    assert engine.store(keys, two) == keys
    engine.manager.complete_load(set(keys), one, success=False)
    engine.step()
    assert engine.scan(keys, one) == [HIT, HIT]
    assert engine.log.of(LoadFailed)[-1].dropped == []


def test_the_load_may_fail_after_the_requests_end_or_a_reset(make_engine):
    engine, keys = make_engine(num_tiers=0), make_keys(3)
    ended, other = engine.request("ended"), engine.request("other")
    engine.store(keys, other)
    engine.manager.prepare_load(keys[:2], ended)
    engine.manager.prepare_load(keys[2:], other)
    engine.finish(ended)
    engine.manager.complete_load(set(keys[:2]), ended, success=False)
    assert [engine.manager.lookup(key, other) for key in keys] == [MISS, MISS, HIT]
    engine.manager.reset_cache()
    engine.manager.complete_load(set(keys[2:]), other, success=False)
    engine.step()
    assert engine.table.num_free == engine.table.num_slots


def test_whoever_follows_the_kv_events_learns_that_the_blocks_left(make_engine):
    engine, keys = make_engine(num_tiers=0, kv_events=True), make_keys(2)
    context = engine.request()
    engine.store(keys, context)
    fail(engine, keys, context)
    stored, removed = engine.manager.take_events()
    assert (stored.removed, removed.removed) == (False, True)
    assert (set(removed.keys), removed.medium) == (set(keys), Medium.CPU)


def load_from_two_slots(engine, key, context):
    """Load a block twice at the same time: another request's load of it fails, and it is stored anew meanwhile."""
    other = engine.request("other")
    engine.store([key], other)
    (first,) = engine.manager.prepare_load([key], context).block_ids.tolist()
    fail(engine, [key], other)
    engine.store([key], other)
    (second,) = engine.manager.prepare_load([key], context).block_ids.tolist()
    assert first != second
    engine.manager.check_invariants()
    return first, second


def test_no_slot_is_reused_before_all_loads_of_its_block_have_ended(make_engine):
    engine, (key, *new) = make_engine(num_blocks=3, num_tiers=0), make_keys(4)
    context = engine.request()
    first, second = load_from_two_slots(engine, key, context)
    engine.manager.complete_load({key}, context)  # the one or the other
    engine.step()
    filled = engine.manager.prepare_store(new, engine.request("new")).store_spec.block_ids.tolist()
    assert len(filled) == 1
    assert {first, second}.isdisjoint(filled)
    engine.manager.complete_load({key}, context)
    engine.finish(context)
    engine.step()
    assert not engine.table.pins
    assert not engine.table.num_quarantined
    assert not engine.log.of(UnexpectedCall)


@pytest.mark.parametrize("results", [(False, True), (True, False), (False, False)])
def test_a_block_is_forgotten_whichever_of_its_loads_failed(make_engine, results):
    engine, (key, *_) = make_engine(num_tiers=0), make_keys(1)
    context = engine.request()
    load_from_two_slots(engine, key, context)
    for success in results:
        engine.manager.complete_load({key}, context, success)
        engine.step()
    assert engine.manager.lookup(key, context) is MISS
    assert [event.dropped for event in engine.log.of(LoadFailed)].count([key]) == 2  # the other request's, and this
    assert engine.table.num_free == engine.table.num_slots


def test_loads_from_two_slots_are_held_through_a_reset(make_engine):
    engine, (key, *_) = make_engine(num_tiers=0), make_keys(1)
    context = engine.request()
    load_from_two_slots(engine, key, context)
    engine.manager.complete_load({key}, context)
    engine.manager.reset_cache()
    engine.step()
    assert engine.table.num_quarantined == 2
    engine.manager.complete_load({key}, context)
    engine.step()
    assert engine.table.num_free == engine.table.num_slots


def test_only_what_arrived_counts_as_loaded_and_saves_tokens(make_engine):
    engine, keys = make_engine(num_tiers=0, tokens_per_block=16, prefill_rate=100.0), make_keys(4)
    context = engine.request()
    engine.store(keys, context)

    def counted():
        stats = engine.manager.get_stats()
        names = ("loaded_blocks.primary", "saved_tokens.primary")
        return (*(stats.get(name, 0) for name in names), stats.get("saved_seconds.primary", 0) > 0)

    engine.scan(keys, context)
    engine.manager.prepare_load(keys, context)
    assert counted() == (0, 0, False)
    engine.manager.complete_load(set(keys), context, success=False)
    assert counted() == (0, 0, False)
    assert engine.store(keys, context) == keys
    engine.manager.prepare_load(keys, context)
    engine.manager.complete_load(keys[:1], context)
    assert counted() == (0, 0, False), "a part has arrived"
    engine.finish(context)
    engine.manager.complete_load(keys[1:], context)
    assert counted() == (4, 64, True)


def test_a_load_from_before_a_reset_saves_nothing(make_engine):
    engine, keys = make_engine(num_tiers=0), make_keys(2)
    context = engine.request()
    engine.store(keys, context)
    engine.manager.prepare_load(keys, context)
    engine.manager.reset_cache()
    engine.manager.complete_load(keys, context)
    engine.step()
    assert "loaded_blocks.primary" not in engine.manager.get_stats()
    engine.store(keys, context)
    engine.load(keys, context)
    assert engine.manager.get_stats()["loaded_blocks.primary"] == 2
