"""A step plans a bounded number of blocks, however long a prompt is and however many requests wait."""

import gc
import weakref

import pytest
from engine import BLOCK_BYTES, make_keys, payload

from kvtier.events import RequestGaveUp
from kvtier.tiering import cascades
from kvtier.tiering.outline import MANY_KEYS, split_scan
from kvtier.tiering.promotion import MAX_ASKED, MAX_PLANNED
from kvtier.tiering.waiting import MAX_ENDED
from kvtier.types import LookupResult

HIT, MISS, PENDING = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING


def num_asked(tier, first=0):
    return sum(len(job.keys) for job in tier.loads[first:])


def test_a_long_prompt_is_planned_step_by_step_and_looked_up_once(make_engine):
    keys = make_keys(3000)
    engine = make_engine(num_blocks=4096)
    engine.plant(keys)
    context = engine.request()
    assert engine.scan(keys, context) == [PENDING] * 3000
    num_steps = 0
    while not num_steps or engine.manager.is_still_deferred(keys[0], context):
        num_jobs = len(engine.tier.loads)
        engine.step()
        num_steps += 1
        assert num_asked(engine.tier, num_jobs) <= MAX_ASKED + 64
        assert num_steps < 100
    assert num_steps >= 3000 // MAX_PLANNED
    assert [key for job in engine.tier.loads for key in job.keys] == keys  # head first
    assert engine.hits(keys, context) == 3000
    assert engine.load(keys, context) == [payload(key) for key in keys]


def test_a_request_that_ends_before_it_is_planned_is_forgotten_at_once(make_engine):
    long_prompt, short_prompt = make_keys(2 * MAX_PLANNED, "long"), make_keys(8, "short")
    engine = make_engine(num_blocks=4096)
    engine.plant([*long_prompt, *short_prompt])
    first, second = engine.request("first"), engine.request("second")
    engine.scan(short_prompt, second)
    engine.scan(long_prompt, first)
    engine.step()
    assert not any(key in short_prompt for job in engine.tier.loads for key in job.keys)
    engine.finish(second)
    is_held = weakref.ref(second)
    del second
    gc.collect()
    assert not is_held()


def test_what_a_slow_tier_is_to_bring_is_planned_as_it_arrives(make_engine):
    keys = make_keys(3000)
    engine = make_engine(num_blocks=4096)
    engine.plant(keys)
    engine.tier.auto = False
    context = engine.request()
    engine.scan(keys, context)
    for _ in range(20):
        engine.step()
        assert engine.manager.is_still_deferred(keys[0], context)
    assert num_asked(engine.tier) <= 2 * MAX_PLANNED
    engine.manager.on_request_finished(context)  # gives up what waits, which is little
    engine.step()
    assert not engine.manager.has_pending_work()


def test_the_oldest_requests_are_planned_first_and_the_others_in_the_next_steps(make_engine):
    engine = make_engine(num_blocks=4096)
    prompts = [make_keys(200, f"prompt {number}") for number in range(8)]
    contexts = [engine.request(f"r{number}") for number in range(8)]
    for keys in prompts:
        engine.plant(keys)
    for keys, context in reversed(list(zip(prompts, contexts, strict=True))):
        assert engine.scan(keys, context) == [PENDING] * 200
    order = []
    for _ in range(20):
        num_jobs = len(engine.tier.loads)
        engine.step()
        assert num_asked(engine.tier, num_jobs) <= MAX_ASKED + 64
        order += [job.req_context.req_id for job in engine.tier.loads[num_jobs:]]
    assert list(dict.fromkeys(order)) == [context.req_id for context in contexts]
    for keys, context in zip(prompts, contexts, strict=True):
        assert engine.hits(keys, context) == 200


def test_a_prompt_whose_middle_fails_is_looked_up_again_at_once(make_engine):
    keys = make_keys(1200)
    engine = make_engine(num_blocks=4096)
    engine.plant(keys)
    engine.tier.fail = {keys[700]}
    context = engine.request()
    assert engine.wait_hits(keys, context, steps=100) == 700


