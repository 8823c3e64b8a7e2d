"""LMCache's raw-block backend: slots in one file, a header per slot, without checksums, in LMCache's process.

Its calls of the device are an extension in Rust, which PyPI does not have. Where it is not installed, the same calls
are made from Python: pread and pwrite of a whole block, without the interpreter lock. LMCache's own messages between an
engine and its process are replaced by a pipe, so its time on the scheduler's thread says little.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
import threading
import time
from collections.abc import Iterable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import torch
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters.raw_block_l2_adapter import RawBlockL2Adapter, RawBlockL2AdapterConfig
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from lmcache.v1.storage_backend.raw_block.core import RawBlockCore
from peer import THREADS, Peer, PeerPlace, reserve_file

from kvtier.keys import OffloadKey
from kvtier.primary.arena import Arena
from kvtier.types import JobMetadata, JobResult, ScheduleEndContext

HAS_RUST = importlib.util.find_spec("lmcache_rust_raw_block_io") is not None
_HEADER_BYTES = 4096
_CATALOGUE_BYTES = 256 << 20
"""LMCache's default for its checkpoint of the index."""


class LMCachePeer(Peer):
    """Sends jobs to the process that runs LMCache's adapter over the same arena."""

    note = "" if HAS_RUST else "calls from Python"

    def __init__(self, place: PeerPlace) -> None:
        self.tier, self.block_bytes = self, place.block_bytes
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        place_there = (DupFd(place.arena_fd), place.folder, place.num_blocks, place.block_bytes)
        self._process = context.Process(target=serve, args=(theirs, *place_there), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()  # it has opened its file

    def can_store(self, num_blocks: int) -> bool:
        return True

    def submit_store(self, job: JobMetadata) -> None:
        self._pipe.send(("store", job.job_id, list(job.keys), job.block_ids.tolist()))

    def submit_load(self, job: JobMetadata) -> None:
        self._pipe.send(("load", job.job_id, list(job.keys), job.block_ids.tolist()))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        while self._pipe.poll():
            yield JobResult(*self._pipe.recv())

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Do nothing: the adapter has no steps."""

    def forget(self, keys: Sequence[OffloadKey]) -> None:
        self._pipe.send(("forget", 0, list(keys), []))

    def cpu_seconds_elsewhere(self) -> float:
        return time.clock_gettime((~(self._process.pid or 0) << 3) | 2)  # a process's CPU clock: clock_getcpuclockid(3)

    def close(self) -> None:
        self._pipe.close()  # its end
        self._process.join()


def serve(pipe: Connection, arena_fd: Any, folder: Path, num_blocks: int, block_bytes: int) -> None:
    """Run LMCache's adapter until the pipe ends."""
    server = LMCacheServer(pipe, Arena.attach(arena_fd.detach(), num_blocks, block_bytes), folder)
    try:
        while True:
            server.turn()
    except EOFError:
        server.adapter.close()


class LMCacheServer:
    """LMCache's adapter, with its threads and its index, and a pipe of jobs."""

    def __init__(self, pipe: Connection, arena: Arena, folder: Path) -> None:
        self._pipe, self._arena = pipe, arena
        path, slot_bytes = folder / "slots", arena.block_bytes + _HEADER_BYTES
        capacity = _CATALOGUE_BYTES + (arena.num_blocks + 2 * THREADS) * slot_bytes
        reserve_file(path, capacity)
        if not HAS_RUST:
            RawBlockCore._rawdev = _python_device  # type: ignore[method-assign]
        config = RawBlockL2AdapterConfig(
            device_path=str(path),
            slot_bytes=slot_bytes,
            capacity_bytes=capacity,
            num_store_workers=THREADS,
            num_load_workers=THREADS,
        )
        self.adapter = RawBlockL2Adapter(config)
        rows = torch.frombuffer(arena.view.cast("B"), dtype=torch.uint8).view(arena.num_blocks, arena.block_bytes)
        self._objects = [_memory_object(row) for row in rows]
        self._jobs: dict[int, int] = {}
        self._loads: dict[int, int] = {}
        self._ends = [self.adapter.get_store_event_fd(), self.adapter.get_load_event_fd()]
        pipe.send("ready")

    def turn(self) -> None:
        """Wait for a job or for an end of one, and pass it on."""
        for ready in wait([self._pipe, *self._ends]):
            if ready is self._pipe:
                self._begin(*self._pipe.recv())
            else:
                os.eventfd_read(int(ready))
        for task, result in self.adapter.pop_completed_store_tasks().items():
            self._pipe.send((self._jobs.pop(task), result.is_successful()))
        for task, num_blocks in list(self._loads.items()):
            bitmap = self.adapter.query_load_result(task)
            if bitmap is not None:
                del self._loads[task]
                self._pipe.send((self._jobs.pop(task), bitmap.popcount() == num_blocks))

    def _begin(self, what: str, job_id: int, keys: list[OffloadKey], slots: list[int]) -> None:
        names = [ObjectKey(bytes(key), "benchmark", 0) for key in keys]
        objects = [self._objects[slot] for slot in slots]
        match what:
            case "store":
                self._jobs[self.adapter.submit_store_task(names, objects)] = job_id
            case "load":
                task = self.adapter.submit_load_task(names, objects)
                self._jobs[task], self._loads[task] = job_id, len(names)
            case _:
                self.adapter.delete(names)


def _memory_object(row: torch.Tensor) -> TensorMemoryObj:
    shape = torch.Size([len(row)])
    metadata = MemoryObjMetadata(shape, torch.uint8, row.data_ptr(), len(row), 1, fmt=MemoryFormat.BINARY)
    return TensorMemoryObj(row, metadata, None)


class PythonDevice:
    """The calls of LMCache's extension that its posix engine makes."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        self._local = threading.local()

    def size_bytes(self) -> int:
        return os.fstat(self._descriptor).st_size

    def fixed_buffer_status(self) -> tuple[bool, int]:
        return False, 0

    def worker_error(self) -> None:
        """Return None: only the extension's own thread could fail."""

    def pwrite_from_buffer(self, offset: int, buffer: Any, payload_bytes: int, total_bytes: int) -> None:
        view = memoryview(buffer).cast("B")
        if total_bytes <= _HEADER_BYTES or len(view) < total_bytes:
            view = self._aligned(total_bytes)
            view[:payload_bytes] = memoryview(buffer).cast("B")[:payload_bytes]
        if os.pwrite(self._descriptor, view[:total_bytes], offset) != total_bytes:
            raise OSError("a write was cut short")

    def pread_into(self, offset: int, buffer: Any, payload_bytes: int, total_bytes: int) -> None:
        view = memoryview(buffer).cast("B")
        direct = total_bytes > _HEADER_BYTES and len(view) >= total_bytes
        target = view[:total_bytes] if direct else self._aligned(total_bytes)
        if os.preadv(self._descriptor, [target], offset) != total_bytes:
            raise OSError("a read was cut short")
        if not direct:
            view[:payload_bytes] = target[:payload_bytes]

    def _aligned(self, num_bytes: int) -> memoryview:
        """Return memory at a page's start, the thread's own: headers are Python's objects, which lie anywhere."""
        memory = getattr(self._local, "memory", None)
        if memory is None or len(memory) < num_bytes:
            memory = self._local.memory = memoryview(mmap.mmap(-1, max(num_bytes, _HEADER_BYTES)))
        return memory[:num_bytes]

    def close(self) -> None:
        os.close(self._descriptor)


def _python_device(core: RawBlockCore) -> PythonDevice:
    if core._raw is None:
        core._raw = PythonDevice(core.device_path)
    return core._raw
