"""Which queued load a tier gets next: what saves most per block, and nothing waits longer than its own deadline."""

import pytest
from engine import make_keys

from kvtier.tiering.load_queue import LoadQueue
from kvtier.tiering.requests import RequestState
from kvtier.types import LookupResult, ReqContext

HIT, PENDING = LookupResult.HIT, LookupResult.HIT_PENDING


def make_queue(*loads, block_bytes=1 << 20):
    """A queue of (name, blocks, gain, due) for a tier that has not been asked for anything."""
    queue = LoadQueue(None, block_bytes)
    for arrival, (name, count, gain, due) in enumerate(loads):
        state = RequestState(ReqContext(name), float(arrival))
        keys = make_keys(count, name)
        state.awaiting.update(keys)
        queue.add(keys, state, gain, due)
    return queue


def order(queue, now):
    queue.arrange((), now)
    return [load.state.context.req_id for load in queue.loads]


def test_the_load_that_saves_most_per_block_goes_first():
    queue = make_queue(("long", 100, 5.0, 9.0), ("short", 4, 1.0, 9.0), ("dear", 10, 2.0, 9.0))
    assert order(queue, now=0.0) == ["short", "dear", "long"]


def test_no_load_is_overtaken_for_longer_than_its_own_deadline():
    queue = make_queue(("late", 100, 1.0, 3.0), ("later", 100, 0.5, 2.0), ("better", 4, 9.0, 99.0))
    assert order(queue, now=1.0) == ["better", "late", "later"]
    assert order(queue, now=2.5) == ["later", "better", "late"]
    assert order(queue, now=3.5) == ["later", "late", "better"]


def test_a_request_s_loads_keep_the_order_of_its_prompt_though_later_blocks_save_more():
    queue = make_queue(("long", 10, 2.0, 9.0), ("short", 10, 3.0, 9.0))
    long = queue.loads[0].state
    later = make_keys(10, "behind")
    queue.add(later, long, gain=9.0, due=5.0)
    assert order(queue, now=0.0) == ["short", "long", "long"]
    assert order(queue, now=7.0) == ["short", "long", "long"]
    assert queue.loads[2].keys == later


def test_what_is_before_whom_is_counted_when_a_tier_has_been_asked():
    queue = make_queue(("first", 64, 9.0, 9.0), ("second", 10, 1.0, 9.0))
    queue.arrange((), 0.0)
    first, second = queue.loads
    assert queue.num_queued == 74
    taken = queue.take(first)
    queue.note_sent()
    assert queue.num_queued == 74 - len(taken)
    assert queue.num_up_to(first.state) == 64 - len(taken)
    assert queue.num_up_to(second.state) == 74 - len(taken)
    assert queue.num_up_to(RequestState(ReqContext("unknown"), 9.0)) == 0


def test_what_one_request_gave_up_stays_for_those_who_wait_for_it_too():
    queue = make_queue(("leaves", 8, 1.0, 9.0))
    keys = list(queue.loads[0].keys)
    queue.loads[0].state.awaiting.clear()
    queue.arrange(set(keys[:3]), 0.0)
    assert queue.loads[0].keys == keys[:3]


@pytest.mark.parametrize("num_requests", [2, 5])
def test_a_prefix_that_requests_share_is_read_once_however_much_of_it_is_queued(make_engine, num_requests):
    shared = make_keys(40, "shared")
    engine = make_engine(num_blocks=512)
    engine.tier.auto = False
    prompts = [[*shared, *make_keys(10, f"own {number}")] for number in range(num_requests)]
    contexts = [engine.request(f"r{number}") for number in range(num_requests)]
    for keys in prompts:
        engine.plant(keys)
    for keys, context in zip(prompts, contexts, strict=True):  # in one step, and again in the next
        assert engine.scan(keys, context) == [PENDING] * 50
    engine.step()
    for keys, context in zip(prompts, contexts, strict=True):
        assert engine.scan(keys, context) == [PENDING] * 50
    engine.finish(contexts[0])  # the one for which the shared blocks were queued
    for _ in range(20):
        engine.step()
        for job in list(engine.tier.waiting):
            engine.tier.finish(job)
    read = [key for job in engine.tier.loads for key in job.keys]
    assert len(read) == len(set(read))
    for keys, context in zip(prompts[1:], contexts[1:], strict=True):
        assert engine.hits(keys, context) == 50