def test_a_prompt_that_has_grown_is_planned_behind_what_it_has(make_engine):
    keys = make_keys(900)
    engine = make_engine(num_blocks=4096)
    engine.plant(keys[:600])
    engine.tier.auto = False
    context = engine.request()
    engine.scan(keys, context)
    for _ in range(4):
        engine.step()
    engine.plant(keys[600:])
    engine.tier.auto = True
    for job in list(engine.tier.waiting):
        engine.tier.finish(job)
    assert engine.wait_hits(keys, context, steps=100) == 900
    assert num_asked(engine.tier) == 900  # nothing is read twice


def test_what_gives_way_in_the_middle_of_a_waiting_prompt_is_planned_again(make_engine):
    keys = make_keys(7)
    engine = make_engine(num_blocks=8, promotion_budget=0.5)
    engine.store(keys[:6], engine.request("stores"))
    engine.step()
    engine.plant(keys)
    engine.tier.auto, engine.tier.full = False, True
    other = engine.request("holds the sixth, awaits the seventh")
    assert engine.scan(keys[5:], other) == [HIT, PENDING]
    engine.step()
    context = engine.request("waits")
    assert engine.scan(keys, context) == [HIT] * 6 + [PENDING]  # there is room to lease two, and the sixth
    engine.step()
    while engine.table.is_ready(keys[2]):
        engine.store(make_keys(1, f"evicts {len(engine.log.events)}"), engine.request("evicts"))
    for _ in range(3):
        answers = engine.scan(keys, context)
        engine.step()
    assert MISS in answers  # it has no room for what it has lost, and must not wait for what nobody brings


def test_groups_of_a_long_scan_are_found_without_a_look_at_each_key():
    full, window = make_keys(MANY_KEYS, group=0), make_keys(100, group=1)[::-1]
    assert split_scan([*full, *window]) == [full, window]
    assert split_scan(full + full[:10]) == [full[:10]]  # it has started over
    assert split_scan([*full, *window, *full[:10]]) == [full[:10], window]


def test_a_request_whose_turn_is_far_leaves_room_for_those_before_it(make_engine):
    engine = make_engine(num_blocks=100, prefill_rate=100.0, tokens_per_block=10, measures_prefill=False)
    computed, near, far = (make_keys(40, name) for name in ("computed", "near", "far"))
    engine.plant([*near, *far])
    contexts = [engine.request(name, num_prompt_tokens=400) for name in ("first", "second", "third")]
    assert engine.scan(computed, contexts[0]) == [MISS]  # four seconds to compute
    for keys, context in ((near, contexts[1]), (far, contexts[2])):
        assert engine.scan(keys, context) == [PENDING] * 40
    for _ in range(3):
        engine.step()
    assert num_asked(engine.tier) == 40
    engine.clock.advance(3.0)
    engine.step()
    assert engine.manager.is_still_deferred(far[0], contexts[2])
    engine.finish(contexts[0])
    assert engine.load(near, contexts[1]) == [payload(key) for key in near]
    for _ in range(3):
        engine.step()
    assert num_asked(engine.tier) == 80  # its turn is near
    assert engine.hits(far, contexts[2]) == 40


def test_blocks_wait_to_be_written_no_longer_than_they_would_stay_in_any_case(make_engine):
    engine = make_engine(num_blocks=100, prefill_rate=1000.0, tokens_per_block=100, measures_prefill=False)
    engine.tier.auto = False
    engine.store(make_keys(10, "first"), engine.request("first"))
    engine.clock.advance(1.0)
    engine.step()
    engine.tier.finish(engine.tier.stores[0])
    engine.step()  # 10 blocks per second, of which memory holds 100 and the engine computes as many
    engine.store(make_keys(60, "second"), engine.request("second"))
    assert [len(job.keys) for job in engine.tier.stores] == [10, 25]


def test_a_tier_of_unknown_speed_keeps_little_of_memory(make_engine, monkeypatch):
    monkeypatch.setattr(cascades, "_EXPECTED_BANDWIDTH", 14.0 * BLOCK_BYTES)
    engine = make_engine(num_blocks=100, prefill_rate=100_000.0, tokens_per_block=512)
    engine.tier.auto = False
    engine.store(make_keys(60, "a"), engine.request("a"))
    assert [len(job.keys) for job in engine.tier.stores] == [7]  # half a second
    engine.clock.advance(0.05)
    engine.tier.finish(engine.tier.stores[0])
    engine.step()  # far faster than that
    engine.store(make_keys(30, "b"), engine.request("b"))
    assert sum(len(job.keys) for job in engine.tier.stores) >= 37


