"""Stores that cannot be written, go away, or cannot be asked for: what is left goes on, and comes back."""

import fcntl
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from fault_rigs import PATIENT, QUICK, Recorder, faulty_tier, make_rig
from requirements import need_mounts

from kvtier.abc import SlotStore
from kvtier.descriptors import Descriptor
from kvtier.events import TierState
from kvtier.executors.base import StoreDescription
from kvtier.executors.process import IOProcess
from kvtier.executors.protocol import Unavailable
from kvtier.executors.threads import ThreadExecutor
from kvtier.namespace import Namespace
from kvtier.primary.arena import Arena, arena_rows
from kvtier.primary.huge_pages import HugePages
from kvtier.secondary.disk import DiskTierManager
from kvtier.secondary.slotted import SlottedTierManager
from kvtier.testing.clock import ManualClock
from kvtier.testing.patience import PATIENCE_SECONDS, wait_for
from kvtier.testing.stores import make_key
from kvtier.types import LookupResult


@pytest.fixture
def rig():
    recorder = Recorder()
    rig = make_rig(observer=recorder)
    rig.recorder = recorder
    yield rig
    rig.close()


def test_a_medium_that_cannot_be_written_is_still_read(rig, tmp_path, caplog):
    bad = tmp_path / "bad"
    tier = faulty_tier(rig, {"fault": "raise", "calls": ["write"], "while_path": str(bad)})
    tier.start()
    rig.wait_up()
    pid = tier.io_pid
    assert rig.store(range(8)).success
    bad.touch()
    for number in range(10, 20):
        assert not rig.store([number]).success
        assert rig.load(range(8))[1] == list(range(8))
    assert tier.state is TierState.UP
    assert "stores failed" in tier.state_reason
    assert sum("stores failed" in message for message in caplog.messages) == 1
    bad.unlink()
    rig.wait(lambda: tier.can_store(1), "it is tried again")
    assert rig.store([10]).success
    assert tier.io_pid == pid


@pytest.mark.parametrize("inline", [True, False])
def test_a_directory_that_disappears_is_made_anew(tmp_path, inline, caplog):
    rig = make_rig(observer=Recorder(), inline_io=inline)
    try:
        path = tmp_path / "tier"
        tier = DiskTierManager(rig.spec, rig.arena.view, "disk", path=str(path), capacity="4MiB")
        rig.attach(tier)
        tier.start()
        rig.wait_up()
        assert rig.store(range(4)).success
        shutil.rmtree(path)
        assert not rig.store([5]).success
        rig.wait(lambda: tier.state is TierState.DOWN, "it is down")
        assert "removed" in tier.state_reason
        rig.wait_up()
        assert rig.lookup(1) is LookupResult.MISS
        assert rig.store(range(4)).success
        assert rig.load(range(4))[1] == [0, 1, 2, 3]
        assert sum("is down" in message for message in caplog.messages) == 1
        rig.assert_each_job_answered_once()
    finally:
        rig.close()


@pytest.mark.parametrize("options", [["x" * 100_000], [float("nan")], [object()]], ids=["long", "nan", "object"])
def test_options_too_large_for_a_message_leave_the_tier_down(rig, options):
    tier = faulty_tier(rig, *options)
    tier.start()
    assert tier.state is TierState.DOWN
    assert "options" in tier.state_reason
    assert tier.io_pid is None


def test_what_cannot_be_a_key_is_a_miss_and_harms_nobody(rig):
    tier = faulty_tier(rig, settings=PATIENT)
    tier.start()
    rig.wait_up()
    pid = tier.io_pid
    rig.store([1])
    odd = [b"", b"1234", b"x" * 69, "text", make_key(2)[:-1], make_key(3), make_key(3) + b"x"]
    rig.wait(
        lambda: all(answer is LookupResult.MISS for answer in [tier.lookup(key, rig.request) for key in odd]),
        "all are misses",
    )
    assert rig.lookup(1) is LookupResult.HIT
    assert tier.io_pid == pid


class HalfIndexStore(SlotStore):
    """Locks a file and cannot say what it holds."""

    def __init__(self, path):
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @classmethod
    def open(cls, options, context):
        return cls(options["path"])

    @property
    def num_slots(self):
        return 4

    def recover(self):
        yield [0], [make_key(0)]
        yield [1, 2], [make_key(1), make_key(2) + b"x"]

    def write(self, slots, keys, buffers):
        return [False] * len(slots)

    def read_into(self, slots, keys, buffers):
        return [False] * len(slots)

    def close(self):
        os.close(self.descriptor)


class HugeStore(HalfIndexStore):
    """Claims to have as many slots as a message can say."""

    @property
    def num_slots(self):
        return 2**32 - 1

    def recover(self):
        yield from ()


def test_a_store_that_claims_billions_of_slots_is_not_believed(rig, tmp_path):
    """An index of them would take the engine's memory."""
    options = {"path": str(tmp_path / "lock")}
    tier = SlottedTierManager(rig.spec, rig.arena.view, "huge", store=HugeStore, options=options)
    rig.attach(tier)
    tier.start()
    rig.wait(lambda: tier.state is TierState.DOWN, "it is down")
    assert "a store of 4294967295 slots" in tier.state_reason


