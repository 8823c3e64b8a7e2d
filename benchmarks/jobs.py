"""What a job costs the scheduler's thread: its submission, the send, and the poll that brings its answer.

A disk tier with its I/O process stores and loads jobs of several sizes, one after the other. Its index is full, so that
stores evict. First the tier is called directly, as the tiering manager does. Then stores go through a
TieringOffloadingManager: `complete_store`, the end of the step, and the step that takes the answer in, less what the
same calls take in a manager without a tier. In the last part one step completes the stores of several requests.

Times are thread-CPU time: medians, and the quickest job. Other work of the machine stretches medians, since it fills
the processor's caches; the quickest job is near to what a quiet machine takes. Beside them stands the least job, its
quickest, too: one packet to a process that only answers it, and the change of a dict and an OrderedDict.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from control_plane import Keys
from rich.console import Console
from rich.table import Table

from kvtier.abc import TierContext
from kvtier.cli.disk_speed.scheduler import turns_for, work
from kvtier.eviction.lru import LRUPolicy
from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.primary.arena import Arena
from kvtier.primary.manager import CPUPrimaryTierOffloadingManager
from kvtier.secondary.disk import DiskTierManager
from kvtier.tiering.manager import TieringOffloadingManager
from kvtier.types import JobMetadata, ReqContext, ScheduleEndContext

sys.path.insert(0, str(Path(__file__).parent / "disk"))

from least_job import LeastJob

BLOCK_BYTES = 4096
"""Small, since the scheduler's thread does not touch the bytes."""
SLOTS = 4096
PATIENCE_SECONDS = 60.0
STEP = ScheduleEndContext()
TURNS = turns_for(0.0004)


class Spec:
    """Stands in for the engine's spec: a tier reads only its `tier_context`."""

    def __init__(self, tier_context: TierContext) -> None:
        self.tier_context = tier_context


@dataclass
class Parts:
    """Microseconds of the parts of each job: submission, send, answer."""

    jobs: list[tuple[float, float, float]] = field(default_factory=list)

    def medians(self) -> list[float]:
        """Return the median of each part, and of their sums the median and the least."""
        times = np.asarray(self.jobs)
        sums = times.sum(axis=1)
        return [*np.median(times, axis=0).tolist(), float(np.median(sums)), float(sums.min())]


def cpu_us(call: Callable[..., Any], *arguments: object) -> float:
    """Make a call and return its thread-CPU time in microseconds."""
    start = time.thread_time()
    call(*arguments)
    return 1e6 * (time.thread_time() - start)


def pause(times: int = 1) -> None:
    """Let the I/O process work. This thread runs Python meanwhile, as an engine's does: its caches stay warm."""
    for _ in range(times):
        work(TURNS)


def make_tier(folder: str, arena: Arena, name: str) -> DiskTierManager:
    """Return a disk tier that holds as many blocks as the arena."""
    spec = Spec(TierContext(namespace=Namespace({"model": "jobs"}), arena_fd=arena.fd))
    capacity = SLOTS * (BLOCK_BYTES + 256) + (1 << 20)
    tier = DiskTierManager(spec, arena.view, "disk", path=f"{folder}/{name}", capacity=capacity)
    tier.start()
    return tier


def wait(done: Callable[[], bool], step: Callable[[], object]) -> None:
    """Step until `done()`."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not done():
        if time.monotonic() > deadline:
            raise SystemExit("the tier does not answer")
        time.sleep(0.0005)
        step()


def move(tier: DiskTierManager, keys: Sequence[OffloadKey], number: int, is_load: bool) -> tuple[float, float, float]:
    """Move a job; return the microseconds of submission, send and answer."""
    first = number * len(keys) % (SLOTS - len(keys) + 1)
    slots = np.arange(first, first + len(keys), dtype=np.int32)
    job = JobMetadata(number, keys, slots, is_load, ReqContext(f"request-{number}"))
    submit = cpu_us(tier.submit_load if is_load else tier.submit_store, job)
    send = cpu_us(tier.on_schedule_end, STEP)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        pause()
        start = time.thread_time()
        results = list(tier.get_finished_jobs())
        answer = 1e6 * (time.thread_time() - start)
        if results:
            if not results[0].success:
                raise SystemExit("a job failed")
            return submit, send, answer
    raise SystemExit("the tier does not answer")


def measure_tier(folder: str, sizes: Sequence[int], num_jobs: int, keys: Keys) -> list[list[str]]:
    """Return rows of the tier's own calls."""
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as path:
        arena = Arena.create(SLOTS, BLOCK_BYTES)
        tier = make_tier(path, arena, "tier")
        wait(lambda: tier.state.value == "up", tier.get_finished_jobs)
        most = int(tier.get_stats()["capacity_blocks"])
        number = 0
        for start in range(0, most, 256):  # fills the index
            number += 1
            move(tier, keys.take(min(256, most - start)), number, False)
        for size in sizes:
            stores, loads = Parts(), Parts()
            for _ in range(num_jobs):
                number += 1
                some = keys.take(size)
                stores.jobs.append(move(tier, some, number, False))
                loads.jobs.append(move(tier, some, number, True))
            rows += [row("tier, store", size, stores), row("tier, load", size, loads)]
        idle = [cpu_us(lambda: list(tier.get_finished_jobs())) for _ in range(num_jobs)]
        rows.append(
            [
                "tier, poll without answers",
                "",
                "",
                "",
                "",
                f"{np.median(idle):.1f}",
                f"{min(idle):.1f}",
                "",
            ]
        )
        tier.shutdown()
    return rows


