"""The loop that runs a store: it cuts parts into calls, runs what is queued, and joins the results.

All executors share it: the I/O process and the thread executor run it on several threads, the inline one when it is
polled.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence

from kvtier.executors.protocol import Part, PartResult, Probe, ProbeAnswer, Unavailable, Usage
from kvtier.executors.queue import TaskQueue
from kvtier.executors.runner import StoreRunner
from kvtier.types import FailureCause

_TARGET_BYTES_PER_CALL = 4 << 20
"""Large enough for a disk to be at its best, small enough that threads share a job."""
_MAX_BLOCKS_PER_CALL = 64

Move = Callable[[StoreRunner, Sequence[Part]], list[PartResult]]
"""Moves parts of one kind in one call into the store."""
JobReport = PartResult | ProbeAnswer | Unavailable | Usage


def blocks_per_call(block_bytes: int) -> int:
    """Return how many blocks one call into a store moves."""
    return max(1, min(_MAX_BLOCKS_PER_CALL, _TARGET_BYTES_PER_CALL // block_bytes))


class StoreLoop:
    """Tasks for a store. Threads may share it.

    Attributes:
        busy_at: when a task was last begun, in seconds of `time.monotonic`.
    """

    def __init__(self, block_bytes: int, threads: int = 1) -> None:
        """Args: threads: that share it. All but one of them may store at the same time: no load waits for a store."""
        self.blocks_per_call = blocks_per_call(block_bytes)
        self._queue = TaskQueue[Probe](max(1, threads - 1))
        self._joiner = Joiner()
        self.busy_at = time.monotonic()

    def put(self, task: Part | Probe) -> None:
        """Queue a task; a part is cut into calls."""
        if isinstance(task, Part):
            pieces = task.cut(self.blocks_per_call)
            self._joiner.expect(pieces)
            self._queue.put(*pieces)
        else:
            self._queue.put(task)

    def cancel(self, serials: Container[int]) -> list[PartResult]:
        """Take what has not begun of these jobs out of the queue; return what is to be reported now.

        That does not wait for the pieces of the same parts that run: they may take long.
        """
        return self._joiner.add(map(cancelled, self._queue.cancel(serials)), at_once=True)

    def close(self) -> None:
        """Begin no further task; `run` returns after the one that it is in."""
        self._queue.close()

    def run(
        self, runner: StoreRunner, move: Move, report: Callable[[Sequence[JobReport]], None], *, wait: bool = True
    ) -> None:
        """Do what is queued, until `close`; without `wait`, until nothing is queued."""
        while tasks := self._queue.take(self.blocks_per_call, wait=wait):
            self.busy_at = time.monotonic()
            reports: list[JobReport] = [runner.answer(task) for task in tasks if isinstance(task, Probe)]
            parts = [task for task in tasks if isinstance(task, Part)]
            if parts:
                reports += self._joiner.add(move(runner, parts))
                if not parts[0].is_load:
                    self._queue.end_store()
            reports += runner.usage_news()
            if runner.lost is not None:
                reports.append(Unavailable.because(runner.lost))
            report(reports)


class _OpenPart:
    """A part of which some pieces have not ended."""

    def __init__(self, num_pieces: int, now: float) -> None:
        self.num_left = num_pieces
        self.reported_at = now
        self.ended: list[PartResult] = []


class Joiner:
    """Joins the results of pieces, so that the scheduler's thread hears of a part once. Threads may share it."""

    def __init__(self, max_silent_seconds: float = 0.05) -> None:
        """Args: max_silent_seconds: a part that takes longer is reported in several results, which show progress."""
        self._max_silent_seconds = max_silent_seconds
        self._lock = threading.Lock()
        self._open: dict[tuple[int, int], _OpenPart] = {}

    def expect(self, pieces: Sequence[Part]) -> None:
        """Learn that these pieces, which nobody has begun, are one part."""
        if len(pieces) > 1:
            part = _OpenPart(len(pieces), time.monotonic())
            with self._lock:
                for piece in pieces:
                    self._open[piece.serial, piece.first] = part

    def add(self, results: Iterable[PartResult], *, at_once: bool = False) -> list[PartResult]:
        """Take the results of pieces that ended; return what should be reported now.

        Args:
            at_once: report these results, and those of the same parts that were held back, in any case.
        """
        now = time.monotonic()
        reported: list[PartResult] = []
        changed: dict[int, _OpenPart] = {}
        with self._lock:
            for result in results:
                part = self._open.pop((result.serial, result.first), None)
                if part is None:
                    reported.append(result)
                    continue
                part.num_left -= 1
                part.ended.append(result)
                changed[id(part)] = part
            for part in changed.values():
                if at_once or not part.num_left or now - part.reported_at > self._max_silent_seconds:
                    reported += join_results(part.ended)
                    part.ended, part.reported_at = [], now
        return reported


def join_results(results: Iterable[PartResult]) -> list[PartResult]:
    """Return results of one job as few as they can be said in: neighbours are joined."""
    joined: list[PartResult] = []
    run: list[PartResult] = []
    end = -1
    for result in sorted(results, key=lambda result: result.first):
        if result.first != end and run:
            joined.append(_join_run(run))
            run = []
        run.append(result)
        end = result.first + len(result.successes)
    if run:
        joined.append(_join_run(run))
    return joined


def _join_run(run: Sequence[PartResult]) -> PartResult:
    if len(run) == 1:
        return run[0]
    failures: Counter[FailureCause] = Counter()
    for result in run:
        failures.update(result.failures)
    return PartResult(
        run[0].serial,
        run[0].first,
        [success for result in run for success in result.successes],
        sum(result.num_bytes for result in run),
        dict(failures),
    )


def cancelled(part: Part) -> PartResult:
    """Return the answer to a part that never started."""
    count = part.num_blocks
    return PartResult(part.serial, part.first, [False] * count, failures={FailureCause.CANCELLED: count})
