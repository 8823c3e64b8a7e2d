"""The loop that runs a store: it cuts parts into calls, runs what is queued, and joins the results.

All executors use it. The I/O process and the thread executor run it on several threads, the inline executor runs it
within `poll`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container, Iterable, Sequence

from kvtier.executors.base import CALL_BYTES, StoreDescription
from kvtier.executors.pieces import Piece, cut
from kvtier.executors.protocol import Chore, ChoreDone, Part, PartResult, Probe, ProbeAnswer, Unavailable, Usage
from kvtier.executors.queue import TaskQueue
from kvtier.executors.runner import StoreRunner
from kvtier.types import FailureCause

_MAX_BLOCKS_PER_CALL = 64

Move = Callable[[StoreRunner, Sequence[Piece]], list[PartResult]]
"""Moves pieces, all of them loads or all stores, in one call into the store."""
JobReport = PartResult | ProbeAnswer | ChoreDone | Unavailable | Usage


def blocks_per_call(block_bytes: int, call_bytes: int = CALL_BYTES) -> int:
    """Return how many blocks one call into a store moves."""
    return max(1, min(_MAX_BLOCKS_PER_CALL, call_bytes // block_bytes))


class StoreLoop:
    """Queues tasks for a store and runs them. Several threads may call its methods.

    Attributes:
        busy_at: when a task last began, in seconds of `time.monotonic`.
    """

    def __init__(self, description: StoreDescription, threads: int = 1) -> None:
        """Args: threads: that call `run`. All but one may store at the same time, so that no load waits for a store."""
        self.blocks_per_call = blocks_per_call(description.block_bytes, description.call_bytes)
        self._queue = TaskQueue[Piece, Probe | Chore](max(1, threads - 1))
        self._joiner = Joiner()
        self.busy_at = time.monotonic()

    def put(self, task: Part | Probe | Chore) -> None:
        """Queue a task. A part is cut into pieces, of one call each."""
        if isinstance(task, Part):
            pieces = cut(task, self.blocks_per_call)
            self._joiner.expect(pieces)
            self._queue.put(*pieces)
        else:
            self._queue.put(task)

    def cancel(self, serials: Container[int]) -> list[PartResult]:
        """Take the pieces of these jobs that have not begun out of the queue; return what to report now.

        This does not wait for running pieces of the same parts, which may take long.
        """
        return self._joiner.add(map(cancelled, self._queue.cancel(serials)), at_once=True)

    def close(self) -> None:
        """Begin no further task. `run` returns after its current one."""
        self._queue.close()

    def run(
        self, runner: StoreRunner, move: Move, report: Callable[[Sequence[JobReport]], None], *, wait: bool = True
    ) -> None:
        """Do what is queued, until `close` is called; without `wait`, until nothing is queued."""
        while tasks := self._queue.take(self.blocks_per_call, wait=wait):
            self.busy_at = time.monotonic()  # threads set it without a lock: its reader needs no exact value
            first, reports = tasks[0], list[JobReport]()
            if isinstance(first, Piece):  # then they all are
                reports += self._joiner.add(move(runner, tasks))  # type: ignore[arg-type]
                if not first.is_load:
                    self._queue.end_store()
            else:
                reports.append(_answer(runner, first))
            reports += runner.usage_news()
            if runner.lost is not None:
                reports.append(Unavailable.because(runner.lost))
            if reports:
                report(reports)


def _answer(runner: StoreRunner, task: Probe | Chore) -> ProbeAnswer | ChoreDone:
    return runner.answer(task) if isinstance(task, Probe) else runner.do(task)


class _OpenPart:
    """A part with pieces that have not ended."""

    def __init__(self, num_pieces: int, now: float) -> None:
        self.num_left = num_pieces
        self.reported_at = now
        self.ended: list[PartResult] = []


class Joiner:
    """Joins the results of pieces, so that the scheduler's thread gets few reports. Threads may share it."""

    def __init__(self, max_silent_seconds: float = 0.05) -> None:
        """Args: max_silent_seconds: a part that takes longer is reported in several results, to show progress."""
        self._max_silent_seconds = max_silent_seconds
        self._lock = threading.Lock()
        self._open: dict[tuple[int, int], _OpenPart] = {}

    def expect(self, pieces: Sequence[Piece]) -> None:
        """Note that these pieces, none of which has begun, are one part."""
        if len(pieces) > 1:
            part = _OpenPart(len(pieces), time.monotonic())
            with self._lock:
                for piece in pieces:
                    self._open[piece.serial, piece.first] = part

    def add(self, results: Iterable[PartResult], *, at_once: bool = False) -> list[PartResult]:
        """Take the results of pieces that have ended; return what to report now.

        Args:
            at_once: return these results, and earlier ones of the same parts, without waiting for other pieces.
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
    """Return results of one job with neighbouring ones joined."""
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
    failures: dict[FailureCause, int] = {}
    for result in run:
        for cause, count in result.failures.items():
            failures[cause] = failures.get(cause, 0) + count
    return PartResult(
        run[0].serial,
        run[0].first,
        [success for result in run for success in result.successes],
        sum(result.num_bytes for result in run),
        failures,
    )


def cancelled(blocks: Part | Piece) -> PartResult:
    """Return the result of blocks whose move never started."""
    count = blocks.num_blocks
    return PartResult(blocks.serial, blocks.first, [False] * count, failures={FailureCause.CANCELLED: count})
