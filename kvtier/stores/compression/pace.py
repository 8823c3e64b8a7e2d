"""How fast calls move bytes, whatever the number of threads that make them."""

from __future__ import annotations

from collections.abc import Callable

_KEPT = 0.95
"""Weight that a measurement keeps when the next one comes: about the last twenty count."""
_FEWEST_CALLS = 16
"""Calls before a pace is known. Threads start together: the first call to end has shared its time with the others."""


class Pace:
    """Seconds per byte of a medium, or of the processors.

    Only the time counts in which at least one call runs, and it counts once: of several threads that wait for the same
    medium, none takes it to be slow because of the others. Threads must not share it without a lock.

    Attributes:
        busy_seconds: in which calls have run, until the latest one ended.
    """

    def __init__(self, clock: Callable[[], float], fewest_calls: int = _FEWEST_CALLS) -> None:
        """Args: clock: seconds; fewest_calls: calls that must have ended before a pace is known."""
        self._clock, self._fewest_calls = clock, fewest_calls
        self._num_running = self._num_ended = 0
        self._since = self._bytes = self._seconds = self.busy_seconds = 0.0

    def forget(self) -> None:
        """Learn anew, from calls that begin a little later."""
        self._num_ended = -self._fewest_calls
        self._bytes = self._seconds = 0.0

    def begin(self) -> None:
        """Note that a call begins."""
        if not self._num_running:
            self._since = self._clock()
        self._num_running += 1

    def end(self, num_bytes: int) -> None:
        """Note that a call ends that has moved so many bytes. The time of one that has moved none teaches nothing."""
        now = self._clock()
        seconds, self._since = now - self._since, now
        self._num_running -= 1
        self.busy_seconds += seconds
        if num_bytes:
            self._num_ended += 1
        if num_bytes and self._num_ended > 0:
            self._bytes = self._bytes * _KEPT + num_bytes
            self._seconds = self._seconds * _KEPT + seconds

    @property
    def seconds_per_byte(self) -> float | None:
        """Return what a byte takes; None while too few calls have ended."""
        return self._seconds / self._bytes if self._num_ended >= self._fewest_calls else None


class Mean:
    """The mean of the latest values; None before the first one."""

    def __init__(self) -> None:
        self._weight = self._sum = 0.0

    @property
    def value(self) -> float | None:
        """Return the mean."""
        return self._sum / self._weight if self._weight else None

    def learn(self, value: float) -> None:
        """Note a value."""
        self._weight = self._weight * _KEPT + 1
        self._sum = self._sum * _KEPT + value
