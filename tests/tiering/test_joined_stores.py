"""The stores that end in one step reach a tier as one job, if the tier takes such jobs."""

import gc
import weakref

import pytest
from engine import make_keys, payload

from kvtier.events import JobFinished
from kvtier.testing.scripted_tier import ScriptedTier
from kvtier.types import JobResult, OffloadPolicy, RequestOffloadingContext


class JoiningTier(ScriptedTier):
    """Notes the calls about jobs and requests in their order."""

    joins_stores = True

    def __init__(self, view, name="joining"):
        super().__init__(view, name)
        self.calls = []

    def submit_store(self, job_metadata):
        self.calls.append([(context.req_id, keys) for context, keys in job_metadata.by_request()])
        super().submit_store(job_metadata)

    def on_new_request(self, req_context):
        self.calls.append(("new", req_context.req_id))
        return super().on_new_request(req_context)

    def on_request_finished(self, req_context):
        self.calls.append(("end", req_context.req_id))
        super().on_request_finished(req_context)


@pytest.fixture
def engine(make_engine):
    engine = make_engine(num_blocks=16, tiers=lambda view: [JoiningTier(view)])
    engine.step()
    return engine


def test_stores_of_several_requests_that_end_in_one_step_are_one_job(engine):
    one, two = make_keys(2, "one"), make_keys(3, "two")
    first, second = engine.request("first"), engine.request("second")
    engine.store(one, first)
    engine.store(two, second)
    assert not engine.tier.stores
    engine.step()
    (job,) = engine.tier.stores
    assert list(job.by_request()) == [(first, one), (second, two)]
    assert job.keys == [*one, *two]
    assert engine.tier.blocks == {key: payload(key) for key in (*one, *two)}
    engine.step()
    assert [event.num_moved for event in engine.log.of(JobFinished)] == [5]
    assert not engine.manager.has_pending_work()


def test_several_stores_of_one_request_are_a_job_of_that_request(engine):
    context = engine.request("only")
    keys = make_keys(4)
    engine.store(keys[:2], context)
    engine.store(keys[2:], context)
    engine.step()
    (job,) = engine.tier.stores
    assert (job.req_context, job.shares, job.keys) == (context, (), keys)


def test_a_tier_that_does_not_join_gets_each_store_at_once(make_engine):
    engine = make_engine(num_blocks=16)
    engine.step()
    for name in ("first", "second"):
        engine.store(make_keys(2, name), engine.request(name))
    assert [(job.req_context.req_id, job.shares) for job in engine.tier.stores] == [("first", ()), ("second", ())]


def test_a_store_that_waits_for_the_end_of_the_step_keeps_the_engine_stepping(engine):
    engine.store(make_keys(1), engine.request())
    assert engine.manager.has_pending_work()
    engine.clock.advance(3600.0)
    assert engine.manager.has_pending_work()
    engine.step()
    engine.step()
    assert not engine.manager.has_pending_work()
    assert engine.tier.stores
    assert engine.manager.tier_states()["joining"][0].value == "up"


def test_a_store_that_waits_for_the_end_of_the_step_does_not_make_the_loads_of_that_step_late(engine):
    keys = make_keys(2)
    for name, stored in (("first", keys), ("others", make_keys(16, "others"))):
        context = engine.request(name)
        engine.store(stored, context)
        engine.finish(context)
        engine.step()
        engine.step()
    engine.store(make_keys(1, "waits"), engine.request("waits"))
    engine.clock.advance(3600.0)
    engine.tier.auto = False
    engine.scan(keys, engine.request("again"))
    engine.step()
    assert {job.is_promotion for job in engine.tier.waiting} == {True, False}
    assert engine.manager.tier_states()["joining"][0].value == "up"


def test_requests_that_have_ended_are_forgotten_when_their_blocks_are_sent(engine):
    contexts = [engine.request(name) for name in ("first", "second")]
    for context in contexts:
        engine.store(make_keys(2, context.req_id), context)
        engine.finish(context)
    ended = [weakref.ref(context) for context in contexts]
    del context, contexts
    for _ in range(2):
        engine.step()
    engine.tier.stores.clear()
    gc.collect()
    assert [reference() for reference in ended] == [None, None]


