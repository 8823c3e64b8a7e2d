"""Loads in an I/O process: they wait for no store, and are cancelled where they wait when nobody wants them."""

from dataclasses import replace

import pytest
from fault_rigs import PATIENT, Recorder, faulty_tier, make_rig

from kvtier.events import BlocksFailed, TierState
from kvtier.executors.process import IOProcess
from kvtier.secondary.disk import StripedDiskTierManager
from kvtier.testing.patience import wait_for
from kvtier.testing.stores import make_key, make_payload
from kvtier.types import FailureCause

UNTOUCHED = b"\x5a" * 8192


@pytest.fixture
def rig():
    recorder = Recorder()
    rig = make_rig(num_blocks=256, observer=recorder)
    rig.recorder = recorder
    yield rig
    rig.close()


def start(rig, path):
    """Start a tier of one thread that holds 128 blocks, and let its reads hang from now on."""
    plan = {"fault": "hang", "calls": ["read_into"], "while_path": str(path), "begun_path": str(begun(path))}
    tier = faulty_tier(rig, plan, settings=replace(PATIENT, threads=1))
    tier.start()
    rig.wait_up()
    assert rig.store(range(128)).success
    path.touch()
    return tier


def begun(path):
    return path.with_name("begun")


def wait_begun(rig, path):
    rig.wait(begun(path).exists, "the first read has begun")


def submit_load(rig, numbers, first_slot):
    slots = range(first_slot, first_slot + len(numbers))
    for slot in slots:
        rig.fill(slot, UNTOUCHED)
    return rig.submit([make_key(number) for number in numbers], slots, load=True)


def test_a_queued_load_is_answered_while_another_runs_and_writes_nothing_afterwards(rig, tmp_path):
    tier = start(rig, tmp_path / "hang")
    running = submit_load(rig, range(8), 128)
    queued = [submit_load(rig, range(8, 16), 136), submit_load(rig, range(16, 24), 144)]
    wanted = submit_load(rig, range(24, 32), 152)
    wait_begun(rig, tmp_path / "hang")
    tier.cancel_loads([running, *queued])
    for job in queued:
        result = rig.finish(job)
        assert not result.success
        assert not result.successful_keys
    assert not {running, wanted} & set(rig.results)  # it may still write: the slots are its own
    assert sum(event.num_blocks for event in cancelled(rig)) == 16
    (tmp_path / "hang").unlink()
    assert rig.finish(running).success
    assert rig.finish(wanted).success
    assert [rig.read(slot) for slot in range(128, 136)] == [make_payload(number, 8192) for number in range(8)]
    assert all(rig.read(slot) == UNTOUCHED for slot in range(136, 152))
    assert tier.state is TierState.UP
    assert rig.load(range(8, 24), 200)[1] == list(range(8, 24))  # they were cancelled, not lost
    rig.assert_each_job_answered_once()


def test_of_a_load_that_has_begun_the_rest_is_cancelled_and_the_answer_waits_for_what_runs(rig, tmp_path):
    tier = start(rig, tmp_path / "hang")
    job = submit_load(rig, range(128), 128)  # two calls into the store
    wait_begun(rig, tmp_path / "hang")
    answered = tier.progress
    tier.cancel_loads([job])
    rig.wait(lambda: tier.progress > answered, "half of it is answered")
    assert tier.progress - answered == 64
    assert job not in rig.results
    (tmp_path / "hang").unlink()
    result = rig.finish(job)
    assert not result.success
    assert set(result.successful_keys) == {make_key(number) for number in range(64)}
    assert all(rig.read(slot) == UNTOUCHED for slot in range(192, 256))


def test_cancelling_what_has_ended_or_never_was_changes_nothing(rig, tmp_path):
    tier = start(rig, tmp_path / "hang")
    (tmp_path / "hang").unlink()
    job = submit_load(rig, range(8), 128)
    assert rig.finish(job).success
    tier.cancel_loads([job, 12345])
    assert rig.load(range(8), 200)[1] == list(range(8))
    assert not cancelled(rig)
    rig.assert_each_job_answered_once()


def test_stores_of_the_same_tier_are_not_cancelled(rig, tmp_path):
    tier = start(rig, tmp_path / "hang")
    running = submit_load(rig, range(8), 128)
    queued = submit_load(rig, range(8, 16), 136)
    for slot in range(200, 208):
        rig.fill(slot, make_payload(slot, 8192))
    store = rig.submit([make_key(number) for number in range(200, 208)], range(200, 208), load=False)
    wait_begun(rig, tmp_path / "hang")
    tier.cancel_loads([queued])
    rig.finish(queued)
    (tmp_path / "hang").unlink()
    assert rig.finish(store).success
    assert rig.finish(running).success


def test_a_load_does_not_wait_for_stores_that_hang(tmp_path):
    rig = make_rig(num_blocks=256)
    try:
        path = tmp_path / "hang"
        plan = {"fault": "hang", "calls": ["write"], "while_path": str(path), "begun_path": str(begun(path))}
        tier = faulty_tier(rig, plan, settings=replace(PATIENT, threads=3))
        tier.start()
        rig.wait_up()
        assert rig.store(range(8)).success
        path.touch()
        stores = [rig.submit([make_key(number)], [number], load=False) for number in range(100, 110)]
        wait_begun(rig, path)
        assert rig.load(range(8), 200)[1] == list(range(8))
        assert not set(stores) & set(rig.results)
        path.unlink()
        assert all(rig.finish(job).success for job in stores)
    finally:
        rig.close()


def test_every_stripe_hears_of_a_cancelled_job(tmp_path):
    rig = make_rig(num_blocks=256)
    try:
        paths = [tmp_path / name for name in ("a", "b")]
        for path in paths:
            path.mkdir()
        tier = StripedDiskTierManager(
            rig.spec, rig.arena.view, "disk", path=[str(path) for path in paths], capacity="16MiB"
        )
        rig.attach(tier)
        tier.start()
        rig.wait(lambda: tier.get_stats()["stripes_up"] == 2, "both stripes are up")
        for first in (0, 64):
            assert rig.store(range(first, first + 64), first).success
        jobs = [submit_load(rig, range(64), 128), submit_load(rig, range(64, 128), 192)]
        tier.cancel_loads(jobs)
        for job in jobs:
            rig.finish(job)
        assert rig.load(range(128), 128)[1] == list(range(128))
        rig.assert_each_job_answered_once()
    finally:
        rig.close()


def cancelled(rig):
    return [event for event in rig.recorder.of(BlocksFailed) if event.cause is FailureCause.CANCELLED]


def test_the_answer_of_the_only_job_is_taken_with_one_look_at_the_socket(rig, monkeypatch):
    tier = faulty_tier(rig, settings=PATIENT)
    tier.start()
    rig.wait_up()
    looks, receive = [], IOProcess._receive
    monkeypatch.setattr(IOProcess, "_receive", lambda self: looks.append(None) or receive(self))
    answers = []

    def answered():
        looks.clear()
        answers.extend(tier.get_finished_jobs())
        return answers

    for is_load in (False, True):
        rig.submit([make_key(1), make_key(2)], [0, 1], load=is_load)
        wait_for(answered, "the answer")
        assert answers.pop().success
        assert len(looks) == 1
