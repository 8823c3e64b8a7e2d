"""DESIGN: partial stores, the order of a cascade, admission, recency; and bad input to all of them."""

import pytest
from engine import make_keys, payload

from kvtier.errors import KeyFormatError
from kvtier.events import BlocksEvicted, CascadeRefused, UnexpectedCall
from kvtier.eviction.arc import ARCPolicy
from kvtier.eviction.lru import LRUPolicy
from kvtier.eviction.prefix import PrefixPolicy
from kvtier.keys import OffloadKey, make_offload_key
from kvtier.types import Admission, LookupResult, OffloadPolicy, ReqContext, RequestOffloadingContext, TierFilter

HIT, MISS, PENDING = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING


def test_more_keys_than_slots_stores_the_longest_head(make_engine):
    engine, keys = make_engine(num_blocks=4, num_tiers=0), make_keys(10)
    context = engine.request()
    assert engine.store(keys, context) == keys[:4]
    assert engine.hits(keys, context) == 4


def test_what_is_in_use_bounds_the_head(make_engine):
    engine = make_engine(num_blocks=4, num_tiers=0)
    busy, context = make_keys(3, "busy"), engine.request()
    engine.store(busy, context)
    engine.manager.prepare_load(busy, context)
    assert engine.store(make_keys(3), context) == make_keys(1)
    engine.manager.prepare_load(make_keys(1), context)
    assert engine.manager.prepare_store(make_keys(3), context) is None


def test_the_same_key_twice_in_a_call_counts_once(make_engine):
    engine, (a, b) = make_engine(num_tiers=0), make_keys(2)
    context = engine.request()
    assert engine.store([a, b, a, a], context) == [a, b]
    spec = engine.manager.prepare_load([a, a, b], context)
    assert len(spec.block_ids) == 3
    assert spec.block_ids[0] == spec.block_ids[1]
    engine.manager.complete_load([a, a, b], context)
    engine.step()
    engine.manager.complete_load([a], context)
    engine.step()
    assert engine.store(make_keys(8, "new"), engine.request("new")) == make_keys(8, "new")


def test_blocks_that_are_held_are_skipped_and_not_evicted_for_their_neighbours(make_engine):
    engine, keys = make_engine(num_blocks=4, num_tiers=0), make_keys(4)
    context = engine.request()
    engine.store(keys[:2], context)
    engine.store(make_keys(2, "recent"), engine.request("recent"))
    assert engine.store(keys, context) == keys[2:]
    assert engine.hits(keys, context) == 4


@pytest.mark.parametrize("wrong", [b"", b"1234", b"x" * 69, b"y" * 20, "text" * 9, 7])
def test_a_key_of_another_length_or_type_is_a_clear_error(make_engine, wrong):
    engine = make_engine(num_tiers=0)
    context = engine.request()
    engine.store(make_keys(1), context)
    with pytest.raises(KeyFormatError, match="key"):
        engine.manager.prepare_store([*make_keys(1, "good"), wrong], context)
    engine.step()
    assert len(engine.table) == 1


def test_make_offload_key_refuses_what_it_cannot_hold():
    for block_hash, group in [(b"", 0), (b"x" * 65, 0), (b"x", -1), (b"x", 2**32)]:
        with pytest.raises(KeyFormatError):
            make_offload_key(block_hash, group)


def test_a_request_does_not_evict_what_it_has_found(make_engine):
    engine, keys = make_engine(num_blocks=6, num_tiers=0, policy=FirstHeldFirst), make_keys(8)
    engine.store(keys[:4], engine.request("before"))
    engine.store(make_keys(2, "other"), engine.request("other"))
    context = engine.request()
    assert engine.hits(keys, context) == 4
    engine.load(keys[:4], context)
    assert engine.store(keys[4:], context) == keys[4:6]
    assert engine.hits(keys, context) == 6


