"""Lookups with a disk below: vLLM's manager with its filesystem tier, and kvtier's with its disk.

Both are asked by vLLM's own lookup of a prefix, step by step, until it has an answer. Times are microseconds of CPU of
the scheduler's thread. Between two steps it pauses, as an engine that computes does, so that other threads can answer.
"""

from __future__ import annotations

import mmap
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.v1.kv_offload import base
from vllm_managers import TOKENS_PER_BLOCK, Hashes, HashSource, Rig, adapter_over

BLOCK_BYTES = 4096
STEP_SECONDS = 0.005
MOST_STEPS = 2000
NUM_REPEATED = 50


class DiskRig(Rig):
    """A manager over host memory and a disk, asked by vLLM's own lookup of a prefix."""

    def __init__(self, manager: Any, hold: Callable[[], Callable[[], None]]) -> None:
        """Args: hold: stops all reads from the disk, and returns what lets them go on."""
        super().__init__(manager)
        self._hold, self._pause = hold, threading.Event()

    def fill(self, hashes: Hashes) -> None:
        """Store blocks, a part per step, and wait until the disk has them."""
        for start in range(0, len(hashes), 256):
            self.store(hashes[start : start + 256])
            self._wait(lambda: not self.manager.has_pending_work())

    def _wait(self, done: Callable[[], bool]) -> None:
        for _ in range(MOST_STEPS):
            if done():
                return
            self._pause.wait(STEP_SECONDS)
            self.step()
        raise RuntimeError("the benchmark's disk does not get ready")

    def _scan(self, keys: list[Any], context: Any) -> tuple[int | None, float, float]:
        """Look a prefix up and end the step; return the number of hits, and the microseconds of both."""
        start = time.thread_time()
        hits = prefix_lookup(self.manager, keys, context)
        scanned = time.thread_time()
        self.step()
        return hits, 1e6 * (scanned - start), 1e6 * (time.thread_time() - scanned)

    def absent(self, hashes: Hashes) -> float:
        """Return the microseconds until keys that nobody has stored are known to be absent, all steps together."""
        context, keys = self.begin(hashes)
        total = 0.0
        for _ in range(MOST_STEPS):
            hits, scan, end = self._scan(keys, context)
            total += scan + end
            if hits is not None:
                break
            self._pause.wait(STEP_SECONDS)
        if hits != 0:
            raise RuntimeError(f"the benchmark's absent keys had {hits} hits")
        self.end(context)
        return total

    def waiting(self, hashes: Hashes) -> tuple[float, float]:
        """Return the microseconds of a repeated scan and its step's end, while blocks on the disk do not arrive."""
        release = self._hold()
        context, keys = self.begin(hashes)
        for _ in range(20):  # until all loads are under way
            self._scan(keys, context)
            self._pause.wait(STEP_SECONDS)
        repeated = [self._scan(keys, context) for _ in range(NUM_REPEATED)]
        if any(hits is not None for hits, _, _ in repeated):
            raise RuntimeError("the benchmark's request does not wait")
        release()
        return statistics.median(scan for _, scan, _ in repeated), statistics.median(end for _, _, end in repeated)


def prefix_lookup(manager: Any, keys: list[Any], context: Any) -> int | None:
    """Run the lookup of vLLM's scheduler; None if it defers the request."""
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler

    scheduler = SimpleNamespace(manager=manager, _events_tracker=SimpleNamespace(record_lookup=lambda *_: None))
    hits: int | None = OffloadingConnectorScheduler._maximal_prefix_lookup(scheduler, keys, context, None, None, 0)
    return hits


