"""Whatever a tier does, the engine's thread sees a miss, no slot leaks, and the log says it once."""

import logging

import pytest
from engine import Engine, make_keys, payload

from kvtier.events import BlocksFailed, TierState, TierStateChanged, UnexpectedCall
from kvtier.testing.patience import wait_for
from kvtier.testing.scripted_tier import ScriptedTier
from kvtier.types import FailureCause, JobResult, LookupResult

MISS = LookupResult.MISS
METHODS = [
    "lookup",
    "submit_store",
    "submit_load",
    "get_finished_jobs",
    "can_store",
    "touch",
    "state",
    "on_request_finished",
    "drain_jobs",
    "start_epoch",
    "shutdown",
]


def exercise(engine: Engine, rounds: int = 20) -> None:
    """Traffic with resets and evictions; loads are verified by `run`."""
    for number in range(rounds):
        engine.run(make_keys(5, f"prefix{number % 3}"), f"request{number}")
        engine.clock.advance(0.5)
        if number % 7 == 6:
            engine.manager.reset_cache()
            engine.step()


@pytest.mark.parametrize("methods", [*[[method] for method in METHODS], METHODS])
def test_a_tier_that_raises(make_engine, caplog, methods):
    engine = make_engine(drain_timeout=1.0)
    engine.plant(make_keys(5, "prefix0"))
    engine.tier.raising = set(methods)
    with caplog.at_level(logging.WARNING, "kvtier"):
        exercise(engine)
    engine.manager.shutdown()
    engine.manager.check_invariants()
    assert engine.table.num_quarantined == 0
    downs = [record for record in caplog.records if "tier tier0 is down" in record.message]
    assert len(downs) <= 2, "said once, not at every retry"


def test_a_tier_that_recovers_is_used_again_and_both_changes_are_said(make_engine):
    engine, keys = make_engine(), make_keys(3)
    engine.plant(keys)
    engine.tier.raising = {"lookup"}
    assert engine.scan(keys, engine.request("a")) == [MISS]
    engine.tier.raising = set()
    assert engine.scan(keys, engine.request("b")) == [MISS]  # left alone for a while
    for _ in range(4):
        engine.clock.advance(5)
        engine.step()
    assert engine.wait_hits(keys, engine.request("c")) == 3
    assert [event.state for event in engine.log.of(TierStateChanged)] == [TierState.DOWN, TierState.UP]


def test_a_tier_that_never_answers_is_left_alone_until_it_does(make_engine):
    engine = make_engine(num_blocks=8, load_deadline=2.0, tier_deadline=10.0)
    engine.tier.auto = False
    stored = make_keys(3, "stored")
    engine.store(stored, engine.request("storer"))
    engine.clock.advance(11)
    engine.step()
    engine.plant(make_keys(2, "planted"))
    assert engine.scan(make_keys(2, "planted"), engine.request("a")) == [MISS]  # costs nothing
    engine.store(make_keys(2, "more"), engine.request("b"))
    assert len(engine.tier.stores) == 1
    engine.tier.finish(engine.tier.waiting[0])
    engine.tier.auto = True
    for _ in range(4):
        engine.clock.advance(40)
        engine.step()
    assert engine.wait_hits(make_keys(2, "planted"), engine.request("c")) == 2


def test_a_tier_that_says_itself_that_it_is_down_is_not_said_to_be_down_again(make_engine):
    engine = make_engine(num_blocks=8, tier_deadline=10.0)
    engine.tier.auto = False
    engine.store(make_keys(3, "stored"), engine.request("storer"))
    engine.tier.current_state = TierState.DOWN  # a real tier has sent its own event by now
    for _ in range(3):
        engine.clock.advance(11)
        engine.step()
    engine.tier.current_state = TierState.UP
    engine.tier.finish(engine.tier.waiting[0])
    for _ in range(6):
        engine.clock.advance(40)
        engine.step()
    assert engine.manager.tier_states()["tier0"] == (TierState.UP, "")
    assert engine.log.of(TierStateChanged) == []