def test_nor_what_it_has_stored_before(make_engine):
    engine, keys, context = make_engine(num_blocks=4, num_tiers=0), make_keys(8), ReqContext("r")
    engine.store(keys[:3], context)
    assert engine.store(keys[3:6], context) == keys[3:4]
    assert engine.hits(keys, context) == 4


class FirstHeldFirst(LRUPolicy):
    """Proposes what came first, however often it is used."""

    def touch(self, keys):
        pass


def test_a_finished_requests_blocks_are_settled_by_their_position(make_engine):
    engine, keys = make_engine(num_tiers=0), make_keys(6)
    engine.store(keys[:4], engine.request("before"))
    context = engine.request()
    engine.load(keys[:4], context)
    engine.store(keys[4:5], context)
    engine.store(keys[5:], context)
    other = engine.request("other")
    engine.store(make_keys(2, "other"), other)
    engine.finish(context)
    assert list(engine.table.policy.candidates()) == [*make_keys(2, "other")[::-1], *keys[::-1]]


def test_kv_groups_are_settled_interleaved_by_position(make_engine):
    engine, full, window = make_engine(num_tiers=0), make_keys(4), make_keys(4, group=1)
    context = engine.request()
    for keys in (full, window):
        for index, key in enumerate(keys):
            context.set_offload_key_position(key, 16 * (index + 1))
    engine.store([*full[2:], *window[2:]], context)
    engine.store([*full[:2], *window[:2]], context)
    engine.finish(context)
    order = [key for pair in zip(full, window, strict=True) for key in pair]
    ends = [context.get_offload_key_position(key) for key in engine.table.policy.candidates()]
    assert ends == sorted(ends, reverse=True)
    assert set(engine.table.policy.candidates()) == set(order)


def test_blocks_that_the_engine_has_on_its_device_are_settled_before_those_that_need_them(make_engine):
    engine, keys = make_engine(num_tiers=0), make_keys(5)
    engine.store(keys[:4], engine.request("before"))
    engine.store(make_keys(2, "other"), engine.request("other"))
    context = engine.request()
    for index, key in enumerate([*keys, *make_keys(1, "not computed")]):
        context.set_offload_key_position(key, 16 * (index + 1))
    engine.load(keys[2:4], context)  # the first two are on the device
    engine.store(keys[4:], context)
    engine.finish(context)
    assert list(engine.table.policy.candidates()) == [*make_keys(2, "other")[::-1], *keys[::-1]]


def test_a_store_leaves_what_a_waiting_request_found_in_the_same_step(make_engine):
    engine, keys = make_engine(num_blocks=4), make_keys(3)
    engine.tier.auto = False
    engine.store(keys[:2], engine.request("before"))
    for job in list(engine.tier.waiting):
        engine.tier.finish(job)
    engine.step()
    engine.plant(keys[2:])
    waiting = engine.request("waiting")
    assert engine.scan(keys, waiting) == [HIT, HIT, PENDING]
    assert engine.store(make_keys(4, "new"), engine.request("storer")) == make_keys(2, "new")
    engine.step()
    assert engine.hits(keys, waiting) >= 2


def test_a_block_offered_again_after_a_preemption_is_the_same_use(make_engine):
    engine, keys = make_engine(num_tiers=0, policy=ARCPolicy), make_keys(3)
    context = engine.request()
    engine.store(keys, context)
    for _ in range(3):
        engine.step(preempted=[context.req_id])
        engine.store(keys, context)
    engine.store(make_keys(5, "other"), engine.request("other"))
    assert engine.store(make_keys(1, "new"), engine.request("new"))
    assert engine.hits(keys, context) == 2  # used once, like the others, and older


def test_a_copy_that_failed_is_forgotten(make_engine):
    engine, keys = make_engine(), make_keys(3)
    context = engine.request()
    engine.manager.prepare_store(keys, context)
    engine.manager.complete_store(set(keys), context, success=False)
    assert engine.scan(keys, context) == [MISS]
    assert engine.table.num_free == engine.table.num_slots
    assert not engine.tier.stores


