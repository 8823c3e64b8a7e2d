"""Which of two roads a disk's bytes take: straight between arena and device, or through private memory in huge pages.

From an arena in huge pages a copy can gain nothing, so bytes go straight. From pages of 4 KiB the device and the kernel
need so much longer that a copy may pay, or not: that depends on the device, and on how busy the processors are. So it
is measured, in use.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from enum import Enum

SAMPLES = 7
"""Latest times per road; their median is compared, so that one stall of the device changes nothing."""
PROBE_EVERY = 64
"""One call of so many takes the road that is not the better one."""
LEAST_GAIN = 1.1
"""The copy costs processor time that other threads want, so it must be faster by this factor."""


class Road(Enum):
    """How bytes travel between the arena and the device."""

    STRAIGHT = "straight"
    COPIED = "copied"


class RoadChoice:
    """Measures both roads of one direction and chooses. Threads may share it: a lost sample does no harm.

    Attributes:
        only: the road to take always; None to choose by measuring.
    """

    def __init__(self, only: Road | None = None) -> None:
        self.only = only
        self._calls = itertools.count()
        self._times: dict[Road, deque[float]] = {road: deque(maxlen=SAMPLES) for road in Road}
        self._better = Road.STRAIGHT

    def choose(self) -> Road:
        """Return the road for the next call: at first both in turn, then the better one, and rarely the other."""
        if self.only is not None:
            return self.only
        call = next(self._calls)
        if call < 2 * SAMPLES:
            return Road.COPIED if call % 2 == 0 else Road.STRAIGHT
        if call % PROBE_EVERY:
            return self._better
        return Road.STRAIGHT if self._better is Road.COPIED else Road.COPIED

    def learn(self, road: Road, num_bytes: int, seconds: float) -> None:
        """Note how long a call on a road took that has moved all of its bytes. One that failed may have been quick."""
        if self.only is not None or not num_bytes:
            return
        self._times[road].append(seconds / num_bytes)
        straight, copied = (statistics.median(tuple(times) or (math.inf,)) for times in self._times.values())
        self._better = Road.COPIED if copied * LEAST_GAIN < straight else Road.STRAIGHT