def queued_stores(engine, count):
    engine.tier.auto = False
    for number in range(count):
        engine.store(make_keys(1, f"job {number}"), engine.request(f"storer {number}"))
    assert len(engine.tier.stores) == count


def test_a_queue_that_moves_is_not_overdue_however_long_it_is(make_engine):
    engine = make_engine(num_blocks=32, tier_deadline=30.0)
    queued_stores(engine, 10)
    for _ in range(10):
        engine.clock.advance(20)
        engine.step()
        assert engine.manager.has_pending_work()
        engine.tier.finish(engine.tier.waiting[0])
        engine.step()
    assert not engine.log.of(TierStateChanged)
    assert not engine.manager.has_pending_work()


def test_a_long_job_of_which_parts_are_done_is_not_overdue(make_engine):
    class PartsTier(ScriptedTier):
        progress = 0

    engine = make_engine(tiers=lambda view: [PartsTier(view)], tier_deadline=30.0)
    queued_stores(engine, 1)
    for _ in range(10):
        engine.clock.advance(20)
        engine.tier.progress += 1
        engine.step()
    assert not engine.log.of(TierStateChanged)
    engine.clock.advance(31)
    engine.step()
    assert [event.state for event in engine.log.of(TierStateChanged)] == [TierState.DOWN]


def test_jobs_that_the_tier_refuses_are_no_progress(make_engine):
    engine = make_engine(num_blocks=32, tier_deadline=30.0)
    queued_stores(engine, 1)
    engine.tier.raising = {"submit_store"}
    for number in range(4):
        engine.clock.advance(10)
        engine.store(make_keys(1, f"refused {number}"), engine.request(f"refused {number}"))
    assert not engine.manager.has_pending_work()


def test_an_engine_that_slept_for_an_hour_finds_no_tier_overdue_that_has_answered(make_engine):
    engine = make_engine(tier_deadline=30.0)
    queued_stores(engine, 1)
    engine.clock.advance(3600)
    engine.tier.finish(engine.tier.waiting[0])
    engine.step()
    assert not engine.log.of(TierStateChanged)


def test_a_tier_that_answers_twice_or_for_unknown_jobs(make_engine):
    engine, keys = make_engine(), make_keys(3)
    engine.plant(keys)
    context = engine.request()
    engine.scan(keys, context)
    engine.step()
    (job,) = engine.tier.loads
    engine.tier.results += [
        JobResult(job.job_id, True),
        JobResult(job.job_id, False),
        JobResult(4711, True),
        JobResult(job.job_id, False, keys),
    ]
    engine.step()
    assert engine.hits(keys, context) == 3
    assert sum(event.times for event in engine.log.of(UnexpectedCall)) == 4
    assert engine.load(keys, context) == [payload(key) for key in keys]


def test_a_tier_that_names_keys_of_others_as_successful(make_engine):
    engine, keys = make_engine(), make_keys(2)
    engine.plant(keys)
    engine.tier.auto = False
    context = engine.request()
    engine.scan(keys, context)
    engine.step()
    (job,) = engine.tier.loads
    engine.tier.finish(job)
    engine.tier.results = [JobResult(job.job_id, False, [*make_keys(3, "others"), keys[0]])]
    engine.step()
    assert engine.scan(keys, context) == [LookupResult.HIT, MISS]


def test_garbage_instead_of_an_answer_is_a_miss(make_engine):
    engine, keys = make_engine(), make_keys(2)
    engine.tier.lookup = lambda key, context: "perhaps"
    assert engine.scan(keys, engine.request()) == [MISS]


class UnverifiedTier(ScriptedTier):
    """A tier of somebody's own: it does not check what it returns."""

    verifies_payloads = False


@pytest.fixture
def unverified(make_engine):
    return make_engine(tiers=lambda view: [UnverifiedTier(view, "theirs")], load_deadline=1000.0)


def settle(engine: Engine, context, keys) -> int:
    """Scan until nothing is deferred; the hashing happens on another thread."""

    def answered():
        answers = engine.scan(keys, context)
        engine.step()
        return None if LookupResult.HIT_PENDING in answers else answers

    return wait_for(answered, "an answer to every key").count(LookupResult.HIT)


