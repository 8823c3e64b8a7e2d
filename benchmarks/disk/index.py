"""Measures the start of a disk tier with very many blocks: its duration, calls meanwhile, bytes on disk and in memory.

A new process measures, and prints a line of JSON. The records are real and sealed. The payloads are holes in files,
since a start does not read them.
"""

from __future__ import annotations

import gc
import hashlib
import json
import mmap
import os
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kvtier.abc import StoreContext, TierContext
from kvtier.cli.disk_speed.session import MeasuringSpec
from kvtier.errors import KVTierError
from kvtier.events import TierState
from kvtier.keys import OffloadKey, make_offload_key
from kvtier.namespace import Namespace
from kvtier.primary.arena import Arena
from kvtier.secondary.disk import DiskTierManager
from kvtier.stores.integrity.header import HEADER_BYTES
from kvtier.stores.integrity.plain_sealer import PlainSealer
from kvtier.stores.slab.layout import (
    FILESYSTEM_BYTES_PER_SEGMENT,
    FILESYSTEM_BYTES_PER_SLOT,
    FIXED_BYTES,
    SEGMENT_BYTES,
    SlabGeometry,
)
from kvtier.stores.slab.store import SlabStore
from kvtier.types import LookupResult, ReqContext

NUM_BLOCKS = 1_000_000
_BLOCK_BYTES = mmap.PAGESIZE
_NAMESPACE = Namespace({"model": "speed"})
_BATCH = 10_000
_SECONDS_TO_START = 120.0


@dataclass(frozen=True)
class IndexFigures:
    """Figures of a start.

    Attributes:
        seconds: time from `start` until the tier is UP.
        longest_call_ms: longest lookup and poll together until then.
        disk_bytes: bytes per block in the directory, without payloads.
        memory_bytes: bytes per block by which the scheduler's process has grown when the tier is UP.
        bare_seconds, bare_bytes: seconds to enter as many keys into a dict and an `OrderedDict`, and bytes per key.
    """

    num_blocks: int
    seconds: float
    longest_call_ms: float
    disk_bytes: float
    memory_bytes: float
    bare_seconds: float
    bare_bytes: float

    @property
    def records_per_second(self) -> float:
        """Records per second, including the start of the I/O process."""
        return self.num_blocks / self.seconds

    @property
    def bare_per_second(self) -> float:
        """Keys per second into two dictionaries, without disk, records and process."""
        return self.num_blocks / self.bare_seconds

    @classmethod
    def measure(cls, folder: Path, num_blocks: int = NUM_BLOCKS) -> Self:
        """Measure the start and the dictionaries, each in a new process.

        Raises:
            KVTierError: a process failed.
        """
        figures: dict[str, Any] = {}
        for what in _MEASUREMENTS:
            start = [sys.executable, __file__, what, str(folder), str(num_blocks)]
            done = subprocess.run(start, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise KVTierError(f"the measuring process failed with exit code {done.returncode}")
            figures |= json.loads(done.stdout)
        return cls(num_blocks, **figures)


def _key(number: int) -> OffloadKey:
    return make_offload_key(hashlib.sha256(number.to_bytes(8, "big")).digest(), 0)


def _capacity(num_blocks: int) -> int:
    per_slot = _BLOCK_BYTES + HEADER_BYTES + FILESYSTEM_BYTES_PER_SLOT
    segments = -(-num_blocks * _BLOCK_BYTES // SEGMENT_BYTES)
    return num_blocks * per_slot + (segments + 1) * FILESYSTEM_BYTES_PER_SEGMENT + FIXED_BYTES


def prepare(path: Path, num_blocks: int) -> None:
    """Make the directory of a slab with a record for every slot, and sparse files for the payloads."""
    capacity = _capacity(num_blocks)
    options = {"path": str(path), "capacity": capacity}
    SlabStore.open(options, StoreContext(_NAMESPACE, _BLOCK_BYTES)).close()
    geometry = SlabGeometry.of(capacity, _BLOCK_BYTES)
    folder = path / _NAMESPACE.fingerprint.hex()
    for segment in range(geometry.num_segments):
        with open(folder / f"data-{segment:05d}", "ab") as file:
            os.truncate(file.fileno(), geometry.segment_bytes(segment))
    sealer, payload = PlainSealer(_NAMESPACE), memoryview(bytes(_BLOCK_BYTES))
    with open(folder / "headers", "r+b") as file:
        for first in range(0, num_blocks, _BATCH):
            numbers = range(first, min(first + _BATCH, num_blocks))
            file.write(b"".join(sealer.seal([*map(_key, numbers)], [payload] * len(numbers), numbers).headers))


def measure_start(folder: Path, num_blocks: int) -> dict[str, float]:
    """Start a tier with `num_blocks` records, and measure calls, memory and disk space until it is UP."""
    path = folder / "index"
    prepare(path, num_blocks)
    headers = path / _NAMESPACE.fingerprint.hex()
    taken = sum(file.lstat().st_blocks * 512 for file in (path, *path.rglob("*")) if not file.name.startswith("data-"))
    if not headers.is_dir():
        raise KVTierError(f"{headers} is missing")
    with Arena.create(16, _BLOCK_BYTES) as arena:
        spec = MeasuringSpec(TierContext(namespace=_NAMESPACE, arena_fd=arena.fd))
        tier = DiskTierManager(spec, arena.view, "disk", path=str(path), capacity=_capacity(num_blocks))
        context, key = ReqContext("speed"), _key(num_blocks // 2)
        gc.collect()
        gc.freeze()
        gc.disable()
        before, longest, began = _resident_bytes(), 0.0, time.perf_counter()
        tier.start()
        while tier.state is not TierState.UP:
            start = time.perf_counter()
            tier.lookup(key, context)
            list(tier.get_finished_jobs())
            longest = max(longest, time.perf_counter() - start)
            if start - began > _SECONDS_TO_START or tier.state is TierState.DOWN:
                raise KVTierError(f"the tier did not start: {tier.state_reason}")
            time.sleep(0.0005)  # the pause between two steps of an idle scheduler
        seconds = time.perf_counter() - began
        memory = _resident_bytes() - before
        if tier.lookup(key, context) is not LookupResult.HIT or tier.get_stats()["blocks"] != num_blocks:
            raise KVTierError("the tier does not hold what was prepared")
        tier.shutdown()
    return {
        "seconds": seconds,
        "longest_call_ms": longest * 1e3,
        "disk_bytes": taken / num_blocks,
        "memory_bytes": memory / num_blocks,
    }


def measure_bare(folder: Path, num_blocks: int) -> dict[str, float]:
    """Enter keys into a dict and an `OrderedDict`, the least that an index with an order of eviction needs."""
    gc.disable()
    _key(0)
    before, seconds = _resident_bytes(), 0.0
    slot_of, queue = dict[OffloadKey, int](), OrderedDict[OffloadKey, None]()
    for first in range(0, num_blocks, _BATCH):
        keys = [_key(number) for number in range(first, min(first + _BATCH, num_blocks))]
        began = time.perf_counter()
        for slot, key in enumerate(keys, first):
            slot_of[key] = slot
            queue[key] = None
        seconds += time.perf_counter() - began
    return {"bare_seconds": seconds, "bare_bytes": (_resident_bytes() - before) / num_blocks}


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


_MEASUREMENTS: dict[str, Callable[[Path, int], dict[str, float]]] = {"start": measure_start, "bare": measure_bare}


def main() -> None:
    """Run the measurement that the first argument names."""
    print(json.dumps(_MEASUREMENTS[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))))


if __name__ == "__main__":
    main()
