"""Finds the busiest hour of a trace; hardware must suffice for it, and quiet hours lower the mean."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

HOUR = 3600.0
DAY = 24 * HOUR
UNEVEN = 3.0
"""Ratio of the busiest hour to the mean above which reports warn that the load is uneven."""


def busiest_hour(amounts: Iterable[tuple[float, float]], seconds: float) -> float:
    """Return the highest rate per second over any hour, or over the whole trace if it is shorter.

    Args:
        amounts: (time in seconds, amount), in order of time.
        seconds: duration of the trace.
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
