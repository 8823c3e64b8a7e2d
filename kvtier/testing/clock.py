"""A clock for tests, which moves only when the test advances it."""

from __future__ import annotations


class ManualClock:
    """A `Clock` (in seconds) that stands still until `advance`."""

    def __init__(self, start: float = 1000.0) -> None:
        self._now = start

    def __call__(self) -> float:
        """Return the present time."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move the clock forward.

        Raises:
            ValueError: `seconds` is negative.
        """
        if seconds < 0:
            raise ValueError(f"advance({seconds}): time never goes back")
        self._now += seconds
