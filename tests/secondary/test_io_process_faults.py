"""I/O processes that are killed, stopped, mad, late or not there: the scheduler sees failed jobs and misses."""

import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fault_rigs import (
    FAULTY,
    PATIENT,
    QUICK,
    Recorder,
    faulty_tier,
    is_alive,
    make_rig,
    num_descriptors,
    stop,
)

from kvtier.errors import ProtocolError
from kvtier.events import BlocksFailed, TierState
from kvtier.executors.protocol import Cancel, PartResult, Ready, encode
from kvtier.secondary.disk import DiskTierManager
from kvtier.testing.patience import TEST_SECONDS, wait_for
from kvtier.testing.stores import make_key, make_payload
from kvtier.testing.tier_rig import succeeded
from kvtier.types import FailureCause, LookupResult


@pytest.fixture
def rig():
    recorder = Recorder()
    rig = make_rig(observer=recorder)
    rig.recorder = recorder
    yield rig
    rig.close()


def hang(path, *calls):
    path.touch()
    return {"fault": "hang", "calls": list(calls), "while_path": str(path)}


def submit_store(rig, numbers, first_slot=0):
    for slot, number in enumerate(numbers, first_slot):
        rig.fill(slot, make_payload(number, rig.block_bytes))
    slots = range(first_slot, first_slot + len(numbers))
    return rig.submit([make_key(number) for number in numbers], slots, load=False)


def test_a_killed_process_fails_its_jobs_and_is_replaced(rig, tmp_path, caplog):
    caplog.set_level(logging.INFO, "kvtier")
    tier = faulty_tier(rig, hang(tmp_path / "hang", "write"))
    tier.start()
    rig.wait_up()
    pid = tier.io_pid
    job = submit_store(rig, range(8))
    rig.poll()
    assert job not in rig.results
    os.kill(pid, signal.SIGKILL)
    result = rig.finish(job)
    assert not result.success
    assert not result.successful_keys
    assert rig.tier.state is TierState.DOWN
    assert "signal 9" in rig.tier.state_reason
    assert rig.tier.lookup(make_key(1), rig.request) is LookupResult.MISS
    assert rig.recorder.of(BlocksFailed)[-1].cause is FailureCause.TIER_DOWN
    (tmp_path / "hang").unlink()
    rig.wait_up()
    assert tier.io_pid != pid
    assert not is_alive(pid)
    assert rig.store(range(8)).success
    assert rig.load(range(8))[1] == list(range(8))
    assert rig.recorder.states() == ["up", "down", "up"]
    assert sum("is down" in message for message in caplog.messages) == 1
    rig.assert_each_job_answered_once()


def test_jobs_of_a_killed_process_are_answered_only_after_it_is_gone(rig, tmp_path):
    tier = faulty_tier(rig, hang(tmp_path / "hang", "write"))
    tier.start()
    rig.wait_up()
    pid = tier.io_pid
    job = submit_store(rig, range(4))
    os.kill(pid, signal.SIGKILL)
    rig.wait(lambda: job in rig.results or not is_alive(pid), "an end")
    assert not is_alive(pid)
    rig.finish(job)


def test_a_stopped_process_is_killed_at_the_deadline(rig, tmp_path):
    tier = faulty_tier(rig)
    tier.start()
    rig.wait_up()
    pid = tier.io_pid
    stop(pid)
    job = submit_store(rig, range(4))
    started = time.monotonic()
    assert not rig.finish(job).success
    assert time.monotonic() - started >= QUICK.deadlines.job
    assert not is_alive(pid)
    assert "progress" in tier.state_reason
    rig.wait_up()
    assert rig.store([1]).success


