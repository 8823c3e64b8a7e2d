"""DESIGN: lookup answers, probes, and what a scan is."""

import sys

import pytest
from engine import make_keys

from kvtier import key_tables
from kvtier.events import RequestGaveUp, TierState
from kvtier.tiering.outline import split_scan
from kvtier.types import LookupResult, Medium, ScheduleEndContext, TierFilter, TierMatcher

HIT, MISS, PENDING, RETRY = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING, LookupResult.RETRY


def test_ready_is_a_hit_and_absent_is_a_miss(make_engine):
    engine, keys = make_engine(), make_keys(3)
    context = engine.request()
    engine.store(keys[:2], context)
    assert engine.scan(keys, context) == [HIT, HIT, MISS]


def test_a_tiers_block_is_pending_without_allocating_anything(make_engine):
    engine, keys = make_engine(), make_keys(3)
    engine.plant(keys)
    context = engine.request()
    assert engine.scan(keys, context) == [PENDING] * 3
    assert engine.table.num_free == engine.table.num_slots
    assert not engine.tier.loads
    engine.step()
    assert engine.table.num_free == engine.table.num_slots - 3


def test_a_store_in_flight_is_pending(make_engine):
    engine, keys = make_engine(num_tiers=0), make_keys(1)
    engine.manager.prepare_store(keys, engine.request("a"))
    assert engine.scan(keys, engine.request("b")) == [PENDING]


def test_retry_only_while_a_probe_is_unanswered(make_engine):
    engine, keys = make_engine(), make_keys(2)
    engine.tier.unknown.update(keys)
    context = engine.request()
    assert engine.scan(keys, context) == [RETRY, RETRY]
    engine.step()
    engine.tier.unknown.clear()
    assert engine.scan(keys, context) == [MISS]


def test_one_tiers_silence_does_not_delay_anothers_hit(make_engine):
    engine, keys = make_engine(num_tiers=2), make_keys(2)
    engine.tiers[0].unknown.update(keys)
    engine.plant(keys, tier=1)
    context = engine.request()
    assert engine.scan(keys, context) == [PENDING, PENDING]
    engine.step()
    assert engine.scan(keys, context) == [HIT, HIT]
    assert engine.manager.get_load_source(keys[0], context) == "tier1"


def test_a_probe_that_takes_too_long_is_a_miss_for_that_request_only(make_engine):
    engine, keys = make_engine(probe_deadline=0.005), make_keys(1)
    engine.let_tiers_answer()
    engine.tier.unknown.update(keys)
    slow, fresh = engine.request("slow"), engine.request("fresh")
    assert engine.scan(keys, slow) == [RETRY]
    engine.step()
    engine.clock.advance(0.004)
    assert engine.scan(keys, slow) == [RETRY]
    engine.step()
    engine.clock.advance(0.002)
    assert engine.scan(keys, slow) == [MISS]
    assert engine.scan(keys, fresh) == [RETRY]
    assert [event.reason for event in engine.log.of(RequestGaveUp)] == ["probe"]


def test_the_clock_of_a_probe_starts_anew_once_the_tier_has_answered(make_engine):
    engine, keys = make_engine(probe_deadline=0.005), make_keys(4)
    context = engine.request()
    for key in keys:
        engine.tier.unknown = {key}
        assert engine.manager.lookup(key, context) is RETRY
        engine.step()
        engine.clock.advance(0.004)
        engine.tier.unknown = set()
        assert engine.manager.lookup(key, context) is MISS
        engine.step()


def test_a_tier_that_is_down_is_a_miss_at_once(make_engine):
    engine, keys = make_engine(), make_keys(1)
    engine.plant(keys)
    engine.tier.current_state = TierState.DOWN
    assert engine.scan(keys, engine.request()) == [MISS]
    assert not engine.tier.lookups


def test_the_load_filter_excludes_tiers(make_engine):
    engine, keys = make_engine(), make_keys(1)
    engine.plant(keys)
    only_cpu = TierFilter((TierMatcher(medium=Medium.CPU),))
    assert engine.scan(keys, engine.request("a", load_tier_filter=only_cpu)) == [MISS]
    assert engine.scan(keys, engine.request("b")) == [PENDING]


