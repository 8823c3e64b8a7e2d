"""Transit: what the policy declines passes through a few slots, on its way to the tiers below."""

import pytest
from engine import make_keys

from kvtier.eviction.lru import LRUPolicy
from kvtier.types import Admission


class ContentPolicy(LRUPolicy):
    """Values what it holds above all that comes, but for the blocks in `low`."""

    low: tuple = ()

    def candidates(self, incoming=()):
        if not incoming or not self.may_decline:
            return super().candidates(incoming)
        return iter([key for key in self.low if key in self])


@pytest.fixture
def engine(make_engine):
    """40 slots, full of blocks that rank above all that comes; two may be in transit."""
    engine = make_engine(num_blocks=40, policy=ContentPolicy)
    context = engine.request("first")
    engine.first = make_keys(40, "first")
    engine.store(engine.first, context)
    engine.finish(context)
    engine.step()
    return engine


def num_first(engine):
    return sum(key in engine.table for key in engine.first)


def serve(engine, name, count=2, finish=True):
    context = engine.request(name)
    stored = engine.store(make_keys(count, name), context)
    if finish:
        engine.finish(context)
    engine.manager.check_invariants()
    return stored


def test_declined_blocks_reach_the_tier_and_cost_memory_no_more_than_two_slots(engine):
    for number in range(20):
        assert serve(engine, f"new {number}") == make_keys(2, f"new {number}")
        engine.step()
    assert all(set(make_keys(2, f"new {number}")) <= engine.tier.blocks.keys() for number in range(20))
    assert num_first(engine) == 38


def test_the_blocks_of_lowest_rank_make_the_first_room(engine):
    low = engine.first[-2:]
    serve(engine, "new")
    assert not any(key in engine.table for key in low)


def test_transit_is_refused_while_a_tier_reads_the_blocks_in_transit(engine):
    engine.tier.auto = False
    assert len(serve(engine, "a", 1)) == 1
    assert len(serve(engine, "b", 5)) == 0  # a tier still reads the block of "a", and all others rank above
    assert num_first(engine) == 39
    for job in list(engine.tier.waiting):
        engine.tier.finish(job)
    engine.step()
    assert serve(engine, "c", 5) == make_keys(1, "c")
    assert num_first(engine) == 39
    engine.tier.auto = True


def test_what_no_tier_would_take_now_uses_no_slot_in_transit(engine):
    engine.tier.full = True
    assert serve(engine, "a") == []
    engine.step()
    assert num_first(engine) == 40
    engine.tier.full = False
    assert serve(engine, "b") == make_keys(2, "b")


def test_transit_waits_for_every_tier_that_wants_the_block(make_engine):
    engine = make_engine(num_blocks=40, num_tiers=2, policy=ContentPolicy)
    context = engine.request("first")
    engine.store(make_keys(40, "first"), context)
    engine.finish(context)
    engine.step()
    engine.tiers[1].auto = False
    assert len(serve(engine, "a")) == 2
    engine.step()
    assert serve(engine, "b") == []
    for job in list(engine.tiers[1].waiting):
        engine.tiers[1].finish(job)
    engine.step()
    assert len(serve(engine, "b")) == 2
    engine.tiers[1].auto = True


def test_a_prompt_longer_than_transit_passes_step_by_step(engine):
    """A request evicts none of its own blocks, except those in transit."""
    context, keys = engine.request("long"), make_keys(20, "long")
    for start in range(0, 20, 2):
        assert engine.store(keys[start : start + 2], context) == keys[start : start + 2]
        engine.step()
    engine.finish(context)
    assert set(keys) <= engine.tier.blocks.keys()
    assert num_first(engine) == 38


def test_a_block_in_transit_that_is_used_again_stays(engine):
    serve(engine, "a")
    engine.step()
    context, keys = engine.request("again"), make_keys(2, "a")
    assert engine.hits(keys, context) == 2
    engine.load(keys, context)
    engine.finish(context)
    for number in range(4):
        serve(engine, f"new {number}")
        engine.step()
    assert all(key in engine.table for key in keys)
    assert num_first(engine) == 36


def test_blocks_of_lower_rank_give_way_and_blocks_of_higher_rank_do_not(engine):
    engine.table.policy.low = tuple(engine.first[10:13])
    assert serve(engine, "a", 10) == make_keys(3, "a")
    engine.step()
    assert num_first(engine) == 37
    assert serve(engine, "b", 10) == make_keys(2, "b")  # the last two of "a" were in transit
    assert num_first(engine) == 37
    assert [key in engine.table for key in make_keys(3, "a")] == [True, False, False]