def test_a_stopped_process_that_wakes_up_in_time_does_its_jobs(rig):
    tier = faulty_tier(rig, settings=PATIENT)
    tier.start()
    rig.wait_up()
    rig.store(range(8))
    pid = tier.io_pid
    stop(pid)
    store = submit_store(rig, range(8, 16), first_slot=8)
    load = rig.submit([make_key(number) for number in range(8)], range(40, 48), load=True)
    deadline = time.monotonic() + 0.2
    rig.wait(lambda: time.monotonic() > deadline, "a while")
    assert not {store, load} & set(rig.results)
    os.kill(pid, signal.SIGCONT)
    assert rig.finish(store).success
    assert rig.finish(load).success
    assert [rig.read(slot) for slot in range(40, 48)] == [make_payload(number, rig.block_bytes) for number in range(8)]
    assert rig.load(range(8, 16))[1] == list(range(8, 16))
    assert tier.io_pid == pid


def test_a_drain_of_a_stopped_process_is_bounded_and_answers_all(rig):
    tier = faulty_tier(rig)
    tier.start()
    rig.wait_up()
    pid = tier.io_pid
    stop(pid)
    for number in range(8):
        submit_store(rig, [number], first_slot=number)
    tier.drain_jobs()
    rig.poll()
    rig.assert_each_job_answered_once()
    assert not is_alive(pid)


def test_a_shutdown_of_a_stopped_process_is_bounded(rig):
    tier = faulty_tier(rig)
    tier.start()
    rig.wait_up()
    pid = tier.io_pid
    stop(pid)
    submit_store(rig, range(8))
    tier.shutdown()
    assert not is_alive(pid)
    assert tier.state is TierState.CLOSED
    rig.poll()
    rig.assert_each_job_answered_once()


@pytest.mark.parametrize("store", ["no.such.module:Store", "kvtier.stores.memory:Missing", "kvtier.errors:StoreError"])
def test_a_store_that_cannot_be_imported_is_down_and_said_once(rig, store, caplog):
    tier = faulty_tier(rig, store=store)
    tier.start()
    pids = set()

    def three_lives():
        pids.add(tier.io_pid)
        return len(pids - {None}) >= 3

    rig.wait(three_lives, "it is tried three times")
    assert tier.state is TierState.DOWN
    assert store in tier.state_reason
    assert sum("is down" in message for message in caplog.messages) == 1
    assert rig.recorder.states() == ["down"]
    assert not rig.finish(submit_store(rig, [1])).success
    assert not tier.can_store(1)


def test_a_store_that_crashes_while_it_opens_is_tried_again(rig, tmp_path):
    crash = tmp_path / "crash"
    crash.touch()
    tier = faulty_tier(rig, {"fault": "exit", "calls": ["open"], "while_path": str(crash)})
    tier.start()
    rig.wait(lambda: tier.state is TierState.DOWN, "it is down")
    assert "exited with 86" in tier.state_reason
    crash.unlink()
    rig.wait_up()
    assert rig.store([1]).success


def test_a_store_that_hangs_while_it_opens_is_killed(rig, tmp_path):
    settings = type(QUICK)(deadlines=type(QUICK.deadlines)(start=3.0), first_backoff=0.05)
    tier = faulty_tier(rig, hang(tmp_path / "hang", "open"), settings=settings)
    tier.start()
    assert tier.lookup(make_key(1), rig.request) is LookupResult.MISS
    rig.wait(lambda: tier.state is TierState.DOWN, "it is down")
    (tmp_path / "hang").unlink()
    rig.wait_up()


def test_a_process_that_dies_of_each_job_is_tried_ever_more_rarely(rig):
    tier = faulty_tier(rig, {"fault": "exit", "calls": ["write"]})
    tier.start()
    for _ in range(5):
        rig.wait_up()
        started = time.monotonic()
        assert not rig.finish(submit_store(rig, [1])).success
        rig.wait(lambda: tier.io_pid is not None, "the next life")
    longest_pause = QUICK.first_backoff * 2**4
    assert time.monotonic() - started >= longest_pause / 2, "jitter takes at most half"