def test_a_scan_is_kept_by_group_and_a_repeated_key_starts_it_over():
    a, b = make_keys(4, group=0), make_keys(4, group=1)
    assert split_scan([a[0], b[3], a[1], b[2], a[2]]) == [[a[0], a[1], a[2]], [b[3], b[2]]]
    assert split_scan([a[0], a[1], a[2], b[0], a[0], a[1]]) == [[a[0], a[1]], [b[0]]]


def test_a_way_backwards_over_a_key_that_was_asked_before_is_no_new_start():
    a = make_keys(7, "a")
    ends = {key: 4 * index for index, key in enumerate(a)}
    whole_then_parts = [a[3], a[6], a[5], a[4], a[3], a[2]]
    assert split_scan(whole_then_parts, ends.get) == [[a[3], a[6], a[5], a[4], a[2]]]
    assert split_scan(whole_then_parts) == [[a[3], a[2]]], "without ends it looks like a new start"
    window_again = [a[6], a[5], a[4], a[5], a[4], a[3]]
    assert split_scan(window_again, ends.get) == [[a[5], a[4], a[3]]]
    assert split_scan([a[0], a[1], a[2], a[0], a[1]], ends.get) == [[a[0], a[1]]]


def test_each_scan_replaces_the_last(make_engine):
    engine, keys = make_engine(), make_keys(4)
    engine.plant(keys)
    context = engine.request()
    engine.scan(keys, context)
    engine.scan(keys[:2], context)  # the engine starts over and needs less
    engine.step()
    assert [list(job.keys) for job in engine.tier.loads] == [keys[:2]]


def test_a_wrong_key_is_a_miss(make_engine):
    engine = make_engine(num_tiers=0)
    engine.store(make_keys(1), engine.request("a"))
    assert engine.manager.lookup(b"short", engine.request("b")) is MISS


def test_a_preempted_request_asks_a_tier_again_that_was_too_slow(make_engine):
    engine, keys = make_engine(probe_deadline=0.005), make_keys(1)
    engine.let_tiers_answer()
    engine.tier.unknown = set(keys)
    context = engine.request()
    assert engine.scan(keys, context) == [RETRY]
    engine.step()
    engine.clock.advance(0.006)
    assert engine.scan(keys, context) == [MISS]
    engine.step(preempted=["r"])
    assert engine.scan(keys, context) == [RETRY]


def test_a_scan_need_not_be_repeated_while_all_it_awaits_is_on_its_way(make_engine):
    engine, keys = make_engine(), make_keys(6)
    engine.plant(keys)
    engine.tier.auto = False
    context = engine.request()
    deferred = engine.manager.is_still_deferred
    assert not deferred(keys[0], context)
    engine.scan(keys, context)
    assert not deferred(keys[0], context)  # nothing is planned yet
    engine.step()
    for _ in range(3):
        assert deferred(keys[0], context)
        assert not deferred(keys[1], context)  # another scan
        engine.step()
    assert not deferred(keys[0], engine.request("other"))
    engine.tier.finish(engine.tier.loads[0])
    engine.step()
    assert not deferred(keys[0], context)
    assert engine.hits(keys, context) == 6


def test_a_scan_is_repeated_after_the_deadline_and_after_a_failure(make_engine):
    for failing in (False, True):
        engine, keys = make_engine(load_deadline=1.0), make_keys(3)
        engine.plant(keys)
        engine.tier.auto = False
        context = engine.request()
        engine.scan(keys, context)
        engine.step()
        assert engine.manager.is_still_deferred(keys[0], context)
        if failing:
            engine.tier.fail = set(keys[1:])
            engine.tier.finish(engine.tier.loads[0])
        else:
            engine.clock.advance(1.5)
        engine.step()
        assert not engine.manager.is_still_deferred(keys[0], context)


