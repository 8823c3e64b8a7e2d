"""DESIGN: plan, budget, lease, and promotions that several requests share."""

import sys

import pytest
from engine import make_keys, payload

from kvtier.errors import BlockNotReadyError
from kvtier.events import BlocksEvicted, BlocksStored, RequestGaveUp
from kvtier.types import LookupResult, ScheduleEndContext

HIT, MISS, PENDING, RETRY = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING, LookupResult.RETRY


def test_what_is_certain_is_promoted_as_one_job_a_tier(make_engine):
    engine, keys = make_engine(num_tiers=2), make_keys(4)
    engine.plant(keys[:2], tier=0)
    engine.plant(keys[2:], tier=1)
    context = engine.request()
    assert engine.wait_hits(keys, context) == 4
    assert [list(job.keys) for job in engine.tiers[0].loads] == [keys[:2]]
    assert [list(job.keys) for job in engine.tiers[1].loads] == [keys[2:]]
    assert engine.load(keys, context) == [payload(key) for key in keys]


def test_nothing_behind_the_first_unresolved_key_is_promoted(make_engine):
    engine, keys = make_engine(), make_keys(4)
    engine.plant(keys)
    engine.tier.unknown = {keys[2]}
    engine.scan(keys, engine.request())
    engine.step()
    assert [list(job.keys) for job in engine.tier.loads] == [keys[:2]]


def test_a_sliding_window_scan_from_the_tail_is_promoted_in_its_order(make_engine):
    engine, keys = make_engine(), make_keys(5)
    engine.plant([keys[4], keys[3], keys[1]])
    context = engine.request()
    answers = [engine.manager.lookup(key, context) for key in reversed(keys)]
    assert answers == [PENDING, PENDING, MISS, PENDING, MISS]
    engine.step()
    assert [list(job.keys) for job in engine.tier.loads] == [[keys[4], keys[3], keys[1]]]


def test_groups_are_cut_evenly_by_the_budget(make_engine):
    engine = make_engine(num_blocks=8, promotion_budget=0.5)
    full, window = make_keys(4, group=0), make_keys(4, group=1)
    engine.plant(full + window)
    context = engine.request()
    engine.scan(full, context)
    engine.scan(window, context)
    engine.step()
    assert [set(job.keys) for job in engine.tier.loads] == [{*full[:2], *window[:2]}]


def test_the_budget_counts_leases_and_serves_the_oldest_first(make_engine):
    engine = make_engine(num_blocks=8, promotion_budget=0.5)
    old, young = make_keys(3, "old"), make_keys(3, "young")
    engine.plant(old + young)
    first, second = engine.request("first"), engine.request("second")
    engine.scan(young, second)  # asks first, but arrived later
    engine.scan(old, first)
    engine.step()
    assert [list(job.keys) for job in engine.tier.loads] == [old, young[:1]]
    assert engine.hits(old, first) == 3
    assert engine.scan(young, second) == [HIT, MISS]
    assert [(e.req_id, e.reason, e.num_blocks) for e in engine.log.of(RequestGaveUp)] == [("second", "budget", 2)]
    engine.step()
    third = engine.request("third")
    assert engine.scan(young[1:], third)[0] is PENDING  # nothing left of the budget: four slots are leased
    engine.step()
    assert engine.scan(young[1:], third) == [MISS]


def test_a_prefix_larger_than_the_primary_brings_its_head(make_engine):
    engine, keys = make_engine(num_blocks=4, promotion_budget=1.0), make_keys(10)
    engine.plant(keys)
    context = engine.request()
    assert engine.wait_hits(keys, context) == 4
    assert engine.load(keys[:4], context) == [payload(key) for key in keys[:4]]


def test_a_promotion_does_not_evict_the_hits_it_completes(make_engine):
    engine, keys = make_engine(num_blocks=4, promotion_budget=1.0), make_keys(4)
    engine.store(keys[:2], engine.request("a"))
    engine.store(make_keys(2, "other"), engine.request("b"))  # more recent than the hits
    engine.plant(keys[2:])
    context = engine.request("c")
    assert engine.wait_hits(keys, context) == 4


@pytest.mark.parametrize("end", ["load", "finish", "timeout"])
def test_a_lease_holds_until_the_load_the_end_or_a_timeout(make_engine, end):
    engine, keys = make_engine(num_blocks=4, promotion_budget=1.0, lease_timeout=30.0), make_keys(4)
    engine.plant(keys)
    context = engine.request("holder")
    assert engine.wait_hits(keys, context) == 4
    assert engine.manager.prepare_store(make_keys(1, "new"), engine.request("storer")) is None
    if end == "load":
        engine.load(keys, context)
    elif end == "finish":
        engine.finish(context)
    else:
        engine.clock.advance(29.0)
        engine.step()
        assert engine.manager.prepare_store(make_keys(1, "new"), engine.request("storer")) is None
        engine.clock.advance(1.5)
        engine.step()
    assert engine.store(make_keys(4, "new"), engine.request("storer")) == make_keys(4, "new")