def test_a_block_that_finds_no_slot_because_a_victim_is_in_use_is_not_declined(engine):
    engine.table.policy.low = tuple(engine.first[:3])
    used = engine.request("uses a victim")
    engine.manager.prepare_load(engine.first[:1], used)
    assert serve(engine, "a", 5) == make_keys(2, "a")  # three victims proposed, one of them in use; two declined
    engine.manager.complete_load(set(engine.first[:1]), used)
    engine.step()
    assert [key in engine.table.transit.keys for key in make_keys(2, "a")] == [True, True]
    engine.table.policy.low = tuple(engine.first[3:7])
    engine.manager.prepare_load(engine.first[3:5], used)
    assert serve(engine, "b", 5) == make_keys(4, "b")  # two victims, the two in transit; one declined
    assert list(engine.table.transit.keys) == make_keys(4, "b")[3:]
    engine.manager.complete_load(set(engine.first[3:5]), used)


@pytest.fixture
def measured(make_engine):
    """Return a function that makes an engine, full of blocks that rank above all that comes.

    It computes 16 blocks in 0.4 s. Its tier was seen to load them in the time given.
    """

    def make(load_seconds):
        engine = make_engine(num_blocks=40, policy=ContentPolicy, tokens_per_block=256, prefill_rate=10_000.0)
        engine.tier.auto = False
        keys, context = make_keys(16, "measured"), engine.request("measured")
        engine.plant(keys)
        engine.scan(keys, context)
        for _ in range(round(load_seconds / 0.01)):
            engine.step()
            engine.clock.advance(0.01)
        for job in list(engine.tier.waiting):
            engine.tier.finish(job)
        engine.finish(context)
        engine.step()
        engine.tier.auto = True
        engine.first = make_keys(40, "first")
        engine.store(engine.first, engine.request("first"))
        engine.step()
        return engine

    return make


@pytest.mark.parametrize(("load_seconds", "stored"), [(4.0, 2), (0.3, 10), (0.01, 10)])
def test_memory_refuses_nothing_above_a_tier_that_is_quicker_than_computing(measured, load_seconds, stored):
    """There, what is declined beyond transit would never reach the tier."""
    assert len(serve(measured(load_seconds), "new", 10)) == stored


def test_above_a_quick_tier_the_tail_that_ranks_lowest_gives_way_first(measured):
    engine = measured(0.3)
    serve(engine, "new", 10)
    engine.step()
    assert list(engine.table.transit.keys) == make_keys(10, "new")[:7:-1]
    assert num_first(engine) == 30
    serve(engine, "other", 2)
    assert num_first(engine) == 30
    assert [key in engine.table for key in make_keys(10, "new")] == [True] * 8 + [False] * 2


def test_a_block_in_transit_is_the_next_victim_of_a_load(engine):
    planted = make_keys(2, "planted")
    serve(engine, "a")
    engine.plant(planted)
    engine.step()
    context = engine.request("load")
    assert engine.wait_hits(planted, context) == 2
    assert num_first(engine) == 38
    assert not any(key in engine.table for key in make_keys(2, "a"))


def test_without_a_tier_declined_blocks_are_not_stored(make_engine):
    engine = make_engine(num_blocks=40, num_tiers=0, policy=ContentPolicy)
    first = make_keys(40, "first")
    engine.store(first, engine.request("first"))
    assert engine.manager.prepare_store(make_keys(2, "a"), engine.request("a")) is None
    assert all(key in engine.table for key in first)


def test_a_policy_that_declines_nothing_puts_nothing_in_transit(make_engine):
    engine = make_engine(num_blocks=8, policy=LRUPolicy)
    context = engine.request("long")
    assert engine.store(make_keys(12, "long"), context) == make_keys(8, "long")
    assert engine.store(make_keys(12, "long")[8:], context) == []
    assert not engine.table.transit.keys


@pytest.mark.parametrize("admission", list(Admission))
def test_a_block_that_no_tier_wants_leaves_at_once(make_engine, admission):
    engine = make_engine(num_blocks=40, policy=ContentPolicy, admissions=[admission])
    engine.store(make_keys(40, "first"), engine.request("first"))
    engine.step()
    for number in range(5):
        assert len(serve(engine, f"new {number}")) == 2
        engine.step()


def test_a_reset_ends_transit(engine):
    serve(engine, "a")
    engine.manager.reset_cache()
    engine.manager.check_invariants()
    assert not engine.table.transit.keys


def test_what_a_load_brings_is_not_in_transit(make_engine):
    """All but one of the held blocks are kept for a time, so the policy has one victim for two blocks."""
    engine = make_engine(num_blocks=40, retain_share=0.975)
    context = engine.request("kept", kv_transfer_params={"kvtier": {"retain": "10m"}})
    engine.store(make_keys(40, "kept"), context)
    engine.finish(context)
    engine.step()
    keys = make_keys(2, "planted")
    engine.plant(keys)
    context = engine.request("load")
    assert engine.wait_hits(keys, context) == 1
    assert sum(key in engine.table for key in make_keys(40, "kept")) == 39
    assert not engine.table.transit.keys
