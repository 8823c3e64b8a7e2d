"""The busiest hour of a trace: what has to be bought for, where quiet hours make the mean small."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

HOUR = 3600.0
DAY = 24 * HOUR
UNEVEN = 3.0
"""Times the mean from which on the mean misleads."""


def busiest_hour(amounts: Iterable[tuple[float, float]], seconds: float) -> float:
    """Return the highest rate over an hour in a row, per second; over all of a trace that is shorter.

    Args:
        amounts: (time in seconds, amount), in order of time.
        seconds: span of the trace.
    """
    window: deque[tuple[float, float]] = deque()
    inside = most = total = 0.0
    for time, amount in amounts:
        total += amount
        inside += amount
        window.append((time, amount))
        while window[0][0] <= time - HOUR:
            inside -= window.popleft()[1]
        most = max(most, inside)
    return max(most / min(HOUR, seconds), total / seconds)