def test_threads_let_go_of_a_store_whose_index_fails(tmp_path):
    path = str(tmp_path / "lock")
    description = StoreDescription(f"{__name__}:HalfIndexStore", {"path": path}, Namespace({}), 4, 4096)
    executor = ThreadExecutor(description, arena_rows(memoryview(bytearray(4 * 4096)).cast("B", (4, 4096))))
    executor.start()
    reports = []
    wait_for(lambda: reports.extend(executor.poll()) or any(isinstance(r, Unavailable) for r in reports), "its end")
    assert "different lengths" in reports[-1].reason
    executor.retire()
    wait_for(executor.has_ended, "it is over")
    HalfIndexStore(path).close()


def test_a_process_refuses_an_arena_of_another_size(tmp_path):
    options = {"path": str(tmp_path / "lock")}
    description = StoreDescription(f"{__name__}:HalfIndexStore", options, Namespace({}), 2, 4096)
    with Arena.create(16, 4096, huge_pages=HugePages.OFF) as arena:
        executor = IOProcess(description, Descriptor(os.dup(arena.fd)))
    executor.start()
    reports = []
    wait_for(lambda: reports.extend(executor.poll()) or any(isinstance(r, Unavailable) for r in reports), "its end")
    assert "arena_fd" in reports[-1].reason
    executor.kill()


def test_what_a_process_did_before_it_died_counts(rig):
    tier = faulty_tier(rig)
    tier.start()
    rig.wait_up()
    job = rig.submit([make_key(1)], [1], load=False)
    executor = tier._supervisor.executor
    executor.wait(PATIENCE_SECONDS)  # the answer is in the socket
    os.kill(tier.io_pid, 9)
    os.waitid(os.P_PID, tier.io_pid, os.WEXITED | os.WNOWAIT)
    assert rig.finish(job).success
    rig.wait(lambda: tier.state is TierState.DOWN, "it is down")


def test_an_io_process_may_open_as_many_files_as_the_system_allows(rig):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        tier = faulty_tier(rig, settings=QUICK)
        tier.start()
        rig.wait_up()
        assert resource.prlimit(tier.io_pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def children_of_this():
    """Processes that are not reaped yet; servers of other tests may be among them."""
    return {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def test_many_lives_leave_nothing_behind():
    with Arena.create(2, 4096) as arena:
        description = StoreDescription("no.such:Store", {}, Namespace({}), 2, 4096)
        before, children = len(os.listdir("/proc/self/fd")), children_of_this()
        for number in range(10):
            executor = IOProcess(description, Descriptor(arena.fd))
            executor.start()
            if number % 2:
                executor.kill()
            else:
                executor.retire()
            wait_for(executor.has_ended, "it is gone")
        assert len(os.listdir("/proc/self/fd")) <= before
        assert children_of_this() <= children


@pytest.mark.root
def test_a_disk_that_others_filled_goes_on_with_the_space_it_has(tmp_path):
    need_mounts()
    command = ["mount", "-t", "tmpfs", "-o", "size=5m", "kvtier-test", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount here")
    clock = ManualClock()
    rig = make_rig(clock=clock, inline_io=True)
    try:
        rig.attach(DiskTierManager(rig.spec, rig.arena.view, "disk", path=str(tmp_path / "t"), capacity="4MiB"))
        rig.tier.start()
        with open(tmp_path / "filler", "wb") as filler:
            filler.write(bytes((4 << 20) + (500 << 10)))
        while rig.store([rig.answers.total()]).success:
            pass
        held = rig.tier.get_stats()["blocks"]
        assert 20 <= held <= 80
        for number in range(100, 140):
            assert rig.store([number]).success, "it evicts, and learns"
        assert rig.load(range(124, 140))[1] == list(range(124, 140))
        assert rig.tier.get_stats()["blocks"] == held
        os.truncate(tmp_path / "filler", 4 << 20)
        clock.advance(5)
        for number in range(200, 230):
            assert rig.store([number]).success
        assert rig.tier.get_stats()["blocks"] == held + 30, "space that came back is used"
    finally:
        rig.close()
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_probes_without_answers_count_as_a_hang(rig, tmp_path):
    hang = tmp_path / "hang"
    hang.touch()
    tier = faulty_tier(rig, {"fault": "hang", "calls": ["contains"], "while_path": str(hang)})
    tier.start()
    rig.wait_up()
    pid = tier.io_pid
    assert tier.lookup(make_key(1), rig.request) is LookupResult.RETRY
    rig.wait(lambda: tier.state is TierState.DOWN, "it is down")
    assert "probes" in tier.state_reason
    hang.unlink()
    rig.wait_up()
    assert tier.io_pid != pid
    assert rig.lookup(1) is LookupResult.MISS


def test_a_block_that_can_be_neither_read_nor_deleted_is_not_offered_again_soon(tmp_path):
    clock = ManualClock()
    rig = make_rig(clock=clock, inline_io=True)
    try:
        faults = [{"fault": "flip_bit", "calls": ["read_into"]}, {"fault": "raise", "calls": ["delete"]}]
        tier = faulty_tier(rig, *faults)
        tier.start()
        rig.store([1])
        assert rig.load([1])[1] == []
        clock.advance(30)
        assert rig.lookup(1) is LookupResult.MISS
        rig.store([1])
        assert rig.lookup(1) is LookupResult.HIT, "it was stored anew"
    finally:
        rig.close()