def test_complete_without_prepare_is_counted(make_engine):
    engine, keys = make_engine(), make_keys(3)
    context, stranger = engine.request(), engine.request("stranger")
    engine.manager.complete_store(set(keys), context)
    engine.manager.complete_load(keys, context)
    engine.store(keys, context)
    engine.manager.prepare_load(keys, context)
    engine.manager.complete_load(keys, stranger)  # must not drop the other request's pins
    engine.manager.complete_store(keys, stranger)
    engine.step()
    assert [(e.what, e.times) for e in engine.log.of(UnexpectedCall)] == [
        ("complete_store", 3),
        ("complete_load", 3),
        ("complete_load", 3),
        ("complete_store", 3),
    ]
    assert len(engine.store(make_keys(8, "new"), stranger)) == 5


def test_completions_may_follow_the_requests_end(make_engine):
    engine, keys = make_engine(), make_keys(3)
    context = engine.request()
    engine.manager.prepare_store(keys, context)
    engine.finish(context)
    engine.step()
    assert engine.tier.finished_requests == []  # its stores may still cascade
    engine.manager.complete_store(set(keys), context)
    engine.step()
    assert engine.tier.finished_requests == ["r"]
    assert set(engine.tier.blocks) == set(keys)
    assert len(engine.manager._requests) == 0


def test_a_cascade_keeps_the_order_of_prepare_store(make_engine):
    engine, keys = make_engine(num_blocks=128), make_keys(64)
    context = engine.request()
    output = engine.manager.prepare_store(keys, context)
    engine.manager.complete_store(set(output.keys_to_store[:40]), context)
    engine.manager.complete_store(frozenset(output.keys_to_store[40:]), context)
    assert [list(job.keys) for job in engine.tier.stores] == [keys[:40], keys[40:]]


def test_a_block_is_offered_to_every_tier(make_engine):
    engine, keys = make_engine(num_tiers=3), make_keys(2)
    engine.store(keys, engine.request())
    for tier in engine.tiers:
        assert tier.blocks == {key: payload(key) for key in keys}


def test_each_tier_has_its_own_back_pressure(make_engine):
    engine, keys = make_engine(num_tiers=2), make_keys(2)
    engine.tiers[0].full = True
    engine.store(keys, engine.request())
    assert not engine.tiers[0].stores
    assert engine.tiers[1].stores
    assert engine.log.of(CascadeRefused) == [CascadeRefused("tier0", 2, "throttled")]


def test_a_tier_that_does_not_answer_pins_at_most_half_of_the_primary(make_engine):
    engine = make_engine(num_blocks=16)
    engine.tier.auto = False
    for number in range(12):
        context = engine.request(f"request{number}")
        assert engine.store(make_keys(4, f"prefix{number}"), context), "the primary is pinned"
        engine.step()
    assert sum(len(job.keys) for job in engine.tier.waiting) == 8
    assert {event.reason for event in engine.log.of(CascadeRefused)} == {"throttled"}


def test_a_failed_cascade_is_counted_and_frees_its_pins(make_engine):
    engine, keys = make_engine(num_blocks=2), make_keys(2)
    engine.tier.fail = set(keys)
    context = engine.request()
    engine.store(keys, context)
    engine.step()
    assert engine.manager.get_stats()["cascaded_blocks.tier0"] == 0
    assert engine.store(make_keys(2, "new"), engine.request("new"))


def test_blocks_under_a_cascade_are_not_evicted(make_engine):
    engine, keys = make_engine(num_blocks=4), make_keys(3)
    engine.tier.auto = False
    context = engine.request()
    engine.store(keys, context)
    assert engine.store(make_keys(3, "new"), engine.request("new")) == make_keys(1, "new")
    for job in list(engine.tier.waiting):
        engine.tier.finish(job)
    engine.step()
    assert engine.store(make_keys(3, "newer"), engine.request("newer")) == make_keys(3, "newer")
    assert {key: engine.tier.blocks[key] for key in keys} == {key: payload(key) for key in keys}