def store_and_wait(engine: Engine, keys) -> None:
    engine.store(keys, engine.request("storer"))
    wait_for(lambda: (engine.step(), set(keys) <= set(engine.tier.blocks))[1], "the tier has them")
    engine.step()
    engine.finish(engine.request("storer"))
    for number in range(2):  # push them out of the primary
        engine.store(make_keys(8, f"pressure{number}"), engine.request(f"pressure{number}"))
        wait_idle(engine)
    assert not any(key in engine.table for key in keys)


def wait_idle(engine: Engine) -> None:
    wait_for(lambda: (engine.step(), not engine.manager.has_pending_work())[1], "answers to all jobs")


def test_bytes_of_an_unverified_tier_come_back_if_they_are_right(unverified):
    keys = make_keys(3)
    store_and_wait(unverified, keys)
    context = unverified.request()
    assert settle(unverified, context, keys) == 3
    assert unverified.load(keys, context) == [payload(key) for key in keys]


def test_wrong_bytes_of_an_unverified_tier_are_a_miss_and_said_once(unverified, caplog):
    keys = make_keys(3)
    store_and_wait(unverified, keys)
    broken = bytearray(unverified.tier.blocks[keys[1]])
    broken[100] ^= 1
    unverified.tier.blocks[keys[1]] = bytes(broken)
    context = unverified.request()
    with caplog.at_level(logging.WARNING, "kvtier"):
        assert settle(unverified, context, keys) == 1
    assert unverified.load(keys[:1], context) == [payload(keys[0])]
    assert unverified.log.of(BlocksFailed) == [BlocksFailed("theirs", FailureCause.CORRUPT, 1)]
    assert len(caplog.records) == 1


def test_blocks_whose_digest_nobody_knows_are_a_miss(unverified):
    keys = make_keys(3)
    unverified.plant(keys)
    assert unverified.scan(keys, unverified.request()) == [MISS]


def test_blocks_of_an_unverified_tier_from_before_a_reset_are_a_miss(unverified):
    keys = make_keys(3)
    store_and_wait(unverified, keys)
    unverified.tier.start_epoch = lambda epoch: None  # it does not know of epochs
    unverified.manager.reset_cache()
    unverified.step()
    assert set(keys) <= set(unverified.tier.blocks)
    assert unverified.scan(keys, unverified.request()) == [MISS]


def test_bytes_given_away_twice_come_back_in_either_version(unverified):
    keys = make_keys(3)
    store_and_wait(unverified, keys)
    first = dict(unverified.tier.blocks)
    unverified.store(keys, unverified.request("again"), version=1)  # computed anew, other in the last bits
    wait_idle(unverified)
    unverified.tier.blocks.update(first)  # "already here": it kept what it had
    unverified.store(make_keys(8, "more pressure"), unverified.request("pressure"))
    wait_idle(unverified)
    context = unverified.request()
    assert settle(unverified, context, keys) == 3
    assert not unverified.log.of(BlocksFailed)


@pytest.mark.parametrize("drained", ["store", "load"])
def test_a_reset_while_blocks_are_hashed_hands_nothing_over_and_leaves_the_tier_in_use(unverified, drained):
    keys = make_keys(3)
    if drained == "load":
        store_and_wait(unverified, keys)
        unverified.scan(keys, unverified.request())
        unverified.step()  # the tier has answered, and nobody has looked yet
    else:
        unverified.store(keys, unverified.request())
    unverified.tier.auto = False
    stores = len(unverified.tier.stores)
    unverified.manager.reset_cache()
    unverified.step()
    assert len(unverified.tier.stores) == stores
    assert unverified.table.num_free == unverified.table.num_slots
    assert unverified.tier.epochs
    assert not unverified.log.of(TierStateChanged)