def test_when_many_deadlines_pass_at_once_the_youngest_requests_wait_a_step_longer(make_engine):
    engine = make_engine(num_blocks=4096, load_deadline=2.0)
    engine.tier.auto = False
    for number in range(30):
        keys, context = make_keys(100, f"prompt {number}"), engine.request(f"r{number}")
        engine.plant(keys)
        engine.scan(keys, context)
    for _ in range(10):
        engine.step()
    engine.clock.advance(2.1)
    counts = []
    for _ in range(3):
        engine.step()
        counts.append([event.req_id for event in engine.log.of(RequestGaveUp)])
    assert counts[0] == [f"r{number}" for number in range(len(counts[0]))]
    assert len(counts[0]) * 100 <= MAX_ENDED + 100
    assert len(counts[-1]) == 30


def test_a_pause_of_the_engine_is_not_the_time_that_a_tier_took(make_engine):
    engine = make_engine(num_blocks=100, prefill_rate=1000.0, tokens_per_block=100, measures_prefill=False)
    for num_blocks in (1, 1, 1, 40):
        keys, context = make_keys(num_blocks, f"{engine.clock()}"), engine.request(f"{engine.clock()}")
        assert engine.scan(keys, context)[0] is MISS
        engine.step()
        engine.store(keys, context)
        engine.finish(context)
        engine.clock.advance(60.0)  # nobody asks, and nobody polls
    assert [len(job.keys) for job in engine.tier.stores] == [1, 1, 1, 40]


def answer_loads(engine, seconds=0.005):
    engine.clock.advance(seconds)
    for job in list(engine.tier.waiting):
        if job.is_promotion:
            engine.tier.finish(job)


def ask(engine, keys, context, looks_again):
    """Look up until nothing is on its way; return the hits. `looks_again`: in each step, as for transformers models."""
    for step in range(400):
        if looks_again or not step or not engine.manager.is_still_deferred(keys[0], context):
            num_hits, num_pending = engine.manager.lookup_prefix(keys, context)
            if not num_pending:
                return num_hits
        engine.step()
        answer_loads(engine)
    raise AssertionError("nothing came")


@pytest.mark.parametrize("looks_again", [False, True])
def test_the_rest_of_a_prompt_does_not_push_out_its_head(make_engine, looks_again):
    engine = make_engine(num_blocks=2000, tokens_per_block=16, prefill_rate=10000.0)
    engine.tier.auto, engine.tier.full = False, True  # what is stored stays in memory alone
    keys = make_keys(900, "prompt")
    for name, some in [
        ("first", keys[:600]),
        *((f"other {number}", make_keys(100, f"{number}")) for number in range(14)),
    ]:
        context = engine.request(name)
        engine.store(some, context)
        engine.finish(context)
        engine.step()
    engine.plant(keys[600:])
    assert ask(engine, keys, engine.request("again"), looks_again) == 900


@pytest.mark.parametrize("num_blocks", [500, 4096, 6000])
@pytest.mark.parametrize("looks_again", [False, True])
def test_a_step_that_has_planned_much_still_plans_whole_windows(make_engine, num_blocks, looks_again):
    engine = make_engine(num_blocks=14000, tokens_per_block=16, prefill_rate=10000.0)
    engine.tier.auto = False
    for number in range(6):  # the tier's speed is measured
        keys = make_keys(64, f"{number}")
        engine.plant(keys)
        assert ask(engine, keys, engine.request(f"{number}"), looks_again) == 64
    beside, keys = make_keys(400, "beside"), make_keys(num_blocks, "long")
    engine.plant([*beside, *keys])
    engine.manager.lookup_prefix(beside, engine.request("beside"))
    assert ask(engine, keys, engine.request("long"), looks_again) == num_blocks


def test_a_step_looks_at_few_of_the_requests_whose_turn_is_far(make_engine, monkeypatch):
    engine = make_engine(num_blocks=2000, tokens_per_block=256, prefill_rate=10000.0)
    engine.tier.auto = False
    for number in range(1000):
        keys = make_keys(20, f"{number}")
        engine.plant(keys)
        engine.manager.lookup_prefix(keys, engine.request(f"r{number}"))
    promoter = engine.manager._promoter
    looks = []
    monkeypatch.setattr(promoter, "_promote", lambda state, *rest: looks.append(state))
    engine.step()
    assert len(looks) <= MAX_PLANNED // 4
