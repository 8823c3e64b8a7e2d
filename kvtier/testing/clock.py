"""A clock that moves only when a test says so."""

from __future__ import annotations


class ManualClock:
    """A `Clock` (seconds) that stands still until `advance`."""

    def __init__(self, start: float = 1000.0) -> None:
        self._now = start

    def __call__(self) -> float:
        """Return the seconds that the test set."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass.

        Raises:
            ValueError: time would go back.
        """
        if seconds < 0:
            raise ValueError(f"advance({seconds}): time never goes back")
        self._now += seconds
