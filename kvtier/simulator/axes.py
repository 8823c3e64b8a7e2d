"""Axes of charts, with marks at round numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Format = Callable[[float], str]


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        write: returns a number of the axis as text.
        low, high: its ends.
    """

    title: str
    write: Format
    low: float
    high: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Return a value's place between the ends, 0 to 1; values outside are put at the nearer end."""
        low, high = self.low, self.high
        value = min(max(value, low), high)
        if self.logarithmic:
            return math.log(value / low) / math.log(high / low) if high > low else 0.5
        return (value - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[float]:
        """Return a few round values between the ends."""
        if self.logarithmic:
            return _log_ticks(self.low, self.high)
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, int(self.high / step + 1e-9) + 1)]


def _round_step(raw: float) -> float:
    if raw <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * factor for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if power * factor >= raw * (1 - 1e-9))


def _log_ticks(low: float, high: float) -> list[float]:
    decades = math.log10(high / low)
    if decades > 2.5:
        tens = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
        steps = (1.0,) if decades > 4 else (1.0, 3.0)
        return [ten * step for ten in tens for step in steps if low <= ten * step <= high]
    factor = 2.0
    while math.log(high / low) / math.log(factor) > 7:
        factor *= 2
    first = math.ceil(math.log(low) / math.log(factor) - 1e-9)
    ticks = [factor**index for index in range(first, int(math.log(high) / math.log(factor) + 1e-9) + 1)]
    return ticks if len(ticks) > 1 else [low, high]
