"""What a tier is too busy to take is offered again. A tier gets little until it has shown its speed."""

import pytest
from engine import make_keys

from kvtier.events import CascadeRefused
from kvtier.eviction.lru import LRUPolicy
from kvtier.primary.table import BlockTable
from kvtier.tiering import late_stores
from kvtier.tiering.late_stores import LateStores
from kvtier.types import ReqContext


def answer_all(engine):
    for job in list(engine.tier.waiting):
        engine.tier.finish(job)
    engine.step()


def serve(engine, keys, name):
    context = engine.request(name)
    stored = engine.store(keys, context)
    engine.finish(context)
    engine.step()
    return stored


def go_on(engine):
    for _ in range(60):
        engine.step()
        engine.clock.advance(0.01)


@pytest.fixture
def busy(make_engine):
    """An engine whose tier takes nothing for the moment."""
    engine = make_engine(num_blocks=40)
    engine.tier.full = True
    return engine


def test_blocks_of_a_busy_moment_reach_the_tier_later(busy):
    keys = make_keys(10, "a")
    serve(busy, keys, "a")
    assert not busy.tier.blocks
    assert [event.reason for event in busy.log.of(CascadeRefused)] == ["throttled"]
    busy.tier.full = False
    go_on(busy)
    assert set(keys) <= busy.tier.blocks.keys()


def test_a_tier_gets_the_part_that_it_did_not_take_once_it_has_written_the_other(make_engine):
    engine = make_engine(num_blocks=100, prefill_rate=1000.0, tokens_per_block=100, measures_prefill=False)
    engine.tier.auto = False
    keys = make_keys(90, "a")
    serve(engine, keys[:10], "first")
    engine.clock.advance(1.0)
    engine.step()
    answer_all(engine)  # ten blocks per second
    serve(engine, keys[10:], "second")
    while engine.tier.waiting:
        engine.clock.advance(1.0)
        answer_all(engine)
    assert [key for job in engine.tier.stores for key in job.keys] == keys
    assert len(engine.tier.stores) > 2


def test_late_blocks_pin_no_more_slots_than_keep_the_tier_busy_between_two_polls(make_engine):
    engine = make_engine(num_blocks=1000, prefill_rate=1000.0, tokens_per_block=10, measures_prefill=False)
    engine.tier.auto = False
    serve(engine, make_keys(100, "first"), "first")
    for _ in range(20):
        engine.clock.advance(0.05)
        engine.step()
    answer_all(engine)  # a hundred blocks per second, for two and a half of which it would take new ones
    serve(engine, make_keys(600, "second"), "second")
    num_new = len(engine.tier.stores[-1].keys)
    engine.clock.advance(2.5)
    before = len(engine.tier.stores)
    answer_all(engine)
    num_late = sum(len(job.keys) for job in engine.tier.stores[before:])
    assert num_new > 200
    assert 0 < num_late < 100


def test_what_memory_has_lost_meanwhile_is_not_stored(busy):
    lost, kept = make_keys(30, "lost"), make_keys(20, "kept")
    serve(busy, lost, "lost")
    serve(busy, kept, "kept")
    assert sum(key in busy.table for key in lost) == 20
    busy.tier.full = False
    go_on(busy)
    assert busy.tier.blocks.keys() == {key for key in [*lost, *kept] if key in busy.table}


def test_a_tier_learns_of_a_requests_end_after_its_last_block(busy):
    told = []
    busy.tier.on_request_finished = lambda context: told.append((context.req_id, len(busy.tier.stores)))
    serve(busy, make_keys(5, "a"), "a")
    serve(busy, [], "nothing")
    assert told == [("nothing", 0)]
    busy.tier.full = False
    go_on(busy)
    assert told[1:] == [("a", len(busy.tier.stores))]
    assert set(make_keys(5, "a")) <= busy.tier.blocks.keys()


def test_a_request_of_the_same_name_takes_nothing_over(busy):
    told, keys = [], make_keys(5, "a")
    busy.tier.on_request_finished = lambda context: told.append(context)
    context = busy.request("a")
    busy.store(keys, context)
    busy.finish(context)
    busy.request("a")
    assert told == [context]
    busy.tier.full = False
    go_on(busy)
    assert not busy.tier.blocks


def test_a_reset_forgets_them(busy):
    keys = make_keys(5, "a")
    serve(busy, keys, "a")
    busy.manager.reset_cache()
    busy.tier.full = False
    go_on(busy)
    assert not busy.tier.stores
    busy.manager.check_invariants()


def test_late_blocks_are_taken_in_order_and_are_bounded(monkeypatch):
    monkeypatch.setattr(late_stores, "MAX_LATE", 12)
    late, table = LateStores(), BlockTable(20, LRUPolicy(20))
    first, second = ReqContext("first"), ReqContext("second")
    keys = make_keys(16)
    table.publish(table.apply(table.plan(keys)))
    late.add(keys[:8], first)
    late.add(keys[8:], second)  # four of the eight find room
    assert len(late) == 12
    table.remove(keys[:3])
    assert late.take(6, table) == (first, keys[3:6])
    assert late.take(6, table) == (first, keys[6:8])
    assert "first" not in late
    assert late.take(6, table) == (second, keys[8:12])
    assert late.take(6, table) is None
    late.check_invariants()
    assert not late


def test_a_call_passes_over_a_bounded_number_of_lost_blocks(monkeypatch):
    monkeypatch.setattr(late_stores, "_MAX_SKIPPED", 4)
    late, table, context = LateStores(), BlockTable(20, LRUPolicy(20)), ReqContext("a")
    keys = make_keys(10)
    table.publish(table.apply(table.plan(keys[8:])))
    late.add(keys, context)
    assert late.take(2, table) is None
    assert late.take(2, table) is None
    assert late.take(2, table) == (context, keys[8:])


def test_what_waits_keeps_a_bounded_part_of_prompts_in_memory(busy, monkeypatch):
    """A tier may stay busy, or down, for hours, and the context of a request knows its whole prompt."""
    monkeypatch.setattr(late_stores, "MAX_PROMPTS", 25)
    told, guard = [], busy.manager._tiers.guards[0]
    busy.tier.on_request_finished = lambda context: told.append(context.req_id)
    for name in "abcde":
        keys, context = make_keys(10, name), busy.request(name)
        for number, key in enumerate(keys):
            context.set_offload_key_position(key, 16 * (number + 1))
        busy.store(keys[:3], context)
        busy.finish(context)
        busy.step()
        busy.manager.check_invariants()
    assert [name in guard.late for name in "abcde"] == [False, False, False, True, True]
    assert told == ["a", "b", "c"]
    assert len(guard._ended_requests) == 2