class Cascade:
    """Stores through a manager, with a tier or without one."""

    def __init__(self, arena: Arena, tier: DiskTierManager | None) -> None:
        primary = CPUPrimaryTierOffloadingManager(SLOTS, arena.view, LRUPolicy(SLOTS))
        self.manager = TieringOffloadingManager(primary, [] if tier is None else [tier])
        self._requests = 0
        wait(lambda: tier is None or tier.state.value == "up", self.step)

    def step(self) -> None:
        """End a step."""
        self.manager.on_schedule_end(STEP)

    def serve(self, batches: Sequence[list[OffloadKey]]) -> tuple[float, float, float]:
        """Store the blocks of some requests in one step; return the microseconds of completions, step and answer."""
        manager, contexts = self.manager, []
        for batch in batches:
            self._requests += 1
            contexts.append(ReqContext(f"request-{self._requests}"))
            manager.on_new_request(contexts[-1])
            manager.prepare_store(batch, contexts[-1])
        self.step()
        submit = 0.0
        for batch, context in zip(batches, contexts, strict=True):
            done = set(batch)
            submit += cpu_us(manager.complete_store, done, context)
        send = cpu_us(self.step)
        answer, deadline = 0.0, time.monotonic() + PATIENCE_SECONDS
        while True:
            pause(5)  # so that one step takes all answers in
            answer = cpu_us(self.step)
            if not manager.has_pending_work():
                break
            if time.monotonic() > deadline:
                raise SystemExit("the tier does not answer")
        for context in contexts:
            manager.on_request_finished(context)
        return submit, send, answer


def measure_cascades(folder: str, cases: Sequence[tuple[int, int]], num_jobs: int, keys: Keys) -> list[list[str]]:
    """Return rows of what the stores of a step cost with a tier, less what they cost without one.

    Args:
        cases: requests per step, and blocks per request.
    """
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as path:
        arena = Arena.create(SLOTS, BLOCK_BYTES)
        tier = make_tier(path, arena, "cascade")
        with_tier, without = Cascade(arena, tier), Cascade(arena, None)
        for cache in (with_tier, without):
            for _ in range(SLOTS // 256 + 2):  # fills memory and tier
                cache.serve([keys.take(256)])
        for num_requests, size in cases:
            found, bare = Parts(), Parts()
            for _ in range(num_jobs):
                found.jobs.append(with_tier.serve([keys.take(size) for _ in range(num_requests)]))
                bare.jobs.append(without.serve([keys.take(size) for _ in range(num_requests)]))
            less = [there - here for there, here in zip(found.medians(), bare.medians(), strict=True)]
            name = f"manager, {num_requests} stores a step" if num_requests > 1 else "manager, store"
            rows.append([name, str(size), *(f"{value:.1f}" for value in less), ""])
        with_tier.manager.shutdown()
        without.manager.shutdown()
    return rows


def least(size: int, keys: Keys) -> float:
    """Return the microseconds of the least job of `size` blocks."""
    job = LeastJob(size, keys.take(SLOTS), keys.take(SLOTS))
    times = []
    for _ in range(200):
        before = len(job.seconds)
        pause(5)
        took = cpu_us(job.run)
        if len(job.seconds) > before:
            times.append(took)
    job.close()
    return min(times, default=math.nan)


def row(name: str, size: int, parts: Parts) -> list[str]:
    """Return a row of the table."""
    return [name, str(size), *(f"{value:.1f}" for value in parts.medians()), ""]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=None, help="on the filesystem of the tier")
    parser.add_argument("--jobs", type=int, default=200, help="per row")
    options = parser.parse_args()
    keys = Keys()
    sizes = (1, 16, 256)
    table = Table(title="thread-CPU microseconds per job")
    for column in ("", "blocks", "submit", "send", "answer", "all", "quickest", "least job"):
        table.add_column(column, justify="right")
    rows = measure_tier(options.folder, sizes, options.jobs, keys)
    cases = [(1, 1), (1, 16), (1, 256), (16, 1), (16, 16)]
    rows += measure_cascades(options.folder, cases, options.jobs, keys)
    limits = {str(size): f"{least(size, keys):.1f}" for size in sizes}
    for each in rows:
        table.add_row(*each[:-1], limits.get(each[1], "") if "stores a step" not in each[0] else "")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
