"""Simulated devices: they move no bytes, and only compute when a transfer ends."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvtier.clock import Clock

T = TypeVar("T")


class SimulatedClock:
    """A `Clock` that the replay sets; it never goes back."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        """Return the simulated seconds since the start of the trace."""
        return self._now

    def advance_to(self, now: float) -> None:
        """Set the clock to `now`, unless that is in the past."""
        if now > self._now:
            self._now = now


@dataclass(frozen=True)
class DeviceSpeed:
    """Speed of a medium.

    Attributes:
        read_bandwidth, write_bandwidth: bytes per second, above 0. Reads and writes do not slow each other down.
        latency: seconds that every job takes in addition to its transfer, however many jobs run.
    """

    read_bandwidth: float
    write_bandwidth: float
    latency: float


class Device(Generic[T]):
    """A queue of reads and a queue of writes; each is first in, first out, at the speed of the medium."""

    def __init__(self, speed: DeviceSpeed, clock: Clock) -> None:
        self._speed = speed
        self._clock = clock
        self._reading_until = self._writing_until = 0.0
        self._asked_bytes = 0
        self._reads: deque[tuple[float, T]] = deque()
        self._writes: deque[tuple[float, T]] = deque()

    def read(self, job: T, num_bytes: int) -> None:
        self._asked_bytes += num_bytes
        begin = max(self._clock(), self._reading_until)
        self._reading_until = end = begin + num_bytes / self._speed.read_bandwidth
        self._reads.append((end + self._speed.latency, job))

    def write(self, job: T, num_bytes: int) -> None:
        self._asked_bytes += num_bytes
        begin = max(self._clock(), self._writing_until)
        self._writing_until = end = begin + num_bytes / self._speed.write_bandwidth
        self._writes.append((end + self._speed.latency, job))

    def cancel_reads(self, is_unwanted: Callable[[T], bool]) -> list[T]:
        """Remove unwanted reads that have not begun, and return them; the reads behind them end earlier."""
        now, bandwidth, latency = self._clock(), self._speed.read_bandwidth, self._speed.latency
        saved, cancelled, kept = 0.0, [], deque[tuple[float, T]]()
        ends = -math.inf
        for answered, job in self._reads:
            begins, ends = ends, answered - latency
            if begins > now and is_unwanted(job):
                saved += ends - begins
                cancelled.append(job)
            else:
                kept.append((answered - saved, job))
        self._asked_bytes -= int(saved * bandwidth)
        self._reads, self._reading_until = kept, self._reading_until - saved
        return cancelled

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written by now."""
        now, speed = self._clock(), self._speed
        reading = max(0.0, self._reading_until - now) * speed.read_bandwidth
        writing = max(0.0, self._writing_until - now) * speed.write_bandwidth
        return self._asked_bytes - int(reading + writing)

    def next_end(self) -> float | None:
        """Return the end of the first transfer that `finished` has not returned yet; None if there is none."""
        return min([queue[0][0] for queue in (self._reads, self._writes) if queue], default=None)

    def has_finished(self) -> bool:
        """Return whether `finished` would return anything now."""
        reads, writes = self._reads, self._writes
        if not reads and not writes:
            return False
        now = self._clock()
        return bool((reads and reads[0][0] <= now) or (writes and writes[0][0] <= now))

    def finished(self, everything: bool = False) -> list[T]:
        """Return the jobs that have ended by now, reads first; with `everything` all queued jobs count as ended."""
        now = self._clock()
        ended: list[T] = []
        for queue in (self._reads, self._writes):
            while queue and (everything or queue[0][0] <= now):
                ended.append(queue.popleft()[1])
        return ended
