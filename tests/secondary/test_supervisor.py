"""Lives of executors on a clock that stands still, with executors that obey, die, hang, and cannot be killed."""

import itertools
import logging

import numpy as np
import pytest
from fault_rigs import Recorder

from kvtier.errors import ProtocolError, StoreUnavailableError
from kvtier.events import TierState
from kvtier.executors.base import Ended, IOExecutor
from kvtier.executors.protocol import IndexEnd, PartResult, Ready, Unavailable
from kvtier.secondary.jobs import JobLedger
from kvtier.secondary.settings import Deadlines
from kvtier.secondary.standing import Breaker, BreakerState, Standing
from kvtier.secondary.supervisor import Supervisor
from kvtier.testing.clock import ManualClock
from kvtier.testing.stores import make_key
from kvtier.types import FailureCause, JobMetadata, ReqContext


class PuppetExecutor(IOExecutor):
    """Says what the test says; ends only when the test lets it."""

    def __init__(self, start_error=None):
        self.start_error = start_error
        self.reports = []
        self.garbage = False
        self.killed = self.retired = False
        self.can_end = True

    def start(self):
        if self.start_error:
            raise self.start_error
        self.reports += [Ready(0), IndexEnd()]

    def submit(self, part):
        pass

    def probe(self, probe_id, keys):
        pass

    def do(self, chore):
        pass

    def poll(self):
        if self.garbage:
            raise ProtocolError("?")
        reports, self.reports = self.reports, []
        return reports

    def cancel(self, serials):
        pass

    def retire(self):
        self.retired = True

    def kill(self):
        self.killed = True

    def has_ended(self):
        return self.can_end and (self.killed or self.retired)

    def wait(self, seconds):
        pass


class Rig:
    def __init__(self):
        self.clock = ManualClock()
        self.recorder = Recorder()
        self.ledger = JobLedger("puppet", self.clock, self.recorder)
        breaker, self.store_breaker = (Breaker(self.clock, draw=lambda: 0.0) for _ in range(2))
        self.standing = Standing("puppet", breaker, self.recorder)
        self.lives = []
        self.start_error = None
        self.supervisor = Supervisor(
            self.make,
            self.ledger,
            self.standing,
            self.store_breaker,
            self.clock,
            Deadlines(job=10, overtaken_job=40),
            self.end,
        )
        self.supervisor.start()
        self.pump()

    def make(self):
        self.lives.append(PuppetExecutor(self.start_error))
        return self.lives[-1]

    def end(self):
        self.ledger.fail_all(FailureCause.TIER_DOWN)

    def pump(self, seconds=0.0):
        """Look every half second, as an engine that steps does; return what was reported."""
        reports = []
        while seconds > 0.5:
            reports += self.look(0.5)
            seconds -= 0.5
        return reports + self.look(seconds)

    def look(self, seconds):
        """Look once, `seconds` later."""
        self.clock.advance(seconds)
        executor = self.supervisor.attend()
        try:
            reports = [] if executor is None else self.supervisor.heed(executor.poll())
        except ProtocolError as error:  # as a tier does
            reports = []
            self.supervisor.fail(str(error))
        self.supervisor.check_hang()
        self.supervisor.check_invariants()
        self.ledger.check_invariants()
        return reports

    def open_job(self, job_id=1, blocks=4, is_load=False):
        keys = [make_key(number) for number in range(blocks)]
        job = JobMetadata(job_id, keys, np.arange(blocks, dtype=np.int32), is_load, ReqContext("r"))
        return self.ledger.open(job, keys, range(blocks), None, [], {})

    @property
    def takes_stores(self):
        return self.supervisor.works and self.store_breaker.state is not BreakerState.OPEN

    @property
    def life(self):
        return self.lives[-1]


@pytest.fixture
def rig():
    return Rig()


def test_it_is_up_when_the_index_is_complete(rig):
    assert rig.standing.state is TierState.UP
    assert rig.supervisor.works


def test_a_hang_is_killed_and_its_jobs_fail(rig):
    rig.open_job()
    rig.pump(9.9)
    assert not rig.life.killed
    rig.pump(0.2)
    assert rig.life.killed
    assert [result.success for result in rig.ledger.take_results()] == [False]
    assert len(rig.lives) == 1
    rig.pump(0.5)
    assert len(rig.lives) == 2
    rig.pump()
    assert rig.standing.state is TierState.UP