def test_two_requests_that_share_a_prefix_load_it_once(make_engine):
    engine, keys = make_engine(), make_keys(4)
    engine.plant(keys)
    engine.tier.auto = False
    one, two, three = engine.request("one"), engine.request("two"), engine.request("three")
    assert engine.scan(keys, one) == engine.scan(keys, two) == [PENDING] * 4
    engine.step()
    assert engine.scan(keys, three) == [PENDING] * 4
    engine.step()
    (job,) = engine.tier.loads
    engine.tier.finish(job)
    for context in (one, two, three):
        assert engine.hits(keys, context) == 4
    engine.step()
    engine.finish(one)
    engine.store(make_keys(8, "new"), engine.request("storer"))  # pressure: two and three hold their leases
    assert engine.load(keys, two) == engine.load(keys, three) == [payload(key) for key in keys]


def test_two_large_requests_do_not_evict_each_others_hits(make_engine):
    engine = make_engine(num_blocks=8, promotion_budget=1.0)
    ours, theirs = make_keys(4, "ours"), make_keys(6, "theirs")
    engine.plant(ours + theirs)
    one, two = engine.request("one"), engine.request("two")
    engine.scan(ours, one)
    engine.scan(theirs, two)
    engine.step()
    assert engine.hits(ours, one) == 4
    assert engine.hits(theirs, two) == 4
    assert not engine.log.of(BlocksEvicted)
    engine.step()
    assert engine.load(ours, one) == [payload(key) for key in ours]
    assert engine.load(theirs[:4], two) == [payload(key) for key in theirs[:4]]


def test_a_failed_promotion_is_a_miss_and_is_not_tried_again_for_that_request(make_engine):
    engine, keys = make_engine(), make_keys(3)
    engine.plant(keys)
    engine.tier.fail = {keys[1]}
    context = engine.request()
    assert engine.wait_hits(keys, context) == 1
    assert len(engine.tier.loads) == 1
    assert engine.table.num_free == engine.table.num_slots - 2


def test_another_tier_is_tried_after_a_failed_promotion(make_engine):
    engine, keys = make_engine(num_tiers=2), make_keys(2)
    engine.plant(keys, tier=0)
    engine.plant(keys, tier=1)
    engine.tiers[0].fail = set(keys)
    context = engine.request()
    assert engine.wait_hits(keys, context) == 2
    assert engine.manager.get_load_source(keys[0], context) == "tier1"


def test_loading_what_is_not_ready_is_a_clear_error_that_pins_nothing(make_engine):
    engine, keys = make_engine(), make_keys(3)
    context = engine.request()
    engine.store(keys[:2], context)
    with pytest.raises(BlockNotReadyError, match="1 of 3 blocks are not ready"):
        engine.manager.prepare_load(keys, context)
    engine.tiers[0].auto = True
    engine.step()
    assert engine.store(make_keys(8, "new"), engine.request("new")) == make_keys(8, "new")


def test_sources_are_counted_by_tier(make_engine):
    engine, keys = make_engine(num_tiers=2), make_keys(3)
    engine.store(keys[:1], engine.request("a"))
    engine.tiers[0].blocks.clear()
    engine.plant(keys[1:2], tier=0)
    engine.plant(keys[2:], tier=1)
    context = engine.request("b")
    assert engine.wait_hits(keys, context) == 3
    sources = [engine.manager.get_load_source(key, context) for key in keys]
    assert sources == ["primary", "tier0", "tier1"]
    engine.load(keys, context)
    stats = engine.manager.get_stats()
    assert [stats[f"loaded_blocks.{name}"] for name in sources] == [1, 1, 1]


def test_a_hit_that_another_request_holds_costs_no_budget(make_engine):
    engine = make_engine(num_blocks=10, promotion_budget=0.8)
    shared, ours, theirs = make_keys(6, "shared"), make_keys(1, "ours"), make_keys(1, "theirs")
    engine.store(shared, engine.request("storer"))
    engine.plant(ours + theirs)
    one, two = engine.request("one"), engine.request("two")
    assert engine.wait_hits(shared + ours, one) == 7
    assert engine.wait_hits(shared + theirs, two) == 7
    engine.tier.full = True
    engine.finish(one)
    engine.store(make_keys(10, "pressure"), engine.request("presser"))
    assert engine.load(shared + theirs, two) == [payload(key) for key in shared + theirs]


