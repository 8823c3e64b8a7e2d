"""Puts the results of pieces together, so that the scheduler's thread hears of a job once, and not piece by piece."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from kvtier.executors.protocol import Part, PartResult
from kvtier.types import FailureCause

_SECONDS_SILENT = 0.05
"""A part that takes longer is reported in several results: whoever waits sees progress."""


class _OpenPart:
    """A part of which some pieces have not ended."""

    def __init__(self, num_pieces: int, now: float) -> None:
        self.num_left = num_pieces
        self.reported_at = now
        self.ended: list[PartResult] = []


class Gathering:
    """Knows the parts that were cut into pieces. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[tuple[int, int], _OpenPart] = {}

    def expect(self, pieces: Sequence[Part]) -> None:
        """Learn that these pieces, which nobody has begun, are one part."""
        if len(pieces) > 1:
            part = _OpenPart(len(pieces), time.monotonic())
            with self._lock:
                for piece in pieces:
                    self._open[piece.serial, piece.first] = part

    def add(self, results: Iterable[PartResult]) -> list[PartResult]:
        """Take the results of pieces that ended; return what should be reported now."""
        now = time.monotonic()
        reported: list[PartResult] = []
        with self._lock:
            for result in results:
                part = self._open.pop((result.serial, result.first), None)
                if part is None:
                    reported.append(result)
                    continue
                part.num_left -= 1
                part.ended.append(result)
                if not part.num_left or now - part.reported_at > _SECONDS_SILENT:
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


def split_result(
    successes: Sequence[bool], failures: Mapping[FailureCause, int], parts: Sequence[Part], block_bytes: int
) -> list[PartResult]:
    """Return the results of parts that were moved in one call, one part after the other.

    Which blocks failed is known; their causes are known per call only, and dealt out in order.
    """
    causes = [cause for cause, count in failures.items() for _ in range(count)]
    results: list[PartResult] = []
    start = 0
    for part in parts:
        own = list(successes[start : start + part.num_blocks])
        start += part.num_blocks
        failed = own.count(False)
        own_causes, causes = causes[:failed], causes[failed:]
        num_bytes = (len(own) - failed) * block_bytes
        results.append(PartResult(part.serial, part.first, own, num_bytes, Counter(own_causes)))
    return results
