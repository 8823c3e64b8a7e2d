"""Both roads on LMCache's own memory.

Two adapters, each with a disk tier of its own, store and load the same new objects in turn, in the same run, by tasks
of LMCache's interface. All bytes are compared after each load.
"""

from __future__ import annotations

import os
import select
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.config import L1MemoryManagerConfig
from lmcache.v1.distributed.memory_manager import L1MemoryManager
from lmcache.v1.platform import consume_fd

from kvtier.adapters.lmcache import KVTierL2Adapter
from kvtier.sizes import format_size

KIB, MIB = 1 << 10, 1 << 20
BLOCK_BYTES = 256 * KIB
OBJECT_BYTES = (256 * KIB, 2 * MIB)
ROADS = {"threads": False, "shared memory": True}
SECONDS = 60.0
RANK = ObjectKey.ComputeKVRank(1, 0, 1, 0)


class Pool:
    """LMCache's memory, with objects of one size in it: some to store, and as many to load into."""

    def __init__(self, num_bytes: int, object_bytes: int) -> None:
        config = L1MemoryManagerConfig(
            2 * num_bytes, False, align_bytes=BLOCK_BYTES, shm_name=f"lmcache_l1_pool_{os.getpid()}"
        )
        self.manager = L1MemoryManager(config)
        form = MemoryLayoutDesc([torch.Size([object_bytes // 2])], [torch.bfloat16])
        _, self.sources = self.manager.allocate(form, num_bytes // object_bytes)
        _, self.targets = self.manager.allocate(form, num_bytes // object_bytes)

    def fill(self, seed: int) -> None:
        noise = np.random.default_rng(seed)
        for one in self.sources:
            one.byte_array.cast("B")[:] = noise.bytes(one.get_size())
        for one in self.targets:
            one.byte_array.cast("B")[:] = bytes(one.get_size())

    def check(self) -> None:
        for source, target in zip(self.sources, self.targets, strict=True):
            assert bytes(source.byte_array.cast("B")) == bytes(target.byte_array.cast("B")), "wrong bytes"

    def close(self) -> None:
        self.manager.free([*self.sources, *self.targets])
        self.manager.close()


class Caller:
    """An adapter, called as LMCache does, and its I/O processes."""

    def __init__(self, folder: Path, pool: Pool, num_bytes: int, *, shared_memory: bool) -> None:
        before = set(psutil.Process().children(recursive=True))
        options = {
            "tiers": [{"type": "disk", "path": str(folder), "capacity": 4 * num_bytes}],
            "block_bytes": BLOCK_BYTES,
            "call_deadline": SECONDS,
            "shared_memory": shared_memory,
        }
        self.adapter = KVTierL2Adapter(options, pool.manager.get_l1_memory_desc())
        states = self.adapter.wait_for_tiers(SECONDS)
        assert all(state.value == "up" for state, _ in states.values()), states
        self.processes = [one for one in psutil.Process().children(recursive=True) if one not in before]

    def store(self, keys: list[Any], objects: list[Any]) -> None:
        task = self.adapter.submit_store_task(keys, objects)
        done = _await(self.adapter.get_store_event_fd(), self.adapter.pop_completed_store_tasks)
        assert done[task].is_successful(), "not stored"

    def load(self, keys: list[Any], objects: list[Any]) -> None:
        task = self.adapter.submit_load_task(keys, objects)
        found = _await(self.adapter.get_load_event_fd(), lambda: self.adapter.query_load_result(task))
        assert len(found.get_indices_list()) == len(keys), "not loaded"


def _await(descriptor: int, take: Callable[[], Any]) -> Any:
    while not (result := take()):
        assert select.select([descriptor], [], [], SECONDS)[0], "no result"
        consume_fd(descriptor)
    return result


class Meter:
    """GB/s, and processor seconds per GB of this process and of the I/O processes."""

    def __init__(self, num_bytes: int) -> None:
        self._gigabytes = num_bytes / 1e9
        self.rows: list[tuple[float, float, float]] = []

    @contextmanager
    def measure(self, processes: Sequence[psutil.Process]) -> Iterator[None]:
        before = time.perf_counter(), time.process_time(), _processor_seconds(processes)
        yield
        after = time.perf_counter(), time.process_time(), _processor_seconds(processes)
        wall, own, theirs = (end - start for start, end in zip(before, after, strict=True))
        self.rows.append((self._gigabytes / wall, own / self._gigabytes, theirs / self._gigabytes))

    def medians(self) -> tuple[float, ...]:
        return tuple(map(statistics.median, zip(*self.rows, strict=True)))


def _processor_seconds(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def measure(folder: Path, object_bytes: int, num_bytes: int, rounds: int) -> dict[tuple[str, str], Meter]:
    """Return the meters of both roads, by road and direction."""
    pool = Pool(num_bytes, object_bytes)
    callers = {
        name: Caller(folder / name, pool, num_bytes, shared_memory=is_shared) for name, is_shared in ROADS.items()
    }
    meters = {(name, what): Meter(num_bytes) for what in ("store", "load") for name in callers}
    try:
        for turn in range(rounds + 1):
            keys = [ObjectKey(b"%d:%d" % (turn, number), "model", RANK, 0, "") for number in range(len(pool.sources))]
            for name in list(callers) if turn % 2 else reversed(callers):
                caller = callers[name]
                pool.fill(turn)
                with meters[name, "store"].measure(caller.processes):
                    caller.store(keys, pool.sources)
                with meters[name, "load"].measure(caller.processes):
                    caller.load(keys, pool.targets)
                pool.check()
    finally:
        for caller in callers.values():
            caller.adapter.close()
        pool.close()
    for meter in meters.values():
        del meter.rows[0]  # files are allocated, and pages mapped
    return meters


def report(parent: Path | None, num_bytes: int, rounds: int) -> None:
    """Print the medians of both roads, per size of objects.

    Args:
        parent: of the tiers' folders; None for the system's folder for temporary files.
        num_bytes: in one round.
    """
    print("| object | | road | GB/s | LMCache's process, s/GB | I/O process, s/GB |\n|---|---|---|---|---|---|")
    for object_bytes in OBJECT_BYTES:
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            meters = measure(Path(folder), object_bytes, num_bytes, rounds)
        for (name, what), meter in meters.items():
            speed, own, theirs = meter.medians()
            print(f"| {format_size(object_bytes)} | {what} | {name} | {speed:.2f} | {own:.3f} | {theirs:.3f} |")