def test_a_tier_that_cannot_begin_an_epoch_is_not_used_until_it_has(make_engine):
    engine, keys = make_engine(), make_keys(3)
    engine.run(keys, "a")
    engine.tier.raising = {"start_epoch"}
    engine.manager.reset_cache()
    for _ in range(10):
        engine.clock.advance(60)
        engine.step()
        assert engine.scan(keys, engine.request("b")) == [MISS]  # it still holds bytes of the former weights
    engine.tier.raising = set()
    for _ in range(3):
        engine.clock.advance(60)
        engine.step()
    assert len(engine.tier.epochs) == 1
    assert engine.manager.tier_states()["tier0"][0] is TierState.UP
    assert engine.wait_hits(keys, engine.request("c")) == 0


def raising_halfway(result):
    yield result
    raise RuntimeError("halfway")


def test_results_that_came_before_a_fault_count(make_engine):
    engine, keys = make_engine(), make_keys(2)
    engine.tier.auto = False
    engine.store(keys, engine.request())
    engine.tier.get_finished_jobs = lambda: raising_halfway(JobResult(engine.tier.stores[0].job_id, True))
    engine.step()
    assert engine.manager.get_stats()["cascaded_blocks.tier0"] == 2
    assert not engine.manager.has_pending_work()


@pytest.mark.parametrize("method", ["on_new_request", "get_finished_jobs", "take_events", "get_stats", "can_store"])
@pytest.mark.parametrize("answer", [None, 7])
def test_an_answer_of_another_type_is_a_fault_of_the_tier(make_engine, method, answer):
    engine = make_engine()
    setattr(engine.tier, method, lambda *args: answer)
    exercise(engine)
    assert not list(engine.manager.take_events())
    assert engine.manager.get_stats()["primary.blocks"]


@pytest.mark.parametrize(
    "garbage",
    [
        lambda job_id: JobResult(job_id, False, 7),
        lambda job_id: JobResult(job_id, True, None, "soon", 3),
        lambda job_id: JobResult(job_id, True, None, 0.1, "many"),
        lambda job_id: JobResult(job_id, False, [[]]),
    ],
)
def test_a_garbled_result_is_a_failed_job(make_engine, garbage):
    engine, keys = make_engine(), make_keys(2)
    engine.plant(keys)
    engine.tier.auto = False
    context = engine.request()
    engine.scan(keys, context)
    engine.step()
    engine.tier.results = [None, JobResult([], True), garbage(engine.tier.loads[0].job_id)]
    engine.step()
    assert engine.scan(keys, context) == [MISS]
    assert engine.table.num_free == engine.table.num_slots


def test_a_tier_that_changes_its_job_changes_nothing_else(make_engine):
    engine, keys = make_engine(), make_keys(3)
    engine.plant(keys)
    submit = engine.tier.submit_load

    def spoil(job):
        submit(job)
        job.keys.clear()
        job.block_ids[:] = 0
        job.job_id, job.is_promotion = -1, False

    engine.tier.submit_load = spoil
    context = engine.request()
    assert engine.wait_hits(keys, context) == 3
    assert engine.load(keys, context) == [payload(key) for key in keys]


def test_a_tier_without_a_method_does_not_reach_the_engine(make_engine):
    engine = make_engine()
    engine.tier.touch = None
    exercise(engine)
    assert engine.log.of(TierStateChanged)[0].state is TierState.DOWN


def test_a_tier_that_verifies_may_keep_its_view_in_another_shape(make_engine):
    class Flat(ScriptedTier):
        def __init__(self, view, name):
            super().__init__(view, name)
            self.primary_kv_view = view.cast("B")

    engine = make_engine(tiers=lambda view: [Flat(view, "flat")])
    engine.tier.auto = False
    engine.store(make_keys(4), engine.request())
    assert engine.manager.get_stats()["flat.storing_share"] == 0.5


def test_a_tier_that_answers_again_while_its_bytes_are_checked(unverified):
    keys = make_keys(3)
    store_and_wait(unverified, keys)
    context = unverified.request()
    unverified.scan(keys, context)
    unverified.step()
    (result,) = unverified.tier.results
    unverified.tier.results = [result, result, JobResult(result.job_id, False)]
    assert settle(unverified, context, keys) == 3
    assert sum(event.times for event in unverified.log.of(UnexpectedCall)) == 2
    assert unverified.load(keys, context) == [payload(key) for key in keys]