def test_jobs_that_fail_in_a_row_open_the_breaker_without_a_new_process(rig, tmp_path):
    bad = tmp_path / "bad"
    bad.touch()
    tier = faulty_tier(rig, {"fault": "raise", "calls": ["write", "read_into"], "while_path": str(bad)})
    tier.start()
    rig.wait_up()
    pid = tier.io_pid
    for number in range(3):
        assert not rig.load([number])[1]
    assert tier.state is TierState.DOWN
    bad.unlink()
    rig.wait_up()
    assert tier.io_pid == pid
    assert rig.store([1]).success


def test_lying_bytes_never_succeed(rig):
    faulty_tier(rig, {"fault": "flip_bit", "calls": ["read_into"], "skip": 1, "times": 1}).start()
    rig.wait_up()
    rig.store(range(4))
    assert rig.load(range(4))[1] == [0, 1, 2, 3]
    assert rig.load(range(4))[1] == []
    assert rig.lookup(1) is LookupResult.MISS
    assert any(event.cause is FailureCause.CORRUPT for event in rig.recorder.of(BlocksFailed))


def test_a_job_of_thousands_of_blocks_is_split_and_complete(tmp_path):
    rig = make_rig(num_blocks=6000, block_bytes=4096)
    try:
        faulty_tier(rig).start()
        rig.wait_up()
        numbers = list(range(3000))
        assert rig.store(numbers).success
        assert rig.load(numbers, first_slot=3000)[1] == numbers
        rig.assert_each_job_answered_once()
    finally:
        rig.close()


def test_a_full_queue_never_waits(rig):
    tier = faulty_tier(rig, settings=PATIENT)
    tier.start()
    rig.wait_up()
    pid = tier.io_pid
    stop(pid)
    jobs = []
    for _ in range(2000):  # a wait would be for ever
        jobs.append(rig.submit([make_key(number) for number in range(32)], range(32), load=True))
    os.kill(pid, signal.SIGCONT)
    rig.wait(lambda: set(jobs) <= set(rig.results), "all jobs are answered")
    rig.assert_each_job_answered_once()


def test_back_pressure_is_a_value(tmp_path):
    rig = make_rig()
    try:
        settings = type(QUICK)(most_store_bytes=16 * 8192)
        tier = faulty_tier(rig, hang(tmp_path / "hang", "write"), settings=settings)
        tier.start()
        rig.wait_up()
        assert tier.can_store(40)  # alone, any job is taken
        first = submit_store(rig, range(12))
        assert tier.can_store(4)
        assert not tier.can_store(5)
        refused = submit_store(rig, range(20, 26), first_slot=20)
        assert not rig.finish(refused).success
        assert first not in rig.results
        (tmp_path / "hang").unlink()
        assert rig.finish(first).success
        assert tier.can_store(16)
    finally:
        rig.close()


def test_loads_overtake_stores_that_wait(tmp_path):
    rig = make_rig()
    try:
        settings = type(QUICK)(threads=1)
        tier = faulty_tier(rig, settings=settings, store=FAULTY)
        tier.start()
        rig.wait_up()
        rig.store([1])
        pid = tier.io_pid
        stop(pid)
        stores = [submit_store(rig, [number], first_slot=number) for number in range(2, 12)]
        load = rig.submit([make_key(1)], [40], load=True)
        os.kill(pid, signal.SIGCONT)
        order = []
        for job in (*stores, load):
            rig.finish(job)
        order = list(rig.results)
        assert order.index(load) < order.index(stores[-1])
    finally:
        rig.close()


@pytest.mark.parametrize(
    "packet",
    [
        b"\xff" * 40,
        encode([PartResult(12345, 0, [True])])[0][:-1],
        encode([PartResult(12345, 0, [True])])[0],
        encode([Ready(0)])[0],
        encode([Cancel([1])])[0],
        b"x" * 60_000,
    ],
    ids=["unknown type", "short", "unknown job", "out of turn", "request", "long"],
)
def test_garbage_from_the_process_is_its_death(rig, packet):
    tier = faulty_tier(rig)
    tier.start()
    rig.wait_up()
    pid = tier.io_pid
    executor = tier._supervisor.executor
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    executor._socket.close()
    executor._socket = ours  # as if the process spoke
    theirs.send(packet)
    rig.wait(lambda: tier.state is TierState.DOWN, "it is down")
    assert "invalid message" in tier.state_reason
    wait_for(lambda: not is_alive(pid), "it is dead")
    rig.wait_up()
    theirs.close()