def test_a_request_that_loads_waits_for_nothing_and_holds_nothing(make_engine):
    engine = make_engine(num_blocks=8, num_tiers=2)
    keys = make_keys(6)
    engine.plant(keys[:2], tier=0)
    engine.plant(keys[2:], tier=1)
    engine.tiers[1].auto = False
    context = engine.request()
    engine.scan(keys, context)
    engine.step()
    engine.step()
    engine.load(keys[:2], context)  # the engine takes what is there
    assert not engine.manager.has_pending_work()
    engine.tiers[1].finish(engine.tiers[1].waiting[0])
    engine.step()
    assert len(engine.store(make_keys(8, "pressure"), engine.request("pressure"))) == 8


def test_a_tier_that_claims_to_hold_what_is_no_key_is_a_miss(make_engine):
    engine, wrong = make_engine(), b"too short a key"
    context = engine.request()
    engine.store(make_keys(1), context)
    engine.tier.blocks[wrong] = b""
    assert engine.manager.lookup(wrong, context) is PENDING
    engine.step()
    assert engine.manager.lookup(wrong, context) is MISS


def test_one_failed_promotion_is_a_miss_for_all_who_wait_for_it(make_engine):
    engine, keys = make_engine(), make_keys(3)
    engine.plant(keys)
    engine.tier.auto = False
    engine.tier.fail = {keys[1]}
    contexts = [engine.request(name) for name in "abc"]
    for context in contexts:
        engine.scan(keys, context)
    engine.step()
    engine.tier.finish(engine.tier.waiting[0])
    engine.step()
    assert [engine.scan(keys, context) for context in contexts] == [[HIT, MISS]] * 3
    for context in contexts:
        engine.finish(context)
    assert engine.store(make_keys(8, "pressure"), engine.request("d")) == make_keys(8, "pressure")


def test_hits_leased_beside_a_store_are_released_after_the_timeout(make_engine):
    engine = make_engine(num_blocks=4, num_tiers=0, lease_timeout=30.0)
    hits, stuck, storer = make_keys(2, "hits"), make_keys(1, "stuck"), engine.request("storer")
    engine.store(hits, storer)
    engine.manager.prepare_store(stuck, storer)
    assert engine.scan(hits + stuck, engine.request("reader")) == [HIT, HIT, PENDING]
    engine.step()
    assert engine.store(make_keys(3, "new"), engine.request("new")) == make_keys(1, "new")  # the hits are held
    engine.clock.advance(2.1)
    engine.step()  # it gives up on the store, and may still load its hits
    assert engine.store(make_keys(3, "newer"), engine.request("newer")) == make_keys(1, "newer")
    engine.clock.advance(31)
    engine.step()
    assert engine.store(make_keys(3, "newest"), engine.request("newest")) == make_keys(3, "newest")


def test_a_promotion_says_what_came_and_what_gave_way(make_engine):
    engine, keys = make_engine(num_blocks=2, promotion_budget=1.0), make_keys(2)
    old = make_keys(2, "old")
    engine.store(old, engine.request("storer"))
    engine.step()
    engine.plant(keys)
    assert engine.wait_hits(keys, engine.request("reader")) == 2
    assert engine.log.of(BlocksEvicted) == [BlocksEvicted("primary", old[::-1])]
    assert engine.log.of(BlocksStored)[-1] == BlocksStored(keys, "tier0")


def test_a_preempted_request_may_ask_again_for_what_was_over_the_budget(make_engine):
    engine, keys = make_engine(num_blocks=8, promotion_budget=0.5), make_keys(6)
    engine.plant(keys)
    context = engine.request()
    assert engine.wait_hits(keys, context) == 4
    engine.load(keys[:4], context)
    engine.step(preempted=["r"])
    assert engine.wait_hits(keys[4:], context) == 2


def test_a_step_looks_at_no_request_that_the_engine_has_not_looked_up(make_engine):
    calls = []
    for num_new in (10, 1000):
        engine, keys = make_engine(), make_keys(4)
        engine.plant(keys)
        waiting = engine.request("waiting")
        for number in range(num_new):
            engine.request(f"new {number}")
        engine.scan(keys, waiting)
        engine.step()
        engine.scan(keys, waiting)
        seen = []
        sys.setprofile(lambda frame, kind, _, seen=seen: seen.append(frame.f_code.co_name) if kind == "call" else None)
        try:
            engine.manager.on_schedule_end(ScheduleEndContext())
        finally:
            sys.setprofile(None)
        calls.append(seen)
        engine.close()
    assert calls[0] == calls[1]