def answer(rig, job, first, count=1):
    rig.life.reports.append(PartResult(job.serial, first, [True] * count))
    for report in rig.pump():
        rig.ledger.apply(report)


def test_a_queue_that_moves_is_not_late_however_long_it_is(rig):
    jobs = [rig.open_job(number) for number in range(50)]
    for job in jobs:
        rig.pump(8)
        assert not rig.life.killed
        answer(rig, job, 0, 4)
    assert all(result.success for result in rig.ledger.take_results())
    assert len(rig.lives) == 1


def test_a_long_job_that_moves_is_not_late_though_others_overtake_it(rig):
    long, short = rig.open_job(1, blocks=40), rig.open_job(2, blocks=1)
    answer(rig, short, 0)
    for block in range(40):
        rig.pump(8)
        answer(rig, long, block)
    assert not rig.life.killed


def test_a_job_that_hangs_while_later_ones_are_done_is_late(rig):
    rig.open_job(1)
    other = rig.open_job(2, blocks=8)
    for block in range(6):
        rig.pump(8)
        assert not rig.life.killed
        answer(rig, other, block)
    rig.pump(0.5)
    assert rig.life.killed  # overtaken 40 s ago


def test_a_load_that_overtakes_a_store_does_not_make_it_late(rig):
    rig.open_job(1)
    for number in range(2, 20):
        load = rig.open_job(number, is_load=True)
        rig.pump(8)
        answer(rig, load, 0, 4)
    assert not rig.life.killed


def test_what_cannot_be_killed_keeps_its_jobs_unanswered_and_has_no_successor(rig):
    rig.open_job()
    rig.life.can_end = False
    rig.pump(11)
    assert rig.life.killed
    for _ in range(100):
        rig.pump(60)
    assert rig.ledger.take_results() == []
    assert rig.ledger.num_jobs == 1
    assert len(rig.lives) == 1
    assert rig.standing.state is TierState.DOWN
    rig.life.can_end = True
    rig.pump()
    assert [result.success for result in rig.ledger.take_results()] == [False]
    rig.pump(31)
    assert len(rig.lives) == 2


def test_a_shutdown_of_what_cannot_be_killed_answers_nothing(rig):
    rig.open_job()
    rig.life.can_end = False
    rig.supervisor.close()
    rig.supervisor.kill()
    rig.pump(100)
    assert rig.ledger.take_results() == []
    assert rig.standing.state is TierState.CLOSED
    rig.life.can_end = True
    rig.pump()
    assert len(rig.ledger.take_results()) == 1
    rig.pump(100)
    assert len(rig.lives) == 1


def test_attempts_space_out_to_half_a_minute_and_say_the_same_reason_once(rig, caplog):
    caplog.set_level(logging.INFO, "kvtier")
    rig.start_error = StoreUnavailableError("no more processes")
    rig.life.reports.append(Ended("died"))
    rig.pump()
    attempts = []
    for _ in range(2000):
        before = len(rig.lives)
        rig.pump(0.1)
        if len(rig.lives) > before:
            attempts.append(rig.clock())
    gaps = np.diff(attempts)
    assert gaps[0] == pytest.approx(1.0, abs=0.15)
    assert gaps[-1] == pytest.approx(30.0, abs=0.2)
    assert sum("no more processes" in message for message in caplog.messages) == 1
    rig.start_error = None
    rig.pump(31)
    rig.pump()
    assert rig.standing.state is TierState.UP


def test_a_locked_store_retires_its_process(rig):
    rig.life.reports.append(Unavailable("locked"))
    rig.pump()
    assert rig.life.retired
    assert not rig.life.killed
    assert (rig.standing.state, rig.standing.reason) == (TierState.DOWN, "locked")


def test_garbage_is_death(rig):
    rig.open_job()
    rig.life.garbage = True
    rig.pump()
    assert rig.life.killed
    assert rig.standing.state is TierState.DOWN


@pytest.mark.parametrize("report", [Ready(0), IndexEnd()])
def test_reports_out_of_turn_are_death(rig, report):
    rig.life.reports.append(report)
    rig.pump()
    assert rig.life.killed


