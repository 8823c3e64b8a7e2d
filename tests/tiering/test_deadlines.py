"""DESIGN: every wait ends; the clock runs only while a tier causes the wait; late results harm nobody."""

import pytest
from engine import DEFERRED, make_keys, payload

from kvtier.events import BlocksStored, RequestGaveUp
from kvtier.types import LookupResult

HIT, MISS, PENDING, RETRY = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING, LookupResult.RETRY


def silent(engine):
    engine.tier.auto = False
    return engine


def test_a_tier_that_never_answers_costs_the_load_deadline(make_engine):
    engine, keys = silent(make_engine(load_deadline=2.0)), make_keys(3)
    engine.plant(keys)
    context = engine.request()
    assert engine.scan(keys, context) == [PENDING] * 3
    engine.step()
    engine.clock.advance(1.9)
    assert engine.scan(keys, context) == [PENDING] * 3
    engine.step()
    engine.clock.advance(0.2)
    assert engine.scan(keys, context) == [MISS]
    engine.step()
    assert [event.reason for event in engine.log.of(RequestGaveUp)] == ["deadline"]
    assert engine.scan(make_keys(1, "another"), context) == [MISS]  # it waits no more, for nothing


def test_what_arrived_before_the_deadline_is_the_hit(make_engine):
    engine, keys = silent(make_engine(num_tiers=2, load_deadline=2.0)), make_keys(4)
    engine.plant(keys[:2], tier=1)
    engine.plant(keys[2:], tier=0)
    context = engine.request()
    engine.scan(keys, context)
    engine.step()
    engine.clock.advance(2.1)
    assert engine.scan(keys, context) == [HIT, HIT, MISS]
    engine.step()
    assert engine.load(keys[:2], context) == [payload(key) for key in keys[:2]]


def test_a_request_gives_up_even_if_it_is_not_looked_up_again(make_engine):
    engine, keys = silent(make_engine(load_deadline=2.0)), make_keys(1)
    engine.plant(keys)
    engine.scan(keys, engine.request())
    engine.step()
    engine.clock.advance(2.1)
    engine.step()
    assert engine.log.of(RequestGaveUp)
    assert not engine.manager.has_pending_work()


def test_the_deadline_is_the_time_to_recompute_if_that_is_shorter(make_engine):
    engine = silent(make_engine(load_deadline=2.0, prefill_rate=1000.0, tokens_per_block=100))
    keys = make_keys(3)
    engine.plant(keys)
    context = engine.request()
    engine.scan(keys, context)
    engine.step()
    engine.clock.advance(0.29)
    assert engine.scan(keys, context) == [PENDING] * 3
    engine.step()
    engine.clock.advance(0.02)
    assert engine.scan(keys, context) == [MISS]


def test_the_deadline_is_armed_anew_after_a_preemption(make_engine):
    engine, keys = silent(make_engine(load_deadline=2.0)), make_keys(1)
    engine.plant(keys)
    context = engine.request()
    engine.scan(keys, context)
    engine.step()
    engine.clock.advance(3)
    assert engine.scan(keys, context) == [MISS]
    engine.step(preempted=["r"])
    engine.tier.finish(engine.tier.waiting[0])
    engine.tier.auto = True
    assert engine.wait_hits(keys, context) == 1


def test_the_clock_stands_still_while_no_tier_causes_the_wait(make_engine):
    engine, keys = make_engine(load_deadline=2.0), make_keys(4)
    engine.plant(keys[:2])
    context = engine.request()
    assert engine.wait_hits(keys[:2], context) == 2
    engine.clock.advance(100)  # the engine has no room for the request yet
    engine.step()
    engine.plant(keys[2:])
    assert engine.wait_hits(keys, context) == 4


def test_waits_of_one_attempt_add_up(make_engine):
    engine, keys = silent(make_engine(load_deadline=2.0)), make_keys(3)
    engine.plant(keys)
    context = engine.request()
    for count in (1, 2):
        assert engine.scan(keys[:count], context)[-1] is PENDING
        engine.step()
        engine.clock.advance(0.9)
        engine.tier.finish(engine.tier.waiting[0])
        engine.step()
    assert engine.scan(keys, context) == [HIT, HIT, PENDING]
    engine.step()
    engine.clock.advance(0.3)
    assert engine.scan(keys, context) == [HIT, HIT, MISS]