@contextmanager
def vllm_with_disk(folder: Path, num_blocks: int) -> Iterator[DiskRig]:
    """Give vLLM's manager with its filesystem tier."""
    from vllm.v1.kv_offload import config as kinds
    from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager
    from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager, TieringOffloadingManager

    memory = mmap.mmap(-1, num_blocks * BLOCK_BYTES)
    view = memoryview(memory).cast("B", (num_blocks, BLOCK_BYTES))
    config = kinds.OffloadingConfig(
        groups=(kinds.OffloadingGroupConfig(TOKENS_PER_BLOCK, ("layer",), 0),),
        worker_kv_bytes_per_block=BLOCK_BYTES,
        enable_kv_cache_events=False,
        extra_config={},
        engine_id="benchmark",
        model=kinds.OffloadingModelConfig("benchmark", "float16"),
        cache=kinds.OffloadingCacheConfig(TOKENS_PER_BLOCK, 1),
        parallel=kinds.OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, True),
    )
    spec = SimpleNamespace(
        config=config, blocks_per_chunk=1, kv_events_config=base.OffloadingKVEventsConfig(False, False)
    )
    tier = FileSystemTierManager(spec, view, "fs", root_dir=str(folder))
    region = SimpleNamespace(create_kv_memoryview=lambda: view, cleanup=lambda: None)
    manager = TieringOffloadingManager(CPUPrimaryTierOffloadingManager(num_blocks, region), [tier])
    pool, held = tier._pool, threading.Event()

    def hold() -> Callable[[], None]:
        tasks = [held.wait] * len(pool._threads)
        pool.enqueue_load(-1, len(tasks), tasks)
        return held.set

    try:
        yield DiskRig(manager, hold)
    finally:
        held.set()
        manager.shutdown()


@contextmanager
def kvtier_with_disk(folder: Path, num_blocks: int) -> Iterator[DiskRig]:
    """Give kvtier's manager with its disk, as vLLM calls it."""
    from kvtier.config import KVCacheGroup, OffloadingConfig
    from kvtier.namespace import Namespace
    from kvtier.spec.tiering import TieringOffloadingSpec

    capacity = num_blocks * BLOCK_BYTES
    tier = {"type": "disk", "path": str(folder / "disk"), "capacity": 4 * capacity, "job_deadline": 600}
    extra = {"cpu_bytes_to_use": capacity, "secondary_tiers": [tier], "load_deadline": 600, "tier_deadline": 600}
    config = OffloadingConfig(
        extra_config=extra,
        groups=(KVCacheGroup(TOKENS_PER_BLOCK, ("layer",)),),
        engine_block_bytes=BLOCK_BYTES,
        namespace=Namespace({"benchmark": "vLLM with a disk"}),
    )
    spec = TieringOffloadingSpec(config)
    inner = spec.get_manager()
    spec.wait_for_tiers(30)

    def hold() -> Callable[[], None]:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for pid in children:
            os.kill(int(pid), signal.SIGSTOP)
        return lambda: [os.kill(int(pid), signal.SIGCONT) for pid in children] and None

    rig = DiskRig(adapter_over(inner, spec.arena.control, spec.shutdown), hold)
    try:
        yield rig
    finally:
        rig.manager.shutdown()


def measure_disks(sizes: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Return one row per number of keys and question, with microseconds by manager."""
    hashes, rows = HashSource(), []
    for size in sizes:
        times: dict[str, dict[str, list[float]]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(rounds):
                prompt, others = hashes.take(size), hashes.take(2 * size)
                absent = [hashes.take(size) for _ in range(5)]
                for name, make in (("vLLM", vllm_with_disk), ("kvtier", kvtier_with_disk)):
                    with tempfile.TemporaryDirectory(dir=folder) as place, make(Path(place), 2 * size) as rig:
                        rig.fill(prompt)
                        rig.fill(others)  # host memory has only these now
                        first = statistics.median(rig.absent(one) for one in absent)
                        scan, end = rig.waiting(prompt)
                    found = {"absent": first, "waiting: a repeated scan": scan, "waiting: end of the step": end}
                    for question, microseconds in found.items():
                        times.setdefault(question, {}).setdefault(name, []).append(microseconds)
        rows += [
            {"keys": size, "question": question} | {name: statistics.median(us) for name, us in by.items()}
            for question, by in times.items()
        ]
    return rows


def report_disks(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print("\nmicroseconds of CPU per request, with a disk below\n")
    print("| keys | | vLLM | kvtier | vLLM / kvtier |")
    print("|---|---|---|---|---|")
    for row in rows:
        ratio = row["vLLM"] / row["kvtier"]
        print(f"| {row['keys']:,} | {row['question']} | {row['vLLM']:,.0f} | {row['kvtier']:,.1f} | {ratio:,.1f} |")