def test_an_epoch_starts_a_new_life_only_when_the_old_one_is_gone(rig):
    rig.open_job()
    rig.life.can_end = False
    rig.supervisor.restart()
    rig.pump(1)
    assert rig.standing.state is TierState.STARTING
    assert len(rig.lives) == 1
    rig.pump(10)
    assert rig.life.killed
    rig.lives[0].can_end = True
    rig.pump()
    assert len(rig.lives) == 2
    assert rig.standing.state is TierState.UP
    assert [result.success for result in rig.ledger.take_results()] == [False]


def test_the_breaker_opens_half_opens_and_closes():
    clock = ManualClock()
    breaker = Breaker(clock, failures_to_open=3, draw=lambda: 0.0)
    assert [breaker.fail() for _ in range(3)] == [False, False, True]
    assert not breaker.try_again()
    clock.advance(0.5)
    assert breaker.try_again()
    assert breaker.fail()
    clock.advance(0.9)
    assert not breaker.try_again()
    clock.advance(0.1)
    assert breaker.try_again()
    breaker.succeed()
    assert breaker.state is BreakerState.CLOSED
    assert [breaker.fail() for _ in range(3)] == [False, False, True]
    clock.advance(1.9)
    assert not breaker.try_again(), "a success at once does not make the pauses short again"
    clock.advance(0.1)
    assert breaker.try_again()
    clock.advance(16)
    breaker.succeed()
    assert [breaker.fail() for _ in range(3)] == [False, False, True]
    clock.advance(0.5)
    assert breaker.try_again(), "one after a calm does"
    breaker.check_invariants()


def test_engines_that_lost_a_server_together_try_again_one_after_the_other():
    clock = ManualClock()
    breakers = [Breaker(clock) for _ in range(50)]
    for backoff in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0):
        for breaker in breakers:
            breaker.open()
        pauses = sorted(breaker.retry_at - clock() for breaker in breakers)
        assert backoff / 2 < pauses[0] < pauses[-1] <= backoff
        assert max(later - sooner for sooner, later in itertools.pairwise(pauses)) < backoff / 5
        clock.advance(backoff)
        assert all(breaker.try_again() for breaker in breakers)


def test_failed_stores_end_stores_and_not_loads(rig, caplog):
    for _ in range(3):
        assert rig.takes_stores
        rig.supervisor.job_ended(served=False, broken=True, is_store=True)
    rig.supervisor.job_ended(served=True, broken=False)
    assert rig.supervisor.works
    assert not rig.takes_stores
    rig.pump(0.6)
    assert rig.takes_stores  # is tried
    rig.supervisor.job_ended(served=False, broken=True, is_store=True)
    assert not rig.takes_stores
    assert rig.standing.state is TierState.UP
    rig.pump(1.1)
    rig.supervisor.job_ended(served=True, broken=False, is_store=True)
    rig.pump()
    assert rig.takes_stores
    assert rig.recorder.states() == ["up"] * 3
    assert [record.levelname for record in caplog.records].count("WARNING") == 1


def test_a_new_epoch_while_the_breaker_is_open_is_a_new_attempt(rig):
    for _ in range(3):
        rig.supervisor.job_ended(served=False, broken=True)
    assert rig.standing.state is TierState.DOWN
    rig.supervisor.restart()
    rig.pump()
    assert rig.standing.state is TierState.UP
    assert rig.supervisor.works


@pytest.mark.parametrize("away", [11.0, 41.0])
def test_an_engine_that_looked_away_does_not_take_unread_results_for_a_hang(rig, away):
    rig.supervisor.start()
    rig.pump()
    job = rig.open_job()
    rig.look(away)  # longer than a job may take, and nothing was sent or read meanwhile
    assert not rig.lives[-1].killed
    rig.lives[-1].reports.append(PartResult(job.serial, 0, [True] * 4, 4))
    for report in rig.look(0.01):
        rig.ledger.apply(report)
    rig.pump(60)
    assert not rig.lives[-1].killed
    assert rig.standing.state is TierState.UP


def test_a_hang_is_found_by_an_engine_that_polls_rarely(rig):
    rig.supervisor.start()
    rig.pump()
    rig.open_job()
    for _ in range(5):
        rig.look(3.0)
    assert rig.lives[-1].killed