def test_nobody_joins_a_promotion_that_came_too_late_for_another(make_engine):
    engine, keys = silent(make_engine(load_deadline=2.0)), make_keys(2)
    engine.plant(keys)
    engine.scan(keys, engine.request("first"))
    engine.step()
    engine.clock.advance(2.1)
    engine.step()
    assert engine.scan(keys, engine.request("second")) == [MISS]  # at once, not after two more seconds
    engine.tier.finish(engine.tier.waiting[0])
    engine.step()
    assert engine.scan(keys, engine.request("third")) == [HIT, HIT]


def test_a_store_that_never_completes_does_not_hold_a_request_for_ever(make_engine):
    engine, keys = make_engine(num_tiers=0, load_deadline=2.0), make_keys(1)
    engine.manager.prepare_store(keys, engine.request("writer"))
    context = engine.request("reader")
    assert engine.scan(keys, context) == [PENDING]
    engine.step()
    engine.clock.advance(2.1)
    assert engine.scan(keys, context) == [MISS]


def test_an_abandoned_promotion_is_stored_in_a_new_slot_and_its_late_result_changes_nothing(make_engine):
    engine, keys = silent(make_engine(num_blocks=4, load_deadline=2.0)), make_keys(2)
    engine.plant(keys)
    context = engine.request("gives up")
    engine.scan(keys, context)
    engine.step()
    (job,) = engine.tier.loads
    engine.clock.advance(2.1)
    assert engine.scan(keys, context) == [MISS]
    output = engine.manager.prepare_store(keys, context)
    new_slots = output.store_spec.block_ids.tolist()
    assert set(new_slots).isdisjoint(job.block_ids.tolist())
    engine.fill(new_slots, keys, version=1)
    for key in keys:  # the tier writes other bytes, late, into the slots of its own job
        engine.tier.blocks[key] = b"\xff" * len(payload(key))
    engine.tier.finish(job)
    engine.step()
    assert engine.scan(keys, engine.request("early")) == [PENDING, PENDING]  # the store has not completed
    engine.manager.complete_store(set(keys), context)
    assert engine.load(keys, engine.request("reader")) == [payload(key, 1) for key in keys]
    engine.finish(context)
    engine.step()
    assert [event.source for event in engine.log.of(BlocksStored)] == [None]
    assert engine.table.num_free == 2
    assert engine.table.num_quarantined == 0


def test_slots_of_an_unanswered_promotion_are_not_reused_under_pressure(make_engine):
    engine, keys = silent(make_engine(num_blocks=4, load_deadline=2.0)), make_keys(2)
    engine.plant(keys)
    context = engine.request("gives up")
    engine.scan(keys, context)
    engine.step()
    (job,) = engine.tier.loads
    engine.clock.advance(2.1)
    engine.step()
    engine.tier.full = True  # no cascade pins anything
    engine.store(keys, context)
    for i in range(5):
        other = engine.request(f"pressure{i}")
        output = engine.manager.prepare_store(make_keys(2, f"pressure{i}"), other)
        assert set(output.store_spec.block_ids.tolist()).isdisjoint(job.block_ids.tolist())
        engine.manager.complete_store(set(output.keys_to_store), other, success=False)
    assert engine.table.num_quarantined == 2
    engine.tier.finish(job)
    engine.step()
    assert engine.table.num_quarantined == 0


def test_an_abandoned_promotion_that_nobody_stores_still_becomes_ready(make_engine):
    engine, keys = silent(make_engine()), make_keys(2)
    engine.plant(keys)
    context = engine.request("leaves")
    engine.scan(keys, context)
    engine.step()
    engine.finish(context)
    engine.tier.finish(engine.tier.waiting[0])
    engine.step()
    assert engine.hits(keys, engine.request("next")) == 2


@pytest.mark.parametrize("answer", [RETRY, PENDING])
def test_no_key_is_deferred_for_ever(make_engine, answer):
    engine, keys = make_engine(load_deadline=2.0, probe_deadline=10.0), make_keys(1)
    engine.tier.lookup = lambda key, context: answer
    context = engine.request()
    for _ in range(100):
        if engine.scan(keys, context)[0] not in DEFERRED:
            return
        engine.step()
        engine.clock.advance(0.05)
    raise AssertionError("deferred for ever")