@pytest.mark.parametrize("num_slots", [0, 129, 2**32 - 1])
def test_an_index_of_more_slots_than_the_capacity_has_is_not_believed(rig, tmp_path, num_slots):
    """Whatever is in its files: the table of slots would take the engine's memory."""
    options = {"path": str(tmp_path / "kv"), "capacity": "1MiB"}
    tier = DiskTierManager(rig.spec, rig.arena.view, "disk", **options)
    with pytest.raises(ProtocolError, match="slots"):
        tier._handle(Ready(num_slots))
    tier.shutdown()


def test_garbage_from_the_tier_ends_the_process(rig):
    tier = faulty_tier(rig)
    tier.start()
    rig.wait_up()
    pid = tier.io_pid
    tier._supervisor.executor._socket.send(b"\xff\xff")
    rig.wait(lambda: tier.state is TierState.DOWN, "it is down")
    assert "exited with 3" in tier.state_reason
    assert not is_alive(pid)
    rig.wait_up()


def test_signals_of_the_terminal_do_not_end_it(rig):
    tier = faulty_tier(rig)
    tier.start()
    rig.wait_up()
    pid = tier.io_pid
    assert os.getsid(pid) == pid
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    assert rig.store([1]).success
    assert tier.io_pid == pid


def test_it_outlives_the_thread_that_started_it(rig):
    tier = faulty_tier(rig)
    thread = threading.Thread(target=tier.start)
    thread.start()
    thread.join()
    rig.wait_up()
    assert rig.store([1]).success
    assert rig.recorder.states() == ["up"]


def test_nothing_is_left_behind():
    make_and_close()
    gc.collect()
    before = num_descriptors()
    pids = [make_and_close() for _ in range(3)]
    gc.collect()
    # Fewer is no fault: what earlier tests left to threads of theirs may end meanwhile.
    assert num_descriptors() <= before
    for pid in pids:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def make_and_close():
    rig = make_rig()
    tier = faulty_tier(rig)
    tier.start()
    rig.wait_up()
    rig.store([1])
    pid = tier.io_pid
    rig.close()
    return pid


_PARENT = """
import sys
from fault_rigs import make_rig
from kvtier.secondary.disk import DiskTierManager
rig = make_rig()
rig.attach(DiskTierManager(rig.spec, rig.arena.view, "disk", path=sys.argv[1], capacity="1MiB"))
rig.tier.start()
rig.wait_up()
rig.store(range(4))
print(rig.tier.io_pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def engine(tmp_path):
    """Another engine over the directory tmp_path / "tier"."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(tmp_path / "tier")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    process.io_pid = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def disk_tier(rig, tmp_path):
    tier = DiskTierManager(rig.spec, rig.arena.view, "disk", path=str(tmp_path / "tier"), capacity="1MiB")
    rig.attach(tier)
    tier.start()
    return tier


def test_it_ends_with_a_killed_parent_and_frees_the_directory(rig, engine, tmp_path):
    os.kill(engine.pid, signal.SIGKILL)
    engine.wait()
    wait_for(lambda: not is_alive(engine.io_pid), "the I/O process ends")
    disk_tier(rig, tmp_path)
    rig.wait_up()
    assert rig.load(range(4))[1] == [0, 1, 2, 3]