def test_second_touch_admits_what_comes_again(make_engine):
    engine, keys = make_engine(admissions=[Admission.SECOND_TOUCH]), make_keys(3)
    context = engine.request()
    engine.store(keys, context)
    engine.manager.touch(keys, context)  # vLLM did so after every store: the same use
    assert not engine.tier.stores
    engine.load(keys[:1], engine.request("b"))
    engine.manager.touch(keys[1:2], engine.request("c"))
    assert [list(job.keys) for job in engine.tier.stores] == [keys[:1], keys[1:2]]
    engine.step()
    engine.store(make_keys(8, "pressure"), engine.request("pressure"))
    engine.step()
    engine.store(keys[2:], context)  # evicted, computed again: that is a second touch, too
    assert list(engine.tier.stores[-1].keys) == keys[2:]
    refused = [event.num_blocks for event in engine.log.of(CascadeRefused) if event.reason == "admission"]
    assert refused == [3, 8]


def test_prompt_only_admits_what_ends_within_the_prompt(make_engine):
    engine, keys = make_engine(admissions=[Admission.PROMPT_ONLY]), make_keys(3)
    context = engine.request(num_prompt_tokens=32)
    for index, key in enumerate(keys):
        context.set_offload_key_position(key, 16 * (index + 1))
    engine.store(keys, context)
    assert [list(job.keys) for job in engine.tier.stores] == [keys[:2]]
    engine.store(make_keys(1, "unknown length"), engine.request("another"))
    assert len(engine.tier.stores) == 2


def test_a_tier_may_ask_for_every_block_of_a_request(make_engine):
    engine, keys = make_engine(), make_keys(3)
    engine.store(keys[:2], engine.request("a"))
    engine.step()
    engine.tier.blocks.clear()
    engine.tier.stores.clear()
    wants_all = RequestOffloadingContext(OffloadPolicy.REQUEST_LEVEL)
    engine.tier.on_new_request = lambda context: wants_all
    context = engine.request("b")
    assert engine.manager.on_new_request(context).policy is OffloadPolicy.REQUEST_LEVEL
    engine.store(keys, context)
    assert set(engine.tier.blocks) == set(keys)


def order(engine) -> list[OffloadKey]:
    return list(engine.table.policy.candidates())


@pytest.mark.parametrize("policy", [LRUPolicy, ARCPolicy])
def test_the_tail_of_a_prefix_goes_first(make_engine, policy):
    engine, keys = make_engine(num_blocks=4, num_tiers=0, policy=policy), make_keys(4)
    engine.store(keys, engine.request("a"))
    engine.store(make_keys(2, "new"), engine.request("b"))
    assert engine.log.of(BlocksEvicted)[0].keys == [keys[3], keys[2]]
    assert engine.hits(keys, engine.request("c")) == 2


@pytest.mark.parametrize("policy", [LRUPolicy, ARCPolicy])
def test_a_prefix_stored_in_several_steps_is_eaten_from_its_end_once_its_request_is_over(make_engine, policy):
    engine, keys = make_engine(num_blocks=6, num_tiers=0, policy=policy), make_keys(6)
    context = engine.request()
    for start in (0, 2, 4):
        engine.store(keys[start : start + 2], context)
        engine.step()
    engine.finish(context)
    assert order(engine) == keys[::-1]


def test_a_store_a_load_and_a_touch_are_uses(make_engine):
    engine = make_engine(num_blocks=6, num_tiers=0)
    context = engine.request()
    for name in "abc":
        engine.store(make_keys(2, name), context)
    assert order(engine) == [*make_keys(2, "a")[::-1], *make_keys(2, "b")[::-1], *make_keys(2, "c")[::-1]]
    engine.load(make_keys(2, "a"), engine.request("loads"))
    engine.manager.touch([*make_keys(2, "b"), *make_keys(2, "never stored")], engine.request("touches"))
    assert order(engine) == [*make_keys(2, "c")[::-1], *make_keys(2, "a")[::-1], *make_keys(2, "b")[::-1]]


