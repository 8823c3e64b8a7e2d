"""LMCache's raw-block backend: slots in one file, a header per slot, without checksums, on threads in the process.

Its calls of the device are an extension in Rust, which PyPI does not have. Where it is not installed, the same calls
are made from Python: pread and pwrite of a whole block, without the interpreter lock.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters.raw_block_l2_adapter import RawBlockL2Adapter, RawBlockL2AdapterConfig
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from lmcache.v1.storage_backend.raw_block.core import RawBlockCore
from peer import THREADS, Peer, PeerPlace, reserve_file

from kvtier.keys import OffloadKey
from kvtier.types import JobMetadata, JobResult, ScheduleEndContext

HAS_RUST = importlib.util.find_spec("lmcache_rust_raw_block_io") is not None
_HEADER_BYTES = 4096
_CATALOGUE_BYTES = 256 << 20
"""LMCache's default for its checkpoint of the index."""


class LMCachePeer(Peer):
    """The adapter of LMCache's own process, with its threads and its index."""

    note = "" if HAS_RUST else "calls from Python"

    def __init__(self, place: PeerPlace) -> None:
        self.tier, self.block_bytes = self, place.block_bytes
        path, slot_bytes = place.folder / "slots", place.block_bytes + _HEADER_BYTES
        capacity = _CATALOGUE_BYTES + (place.num_blocks + 2 * THREADS) * slot_bytes
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
        self._adapter = RawBlockL2Adapter(config)
        rows = torch.frombuffer(place.view, dtype=torch.uint8).view(place.num_blocks, place.block_bytes)
        self._objects = [_memory_object(row) for row in rows]
        self._jobs: dict[int, int] = {}
        self._loads: set[int] = set()

    def can_store(self, num_blocks: int) -> bool:
        return True

    def submit_store(self, job: JobMetadata) -> None:
        task = self._adapter.submit_store_task(_names(job.keys), self._objects_of(job))
        self._jobs[task] = job.job_id

    def submit_load(self, job: JobMetadata) -> None:
        task = self._adapter.submit_load_task(_names(job.keys), self._objects_of(job))
        self._jobs[task] = job.job_id
        self._loads.add(task)

    def _objects_of(self, job: JobMetadata) -> list[Any]:
        return [self._objects[slot] for slot in job.block_ids.tolist()]

    def get_finished_jobs(self) -> Iterable[JobResult]:
        for task, result in self._adapter.pop_completed_store_tasks().items():
            yield JobResult(self._jobs.pop(task), result.is_successful())
        for task in list(self._loads):
            bitmap = self._adapter.query_load_result(task)
            if bitmap is not None:
                self._loads.remove(task)
                yield JobResult(self._jobs.pop(task), True)  # the comparison of the bytes finds a block that is missing

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Do nothing: the adapter has no steps."""

    def forget(self, keys: Sequence[OffloadKey]) -> None:
        self._adapter.delete(_names(keys))

    def close(self) -> None:
        self._adapter.close()


def _names(keys: Sequence[OffloadKey]) -> list[ObjectKey]:
    return [ObjectKey(bytes(key), "benchmark", 0) for key in keys]


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