def test_it_ends_with_its_parent_even_while_its_store_opens(tmp_path):
    (tmp_path / "hang").touch()
    code = (
        "import sys, os; from fault_rigs import make_rig, faulty_tier; rig = make_rig();"
        "tier = faulty_tier(rig, {'fault': 'hang', 'calls': ['open'], 'while_path': sys.argv[1]});"
        "tier.start(); print(tier.io_pid, flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "hang")], env=environment, **pipes) as parent:
        io_pid = int(parent.stdout.readline())
        wait_for(lambda: Path(f"/proc/{io_pid}/comm").read_text() == "kvtier-io\n", "it is on its way")
        parent.kill()
    wait_for(lambda: not is_alive(io_pid), "the I/O process ends")


def test_a_forked_copy_of_the_engine_does_not_keep_it(rig):
    by_force = type(PATIENT.deadlines)(drain=2 * TEST_SECONDS)  # later than the test's end
    tier = faulty_tier(rig, settings=type(PATIENT)(deadlines=by_force))
    tier.start()
    rig.wait_up()
    pid = tier.io_pid
    reading, writing = os.pipe()
    copy = os.fork()
    if copy == 0:  # holds a copy of every descriptor until the test lets it go
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    tier.shutdown()
    assert not is_alive(pid)
    os.close(writing)
    os.waitpid(copy, 0)


def test_a_tier_that_comes_and_goes_for_one_reason_says_so_once(rig, tmp_path, caplog):
    tier = faulty_tier(rig, {"fault": "raise", "calls": ["read_into"]})
    tier.start()
    rig.wait_up()
    for _ in range(3):
        rig.wait_up()
        rig.wait(lambda: not rig.load([1])[1] and tier.state is TierState.DOWN, "it is down")
    assert rig.recorder.states() == ["up", "down"] * 3
    assert sum("is down" in message for message in caplog.messages) == 1


def test_a_directory_held_by_another_engine_is_opened_when_it_is_free(rig, engine, tmp_path, caplog):
    tier = disk_tier(rig, tmp_path)
    rig.wait(lambda: tier.state is TierState.DOWN, "it is down")
    assert tier.state_reason
    first = tier.get_stats()["breaker_openings"]
    rig.wait(lambda: tier.get_stats()["breaker_openings"] > first, "a second attempt, which says nothing")
    assert sum("is down" in message for message in caplog.messages) == 1
    engine.kill()
    engine.wait()
    rig.wait_up()
    assert rig.load(range(4))[1] == [0, 1, 2, 3]


def test_a_disk_tier_rebuilds_its_index_after_its_process_died(rig, tmp_path):
    tier = disk_tier(rig, tmp_path)
    rig.wait_up()
    rig.store(range(16))
    os.kill(tier.io_pid, signal.SIGKILL)
    rig.wait(lambda: tier.state is TierState.DOWN, "it is down")
    assert tier.lookup(make_key(1), rig.request) is LookupResult.MISS
    rig.wait_up()
    assert [rig.lookup(number) for number in range(16)] == [LookupResult.HIT] * 16
    assert rig.load(range(16))[1] == list(range(16))


def test_the_nasty_one(rig, tmp_path):
    """Stopped in mid-store, given up, slots reused after the answer, woken, restarted: no wrong byte."""
    tier = disk_tier(rig, tmp_path)
    tier._supervisor._deadlines = QUICK.deadlines
    rig.wait_up()
    pid = tier.io_pid
    jobs = [submit_store(rig, [number], first_slot=number) for number in range(32)]
    os.kill(pid, signal.SIGSTOP)
    for job in jobs:
        rig.finish(job)
        for slot in range(32):
            if slot + 1 == job:  # answered: the slot is somebody else's from now on
                rig.fill(slot, make_payload(1000 + slot, rig.block_bytes))
    assert not is_alive(pid) or all(rig.results[job].success for job in jobs)
    if is_alive(pid):
        os.kill(pid, signal.SIGCONT)
    rig.wait_up()
    _, loaded = rig.load(range(32), first_slot=32)
    stored = [number for number, job in enumerate(jobs) if succeeded(rig.results[job], make_key(number))]
    assert set(stored) <= set(loaded)