def test_uses_are_passed_on_to_tiers(make_engine):
    engine, keys = make_engine(), make_keys(2)
    engine.store(keys, engine.request("stores"))
    engine.manager.touch(keys, engine.request("touches"))
    engine.load(keys, engine.request("loads"))
    assert engine.tier.touched == keys * 2


def test_a_request_uses_a_block_once_however_often_the_engine_says_so(make_engine):
    engine, keys, more = make_engine(num_blocks=8), make_keys(3), make_keys(2, "more")
    engine.store(keys[:2], engine.request("before"))
    used = []
    engine.table.policy.touch = lambda keys, now: used.append([key for key in keys if key in engine.table])
    context = engine.request()
    for _ in range(3):  # a wait: all blocks of the request at every step, held or not
        engine.manager.touch(keys, context)
    engine.load(keys[:2], context)
    engine.store([keys[2], *more], context)
    engine.manager.touch([*keys, *more], context)
    assert [key for some in used for key in some] == keys[:2]
    assert engine.tier.touched == keys
    engine.manager.touch([*keys, *more], engine.request("after"))
    assert used[-1] == [*keys, *more]


def test_a_block_that_came_during_a_wait_is_used_when_it_is_loaded(make_engine):
    engine, keys = make_engine(num_tiers=0), make_keys(2)
    waiting = engine.request("waits")
    engine.manager.touch(keys, waiting)
    engine.store(keys, engine.request("computes them meanwhile"))
    engine.store(make_keys(2, "others"), engine.request("others"))
    engine.load(keys, waiting)
    assert order(engine)[-2:] == keys[::-1]


def test_a_policy_is_told_of_a_key_once_a_call(make_engine):
    engine, keys = make_engine(num_tiers=0, num_blocks=4, policy=PrefixPolicy), make_keys(3)
    context = engine.request()
    engine.store(keys, context)
    engine.manager.touch(keys[:1] * 2, engine.request("twice"))
    engine.manager.touch(keys[:1] * 2, ReqContext("nobody"))
    engine.step()
    engine.store(make_keys(4, "others"), engine.request("others"))
    engine.step()
    engine.store(keys, context)  # preempted and computed again
    engine.finish(context)
    engine.step()


def test_a_use_of_a_block_that_is_being_written_admits_it_once_it_is_ready(make_engine):
    engine, keys = make_engine(admissions=[Admission.SECOND_TOUCH]), make_keys(2)
    context, other = engine.request("stores"), engine.request("waits")
    output = engine.manager.prepare_store(keys, context)
    for _ in range(3):
        engine.manager.touch(keys, other)
        engine.manager.touch(keys, context)
    engine.fill(output.store_spec.block_ids.tolist(), keys)
    engine.manager.complete_store(set(keys), context)
    engine.manager.touch(keys, context)
    assert not engine.tier.stores
    engine.load(keys, other)
    assert [list(job.keys) for job in engine.tier.stores] == [keys]


def test_kv_events_tell_what_entered_and_left_host_memory(make_engine):
    engine, keys = make_engine(num_blocks=2, kv_events=True), make_keys(2)
    context = engine.request()
    engine.store(keys, context)
    engine.step()
    engine.store(make_keys(1, "new"), engine.request("new"))
    engine.step()
    engine.manager.reset_cache()
    events = [(event.removed, event.keys) for event in engine.manager.take_events()]
    assert events[:2] == [(False, keys), (True, keys[1:])]
    assert events[3][0]
    assert set(events[3][1]) == {keys[0], *make_keys(1, "new")}
    assert list(engine.manager.take_events()) == []