def test_a_scan_with_an_unanswered_probe_is_repeated(make_engine):
    engine, keys = make_engine(), make_keys(4)
    engine.plant(keys)
    engine.tier.auto, engine.tier.unknown = False, {keys[2]}
    context = engine.request()
    engine.scan(keys, context)
    engine.step()
    assert engine.tier.loads
    assert not engine.manager.is_still_deferred(keys[0], context)


def test_a_prefix_in_one_call_gets_what_its_keys_get_one_by_one(make_engine):
    keys = make_keys(8)

    def look(ready, planted, unknown, *, at_once):
        engine = make_engine(load_deadline=2.0)
        engine.store(ready, engine.request("before"))
        engine.plant(planted)
        engine.tier.unknown.update(unknown)
        context, found = engine.request(), []
        for passed in (0.0, 0.001, 3.0):
            engine.clock.advance(passed)
            if at_once:
                found.append(engine.manager.lookup_prefix(keys, context))
            else:
                answers = engine.scan(keys, context)
                head = answers[: answers.index(MISS)] if MISS in answers else answers
                found.append((head.count(HIT), len(head) - head.count(HIT)))
            engine.manager.on_schedule_end(ScheduleEndContext())
        engine.manager.check_invariants()
        return found

    cases = [
        (keys, [], []),
        (keys[:3], [], []),
        (keys[:3], keys[3:], []),
        (keys[:2], keys[2:5], [keys[5]]),
        ([], [], keys[:2]),
        (keys[1:], [], []),
    ]
    for case in cases:
        assert look(*case, at_once=True) == look(*case, at_once=False)


@pytest.mark.parametrize("num_tiers", [0, 1])
def test_a_step_looks_at_no_request_that_only_decodes(make_engine, num_tiers):
    calls = []
    for num_live in (10, 1000):
        engine, keys = make_engine(num_tiers=num_tiers, tokens_per_block=16), make_keys(4)
        engine.store(keys, engine.request("storer"))
        for number in range(num_live):
            context = engine.request(f"live {number}")
            assert engine.scan(keys, context) == [HIT] * 4
            engine.load(keys, context)
        engine.step()
        seen = []
        sys.setprofile(lambda frame, kind, _, seen=seen: seen.append(frame.f_code.co_name) if kind == "call" else None)
        try:
            engine.manager.on_schedule_end(ScheduleEndContext())
        finally:
            sys.setprofile(None)
        calls.append(seen)
        engine.close()
    assert calls[0] == calls[1]


def test_a_request_that_decodes_is_looked_at_again_when_it_was_preempted(make_engine):
    engine, keys = make_engine(num_blocks=16, tokens_per_block=16), make_keys(8)
    engine.plant(keys)
    context = engine.request()
    assert engine.wait_hits(keys[:4], context) == 4
    engine.load(keys[:4], context)
    engine.step()
    engine.step(preempted=["r"])
    engine.scan(keys, context)
    engine.step()
    assert engine.wait_hits(keys, context) == 8


def test_a_request_that_asked_for_nothing_leaves_nothing_behind(make_engine):
    engine, keys = make_engine(), make_keys(2)
    for name in ("first", "second"):
        context = engine.request(name)
        engine.step(new=[name], preempted=[name])
        engine.manager.on_request_finished(context)
    again = engine.request("first")
    assert engine.store(keys, again) == keys
    engine.finish(again)
    engine.manager.check_invariants()


@pytest.mark.parametrize("wrong", [b"", b"1234", "text" * 9, 7])
def test_a_large_cache_answers_as_a_small_one(make_engine, monkeypatch, wrong):
    monkeypatch.setattr(key_tables, "MOST_IN_ONE", 0)
    engine, keys = make_engine(num_tiers=1), make_keys(6)
    context = engine.request()
    engine.store(keys[:4], context)
    assert engine.manager.lookup(wrong, context) is LookupResult.MISS
    assert engine.scan(keys, context) == [HIT] * 4 + [MISS]
    engine.step()
    engine.manager.check_invariants()