def test_a_tier_that_lies_about_its_blocks_does_not_hold_a_request_for_ever(make_engine):
    engine, keys = make_engine(), make_keys(2)
    engine.tier.lookup = lambda key, context: HIT  # and no load succeeds
    context = engine.request()
    assert engine.wait_hits(keys, context, steps=5) == 0


def test_a_store_that_somebody_awaited_in_vain_costs_the_next_request_nothing(make_engine):
    engine, keys = make_engine(num_tiers=0, load_deadline=2.0), make_keys(1)
    writer = engine.request("writer")
    engine.manager.prepare_store(keys, writer)
    engine.scan(keys, engine.request("first"))
    engine.clock.advance(2.1)
    engine.step()
    assert engine.scan(keys, engine.request("second")) == [MISS]
    engine.manager.complete_store(set(keys), writer, success=False)
    engine.manager.prepare_store(keys, writer)
    assert engine.scan(keys, engine.request("third")) == [PENDING]  # another store, which may be quicker


def test_a_block_that_is_late_delays_a_request_no_longer_than_computing_it_would(make_engine):
    engine = make_engine(num_blocks=16, num_tiers=2, prefill_rate=1000.0, tokens_per_block=100)
    keys = make_keys(10)
    engine.plant(keys[:9], tier=0)
    engine.plant(keys[9:], tier=1)
    engine.tiers[1].auto = False
    context = engine.request()
    assert engine.scan(keys, context) == [PENDING] * 10
    engine.step()
    engine.clock.advance(0.08)
    assert engine.scan(keys, context) == [*[HIT] * 9, PENDING]
    engine.step()
    engine.clock.advance(0.05)  # all ten would take a second to compute, and the last one a tenth of it
    engine.step()
    assert engine.scan(keys, context) == [*[HIT] * 9, MISS]
    assert [event.reason for event in engine.log.of(RequestGaveUp)] == ["slower"]


@pytest.mark.parametrize("first", ["probe", "store"])
def test_the_clock_stands_still_while_the_engine_does_not_ask(make_engine, first):
    engine, keys = make_engine(load_deadline=2.0, probe_deadline=0.005), make_keys(3)
    context, writer = engine.request(), engine.request("writer")
    if first == "probe":
        engine.tier.unknown = set(keys)
    else:
        engine.manager.prepare_store(keys[:1], writer)
    assert engine.scan(keys[:1], context)[0] in DEFERRED
    engine.step()
    engine.step()  # others take the whole of this step, and of many more
    engine.clock.advance(3)
    engine.tier.unknown = set(keys[1:])  # what it answered is forgotten: it has to look again
    if first == "probe":
        engine.plant(keys[:1])
    else:
        engine.manager.complete_store(set(keys[:1]), writer)
    assert engine.scan(keys, context)[1:] == [RETRY, RETRY]


def test_a_request_that_is_asked_about_in_every_other_step_gives_up_all_the_same(make_engine):
    engine, keys = make_engine(load_deadline=2.0, probe_deadline=0.005), make_keys(1)
    engine.tier.lookup = lambda key, context: RETRY
    context = engine.request()
    for _ in range(50):
        if engine.scan(keys, context) == [MISS]:
            return
        for _ in range(2):
            engine.clock.advance(0.1)
            engine.step()
    raise AssertionError("deferred for ever")


def test_nothing_is_promoted_for_a_request_that_gave_up(make_engine):
    engine, keys = silent(make_engine(load_deadline=2.0)), make_keys(3)
    engine.plant(keys[:1])
    context = engine.request()
    engine.scan(keys, context)
    engine.step()
    engine.clock.advance(1.9)
    engine.plant(keys[1:])
    assert engine.scan(keys, context) == [PENDING] * 3
    engine.clock.advance(0.2)
    engine.step()
    assert len(engine.tier.loads) == 1
    assert not engine.manager.has_pending_work()


def test_the_clock_stands_still_while_all_is_answered_and_the_engine_asks_in_vain_for_room(make_engine):
    engine, keys = make_engine(load_deadline=2.0, probe_deadline=0.005), make_keys(2)
    context = engine.request()
    engine.tier.unknown = set(keys[:1])
    assert engine.scan(keys, context)[0] is RETRY
    engine.step()
    engine.tier.unknown = set()
    for _ in range(30):
        assert engine.scan(keys, context) == [MISS]
        engine.step()
        engine.clock.advance(0.1)
    engine.plant(keys)
    assert engine.wait_hits(keys, context) == 2