def test_pending_work_is_a_live_promotion_or_a_cascade_within_its_deadline(make_engine):
    engine, keys = make_engine(tier_deadline=30.0), make_keys(2)
    engine.tier.auto = False
    assert not engine.manager.has_pending_work()
    context = engine.request("a")
    engine.store(keys, context)
    assert engine.manager.has_pending_work()
    engine.clock.advance(31)
    engine.step()
    assert not engine.manager.has_pending_work()
    engine.tier.finish(engine.tier.waiting[0])
    engine.step()
    engine.clock.advance(60)
    engine.step()
    engine.step()
    engine.plant(make_keys(2, "planted"))
    reader = engine.request("b")
    engine.scan(make_keys(2, "planted"), reader)
    engine.step()
    assert engine.manager.has_pending_work()
    engine.finish(reader)
    assert not engine.manager.has_pending_work()


def test_a_key_twice_in_a_load_ends_with_one_completion(make_engine):
    engine, (a, b) = make_engine(num_tiers=0), make_keys(2)
    context = engine.request()
    engine.store([a, b], context)
    for completions in ([{a, b}], [[a, a, b]], [[b], [a]]):
        assert len(engine.manager.prepare_load([a, a, b], context).block_ids) == 3
        for keys in completions:
            engine.manager.complete_load(keys, context)
    assert not engine.log.of(UnexpectedCall)
    engine.finish(context)
    assert len(engine.manager._requests) == 0
    assert engine.store(make_keys(8, "new"), engine.request("b")) == make_keys(8, "new")


def test_a_second_touch_counts_though_a_key_comes_twice_and_only_once_it_can_be_taken(make_engine):
    engine, keys = make_engine(admissions=[Admission.SECOND_TOUCH]), make_keys(2)
    context = engine.request()
    engine.store(keys, context)
    engine.tier.full = True
    engine.manager.touch(keys[:1] * 2, engine.request("b"))
    assert engine.log.of(CascadeRefused)[-1] == CascadeRefused("tier0", 1, "throttled")
    engine.tier.full = False
    engine.manager.touch(keys[:1] * 2, engine.request("c"))
    assert [list(job.keys) for job in engine.tier.stores] == [keys[:1]]
    engine.step()
    engine.store(make_keys(8, "pressure"), engine.request("pressure"))
    engine.manager.touch(keys[1:], context)  # it is not there to be taken
    engine.store(keys[1:], context)
    assert list(engine.tier.stores[-1].keys) == keys[1:]


def test_a_request_of_an_ended_ones_name_starts_afresh(make_engine):
    engine, keys = make_engine(), make_keys(2)
    ended = engine.request("r", load_tier_filter=TierFilter())
    engine.manager.prepare_store(keys, ended)
    engine.finish(ended)
    engine.plant(make_keys(2, "planted"))
    context = engine.request("r")
    assert engine.tier.finished_requests == ["r"]
    assert engine.wait_hits(make_keys(2, "planted"), context) == 2
    engine.manager.complete_store(set(keys), ended)  # the copy of the ended one
    assert engine.hits(keys, context) == 2
    engine.finish(context)
    assert engine.tier.finished_requests == ["r", "r"]
    assert len(engine.manager._requests) == 0


def test_a_policy_is_told_when_the_request_came(make_engine):
    engine, first, second = make_engine(num_blocks=4), make_keys(2, "first"), make_keys(3, "second")
    told = {"touch": [], "insert": []}
    for name, calls in told.items():
        method = getattr(engine.table.policy, name)
        setattr(
            engine.table.policy, name, lambda keys, now, f=method, c=calls: (c.append((list(keys), now)), f(keys, now))
        )
    early = engine.request("early")
    engine.manager.on_new_request(early)
    same_moment = engine.request("same moment")
    engine.manager.on_new_request(same_moment)
    came = engine.clock()
    engine.clock.advance(5.0)
    engine.store(first, early)
    engine.load(first, early)
    engine.store(second, same_moment)
    assert told["insert"][0] == (first, came)
    assert told["touch"][0] == ([], pytest.approx(came)), "said before victims are asked for"
    (_, later) = told["insert"][1]
    assert came < later < came + 1e-3, "no two requests have the same time"