def test_blocks_that_wait_for_the_end_of_the_step_are_not_evicted(engine):
    keys = make_keys(16)
    engine.store(keys, engine.request("first"))
    assert engine.manager.prepare_store(make_keys(4, "others"), engine.request("second")) is None
    engine.step()
    engine.step()
    assert len(engine.store(make_keys(4, "others"), engine.request("third"))) == 4
    assert set(engine.tier.blocks) >= set(keys)


def test_a_tier_learns_of_a_requests_end_after_its_last_blocks(engine):
    keys = make_keys(2)
    context = engine.request("over")
    engine.store(keys, context)
    engine.finish(context)
    assert ("end", "over") not in engine.tier.calls
    engine.step()
    assert engine.tier.calls == [("new", "over"), [("over", keys)], ("end", "over")]


def test_a_name_that_is_used_again_in_the_same_step_ends_before_it_begins_anew(engine):
    context = engine.request("again")
    engine.store(make_keys(2), context)
    engine.finish(context)
    engine.request("again")
    assert engine.tier.calls == [("new", "again"), ("end", "again"), ("new", "again")]
    engine.step()
    assert engine.tier.calls.count(("end", "again")) == 1


def test_the_stores_of_a_step_do_not_pass_the_tiers_own_limit(make_engine):
    class Limited(JoiningTier):
        """Takes any job while it has none, else up to 8 blocks."""

        def can_store(self, num_blocks):
            waiting = sum(len(job.keys) for job in self.waiting)
            return not waiting or waiting + num_blocks <= 8

    engine = make_engine(num_blocks=64, said_bytes=16 << 20, tiers=lambda view: [Limited(view)])
    engine.step()
    engine.tier.auto = False
    for index in range(10):
        engine.store(make_keys(2, str(index)), engine.request(str(index)))
    engine.step()
    assert sum(len(job.keys) for job in engine.tier.stores) == 8
    assert len(engine.tier.stores) < 4


@pytest.mark.parametrize("method", ["submit_store", "can_store"])
def test_a_refused_job_leaves_no_pin(engine, method):
    engine.store(make_keys(4, "a"), engine.request("a"))
    engine.tier.raising.add(method)
    engine.store(make_keys(4, "b"), engine.request("b"))
    engine.step()
    engine.step()
    assert len(engine.store(make_keys(16, "new"), engine.request("new"))) == 16


def test_a_result_for_a_job_that_the_tier_did_not_get_is_not_believed(engine):
    context = engine.request()
    engine.store(make_keys(2, "earlier"), context)
    engine.step()
    (earlier,) = engine.tier.stores
    engine.step()
    engine.store(make_keys(2), context)
    engine.tier.results.append(JobResult(earlier.job_id + 1, True))
    engine.manager.tier_states()  # polls
    engine.manager.check_invariants()
    engine.step()
    engine.step()
    assert set(engine.tier.blocks) >= set(make_keys(2))
    assert not engine.manager.has_pending_work()


def test_the_blocks_of_the_last_step_reach_the_tier_at_a_shutdown_and_at_a_reset(engine):
    engine.store(make_keys(2, "reset"), engine.request("first"))
    engine.manager.reset_cache()
    engine.manager.check_invariants()
    assert [job.keys for job in engine.tier.stores] == [make_keys(2, "reset")]
    engine.step()
    engine.store(make_keys(2, "end"), engine.request("second"))
    engine.manager.shutdown()
    assert [job.keys for job in engine.tier.stores] == [make_keys(2, "reset"), make_keys(2, "end")]


def test_a_tier_that_wants_whole_requests_gets_the_blocks_that_are_held(make_engine):
    class Whole(JoiningTier):
        def on_new_request(self, req_context):
            return RequestOffloadingContext(OffloadPolicy.REQUEST_LEVEL)

    engine = make_engine(num_blocks=16, tiers=lambda view: [Whole(view)])
    engine.step()
    keys = make_keys(4)
    engine.store(keys[:2], engine.request("first"))
    engine.step()
    engine.step()
    second = engine.request("second")
    engine.store(keys, second)
    engine.step()
    assert [(job.req_context, job.keys) for job in engine.tier.stores[1:]] == [(second, keys)]
