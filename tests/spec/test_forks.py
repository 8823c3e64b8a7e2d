"""A forked child shares the arena, the sockets and the processes of its parent: it uses none of them, and ends none."""

import logging
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from forked_child import ALL_WAYS, by_os, tell, without_the_interpreter

from kvtier.clock import monotonic_clock
from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.errors import BlockNotReadyError
from kvtier.events import RequestWaited, TierState
from kvtier.executors.base import StoreDescription
from kvtier.executors.inline import InlineExecutor
from kvtier.executors.threads import ThreadExecutor
from kvtier.keys import make_offload_key
from kvtier.namespace import Namespace
from kvtier.primary.arena import arena_rows
from kvtier.primary.copies import KVCaches
from kvtier.recording.reader import read_recording
from kvtier.recording.stream import Recorder
from kvtier.spec.tiering import TieringOffloadingSpec
from kvtier.testing.patience import wait_for
from kvtier.types import (
    GPULoadStoreSpec,
    JobMetadata,
    LookupResult,
    ReqContext,
    ScheduleEndContext,
)

BLOCK_BYTES = 4096
NUM_BLOCKS = 16


def make_keys(name, count=8):
    return [make_offload_key(f"{name}/{index}".encode().ljust(32), 0) for index in range(count)]


def content(key):
    return key.ljust(64, b".") * (BLOCK_BYTES // 64)


class Engine:
    """A spec with everything that a fork shares: an arena, a tier with a process, a recording with another one."""

    def __init__(self, folder, **more):
        keys = {
            "cpu_bytes_to_use": NUM_BLOCKS * BLOCK_BYTES,
            "secondary_tiers": [{"type": "disk", "path": str(folder / "blocks"), "capacity": "4MiB"}],
            "load_deadline": 3000.0,
            "prefill_rate": 1.0,  # so slow that the tests wait for a disk on a busy machine
            "record": str(folder / "recording"),
            **more,
        }
        config = OffloadingConfig(keys, (KVCacheGroup(16, ("layer",)),), BLOCK_BYTES, namespace=Namespace({"m": "x"}))
        self.spec = TieringOffloadingSpec(config)
        self.num_requests = 0

    def open(self):
        self.manager, self.arena = self.spec.get_manager(), self.spec.arena
        self.worker = self.spec.get_worker(KVCaches([np.ones((NUM_BLOCKS, BLOCK_BYTES), np.uint8)]))
        wait_for(lambda: set(self.states().values()) <= {TierState.UP}, "the tier")
        return self

    def states(self):
        self.step()
        return {name: state for name, (state, _) in self.manager.tier_states().items()}

    @property
    def tier(self):
        return self.manager._tiers[0].tier

    def step(self):
        self.manager.on_schedule_end(ScheduleEndContext())

    def request(self):
        self.num_requests += 1
        context = ReqContext(f"r{self.num_requests}")
        self.manager.on_new_request(context)
        return context

    def store(self, keys):
        context = self.request()
        output = self.manager.prepare_store(keys, context)
        self.fill(output)
        self.manager.complete_store(output.keys_to_store, context)
        self.manager.on_request_finished(context)
        wait_for(lambda: self.step() or not self.manager.has_pending_work(), "the tier to store")

    def fill(self, output):
        for key, slot in zip(output.keys_to_store, output.store_spec.block_ids.tolist(), strict=True):
            self.arena.row(slot)[:] = content(key)

    def load(self, keys):
        """Load all of `keys` and compare."""
        context = self.request()

        def are_ready():
            answers = [self.manager.lookup(key, context) for key in keys]
            self.step()
            assert LookupResult.MISS not in answers
            return set(answers) == {LookupResult.HIT}

        wait_for(are_ready, "the blocks")
        slots = self.manager.prepare_load(keys, context).block_ids.tolist()
        assert [bytes(self.arena.row(slot)) for slot in slots] == [content(key) for key in keys]
        self.manager.complete_load(keys, context)
        self.manager.on_request_finished(context)

    def use_as_a_worker_would(self, keys):
        """What a pre-forked worker does, from lookup to the end; return what it was told."""
        context, told = self.request(), {}
        told["lookups"] = sorted({self.manager.lookup(key, context).name for key in keys})
        told["prefix"] = self.manager.lookup_prefix(keys, context)
        told["store"] = self.manager.prepare_store(make_keys("child"), context)
        try:
            told["load"] = str(self.manager.prepare_load(keys, context))
        except BlockNotReadyError:
            told["load"] = None
        self.manager.complete_store(make_keys("child"), context)
        self.manager.complete_load(keys, context)
        self.manager.on_request_finished(context)
        self.step()
        told["pending"], told["states"] = self.manager.has_pending_work(), self.manager.tier_states()
        self.manager.reset_cache()
        self.manager.check_invariants()
        return told


NOTHING = {"lookups": ["MISS"], "prefix": [0, 0], "store": None, "load": None, "pending": False, "states": {}}


@pytest.fixture
def engine(tmp_path):
    engine = Engine(tmp_path).open()
    yield engine
    engine.spec.shutdown()


@pytest.mark.parametrize("fork", ALL_WAYS)
def test_a_child_finds_and_stores_nothing_and_its_parent_never_notices(engine, tmp_path, fork):
    in_memory, on_disk = make_keys("new"), make_keys("old")
    engine.store(on_disk)
    engine.store(in_memory)
    engine.store(make_keys("last"))
    io_pid = engine.tier.io_pid

    def child():
        told = engine.use_as_a_worker_would(in_memory)
        assert engine.use_as_a_worker_would(on_disk) == told
        engine.arena.view.cast("B")[:] = bytes(NUM_BLOCKS * BLOCK_BYTES)  # whoever still writes, writes into its own
        engine.spec.shutdown()
        engine.spec.shutdown()
        return told

    assert tell(fork, child) == NOTHING
    engine.load(make_keys("last"))
    engine.load(on_disk)
    engine.store(make_keys("later"))
    engine.load(make_keys("later"))
    engine.manager.check_invariants()
    assert (engine.tier.io_pid, engine.states()) == (io_pid, {"disk": TierState.UP})
    num_requests = engine.num_requests
    engine.spec.shutdown()
    _, records = read_recording(tmp_path / "recording")
    assert len({record.request for record in records} - {0}) == num_requests


def test_a_child_that_uses_the_cache_says_so_once_and_with_the_remedy(engine):
    def said_during(call):
        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("kvtier").addHandler(handler)
        call()
        return said

    def use_twice():
        engine.use_as_a_worker_would(make_keys("any"))
        engine.use_as_a_worker_would(make_keys("any"))
        engine.spec.shutdown()

    (said,) = tell(by_os, lambda: said_during(use_twice))
    assert "fork" in said
    assert "--preload" in said
    assert tell(by_os, lambda: said_during(engine.spec.shutdown)) == []


@pytest.mark.parametrize("call", ["shutdown", "reset_cache", "prepare_load", "complete_store"])
@pytest.mark.parametrize("fork", [by_os, without_the_interpreter])
def test_whichever_call_comes_first_in_a_child_reaches_nothing_of_the_parents(engine, tmp_path, fork, call):
    engine.store(make_keys("stored"))
    io_pid, context, keys = engine.tier.io_pid, engine.request(), make_keys("on its way", 4)
    output = engine.manager.prepare_store(keys, context)
    arguments = {"prepare_load": (make_keys("stored"), context), "complete_store": (keys, context)}.get(call, ())

    def child():
        with suppress(BlockNotReadyError):
            assert not getattr(engine.manager, call)(*arguments)
        engine.manager.check_invariants()
        assert engine.manager.get_stats()["primary.blocks"] == 0
        return engine.manager.tier_states()

    assert tell(fork, child) == {}
    for key, slot in zip(keys, output.store_spec.block_ids.tolist(), strict=True):
        engine.arena.row(slot)[:] = content(key)
    engine.manager.complete_store(keys, context)
    engine.load([*keys])
    engine.load(make_keys("stored"))
    assert (engine.tier.io_pid, engine.states()) == (io_pid, {"disk": TierState.UP})
    num_requests = engine.num_requests
    engine.spec.shutdown()
    _, records = read_recording(tmp_path / "recording")
    assert {record.request for record in records} == set(range(num_requests + 1))


def test_a_fork_in_c_is_noticed_under_a_kernel_that_wipes_no_page():
    program = """
import ctypes, mmap, os

class OldKernel(mmap.mmap):
    def madvise(self, *arguments):
        raise OSError(22, "Invalid argument")

mmap.mmap = OldKernel
from kvtier import forks

class Owner:
    left = False
    def leave_to_parent(self):
        self.left = True

owner = Owner()
forks.register(owner)
forks.notice()
assert not owner.left
pid = ctypes.PyDLL(None).fork()
if pid == 0:
    forks.notice()
    os._exit(owner.left)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
assert not owner.left
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_child_keeps_no_descriptor_of_its_parents(tmp_path):
    def opened():
        return {entry.name for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}

    before = opened()
    with Engine(tmp_path).open().spec:
        ours = opened() - before
        assert len(ours) >= 4  # arena, socket, pidfd, pipe
        assert not ours & set(tell(by_os, lambda: sorted(opened())))


def test_calls_that_were_looked_up_before_the_fork_miss_too(engine):
    keys = make_keys("bound")
    engine.store(keys)
    context, lookup = engine.request(), engine.manager.lookup
    assert lookup(keys[0], context) is LookupResult.HIT
    assert tell(by_os, lambda: [lookup(key, context).name for key in keys]) == ["MISS"] * len(keys)


def test_a_fork_in_the_middle_of_a_call_loads_nothing_in_the_child(engine):
    """By an observer: the call goes on in both processes."""
    keys, storing, context = make_keys("forked"), engine.request(), engine.request()
    stored = engine.manager.prepare_store(keys, storing)
    engine.fill(stored)
    assert engine.manager.lookup(keys[0], context) is LookupResult.HIT_PENDING
    engine.step()
    engine.manager.complete_store(keys, storing)
    reader, writer = os.pipe()

    class Forking:
        pid = None

        def on_event(self, event):
            if isinstance(event, RequestWaited):
                self.pid = os.fork()

    observer = Forking()
    engine.spec.observers.add(observer)
    assert {engine.manager.lookup(key, context) for key in keys} == {LookupResult.HIT}
    try:
        slots, answer = engine.manager.prepare_load(keys, context).block_ids.tolist(), b"slots"
    except BlockNotReadyError:
        slots, answer = [], b"nothing"
    if observer.pid == 0:
        os.write(writer, answer)
        os._exit(0)
    os.waitpid(observer.pid, 0)
    assert os.read(reader, 100) == b"nothing"
    assert [bytes(engine.arena.row(slot)) for slot in slots] == [content(key) for key in keys]
    engine.manager.complete_load(keys, context)
    engine.manager.on_request_finished(context)
    engine.manager.check_invariants()
    os.close(reader)
    os.close(writer)


def test_a_tier_that_a_child_asks_by_itself_has_nothing_and_takes_nothing(engine):
    keys = make_keys("tier")
    engine.store(keys)
    tier, context = engine.tier, ReqContext("r")
    job = JobMetadata(9, make_keys("other"), np.arange(8, dtype=np.int32), False, context)

    def child():
        tier.submit_store(job)
        answers = [tier.lookup(key, context).name for key in keys]
        results = [result.success for result in tier.get_finished_jobs()]
        tier.drain_jobs()
        tier.start_epoch(b"x" * 16)
        tier.start()
        tier.shutdown()
        tier.check_invariants()
        return [answers, results, tier.state.value, tier.io_pid]

    assert tell(by_os, child) == [["MISS"] * 8, [False], "closed", None]
    engine.load(keys)


def test_a_worker_in_a_child_copies_nothing(engine):
    keys = make_keys("copy")
    context = engine.request()
    output = engine.manager.prepare_store(keys, context)
    pages = GPULoadStoreSpec(range(len(keys)))

    def child():
        engine.worker.submit_store(1, pages, output.store_spec)
        engine.worker.submit_load(2, output.store_spec, pages)
        return [result.success for result in engine.worker.get_finished()]

    assert tell(by_os, child) == [False, False]
    slots = output.store_spec.block_ids.tolist()
    assert not any(np.asarray(engine.arena.view)[slots].ravel())
    engine.manager.complete_store(keys, context, success=False)


def test_a_spec_that_had_made_nothing_works_in_a_child(tmp_path):
    engine = Engine(tmp_path)

    def child():
        engine.open()
        engine.store(make_keys("own"))
        engine.load(make_keys("own"))
        engine.spec.shutdown()
        return True

    assert tell(by_os, child)


def test_a_spec_makes_nothing_over_its_parents_arena(tmp_path):
    with Engine(tmp_path).spec as spec:
        assert spec.arena.view.shape == (NUM_BLOCKS, BLOCK_BYTES)

        def child():
            with pytest.raises(RuntimeError, match="parent"):
                spec.get_manager()
            return True

        assert tell(by_os, child)
        spec.get_manager()


def test_a_child_may_make_a_cache_of_its_own(engine, tmp_path):
    (tmp_path / "child").mkdir()

    def child():
        own = Engine(tmp_path / "child").open()
        own.store(make_keys("own"))
        own.load(make_keys("own"))
        grandchild = tell(by_os, lambda: own.use_as_a_worker_would(make_keys("own")))
        own.load(make_keys("own"))
        own.spec.shutdown()
        return grandchild

    assert tell(by_os, child) == NOTHING


def test_locks_that_a_thread_held_at_the_fork_keep_no_child_waiting():
    memory = np.zeros((4, BLOCK_BYTES), np.uint8)
    description = StoreDescription(
        "kvtier.stores.memory:MemoryStore", {"capacity": 1 << 20}, Namespace({"m": 1}), 4, BLOCK_BYTES
    )
    executor = ThreadExecutor(description, arena_rows(memoryview(memory)))
    executor.start()
    with executor._arena_lock, executor._loop._queue._lock:  # as one of its threads does for a moment

        def child():
            executor.retire()
            executor.kill()
            executor.cancel([1])
            executor.wait(0.01)
            return [len(executor.poll()), executor.has_ended()]

        assert tell(by_os, child) == [0, True]
    executor.kill()


def test_a_store_that_the_parent_runs_itself_is_not_closed_by_a_child(tmp_path):
    memory = np.zeros((4, BLOCK_BYTES), np.uint8)
    description = StoreDescription(
        "kvtier.stores.memory:MemoryStore", {"capacity": 1 << 20}, Namespace({"m": 1}), 4, BLOCK_BYTES
    )
    executor = InlineExecutor(description, arena_rows(memoryview(memory)))
    executor.start()
    runner = executor._runner

    def child():
        runner.close = lambda: (tmp_path / "closed").touch()
        executor.probe(1, make_keys("any"))
        executor.poll()
        executor.retire()
        executor.kill()
        return (tmp_path / "closed").exists()

    assert tell(by_os, child) is False
    executor.retire()


def test_a_recording_is_not_written_by_a_child(tmp_path):
    recorder = Recorder(str(tmp_path / "recording"), Engine(tmp_path).spec.recording_header(), monotonic_clock)
    recorder.start()
    recorder.note(b"N", 1, bytes(8))

    def child():
        recorder.note(b"N", 2, bytes(8))
        recorder.flush()
        recorder.close()
        return recorder.active

    assert tell(by_os, child) is False
    recorder.note(b"E", 1)
    recorder.close()
    wait_for(lambda: recorder._writer.poll() is not None, "the process that writes")
    _, records = read_recording(tmp_path / "recording")
    assert [(record.kind, record.request) for record in records] == [(b"N", 1), (b"E", 1)]


def test_a_child_that_is_forked_while_the_recording_is_written_keeps_no_pipe(tmp_path):
    recorder = Recorder(str(tmp_path / "recording"), Engine(tmp_path).spec.recording_header(), monotonic_clock)
    recorder.start()
    with memoryview(recorder._buffer):  # as the thread that writes has one

        def child():
            recorder.note(b"N", 2, bytes(8))
            recorder.close()
            return recorder._pipe.is_ours()

        assert tell(by_os, child) is False
    recorder.close()
    assert not list(read_recording(tmp_path / "recording")[1])


ENDS_NORMALLY = """
import sys
sys.path[:0] = {folders!r}
from pathlib import Path
from test_forks import Engine, make_keys
import os
engine = Engine(Path({folder!r})).open()
engine.store(make_keys("new"))
io_pid = engine.tier.io_pid
pid = os.fork()
if pid == 0:
    sys.exit(0)  # destructors and exit handlers run
assert os.waitpid(pid, 0)[1] == 0
engine.store(make_keys("later"))
engine.load(make_keys("new"))
engine.load(make_keys("later"))
assert engine.tier.io_pid == io_pid
engine.spec.shutdown()
"""


def test_a_child_that_ends_as_a_program_does_ends_nothing_else(tmp_path):
    code = ENDS_NORMALLY.format(
        folders=[str(Path(__file__).parent), str(Path(__file__).parents[1])], folder=str(tmp_path)
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_process_that_dies_is_replaced_by_the_parent_alone(engine):
    io_pid = engine.tier.io_pid
    tell(by_os, lambda: engine.use_as_a_worker_would(make_keys("any")))
    os.kill(io_pid, signal.SIGKILL)
    wait_for(lambda: engine.states() == {"disk": TierState.UP} and engine.tier.io_pid != io_pid, "another process")
    engine.store(make_keys("later"))
    engine.load(make_keys("later"))
