"""The clock that everything uses which waits or expires, so that tests can set the time."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A source of monotonic time, in seconds."""

    def __call__(self) -> float:
        """Return seconds since an arbitrary start; never goes back."""
        ...


monotonic_clock: Clock = time.monotonic
