"""What blocks of each history have given so far: reuse by class and age, and the ranks that follow from it.

A class is how often blocks were used, and after which gap their session came back the last time. Ages are in seconds,
whatever the capacity: what sessions do depends on people and tools, not on the size of a cache.

Source: N. Beckmann, H. Chen and A. Cidon, "LHD: Improving Cache Hit Rate by Maximizing Hit Density", NSDI 2018.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 24
EDGES = tuple(1.5**index for index in range(NUM_BINS - 1))
"""Where the bins of age after the first begin, in seconds; the last one begins after two hours."""

MAX_WEIGHT = 20
"""A part counts as at most so many blocks: one long prompt is one decision of one user, not hundreds."""

PRIOR_BLOCKS = 100.0
"""A class without history behaves like all of its number of uses, and these like all; its own history weighs as much
after so many blocks."""

KEPT_AT_LEARNING = 0.993
"""What of the counts outlives each learning: after 100 of them, half."""

_USES = (2, 3, 4, 6, 11, 50)
_GAPS = (4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0, 900.0)
"""Seconds. Tools answer within a minute, people within minutes."""

_NUM_USES, _NUM_GAPS = len(_USES) + 1, len(_GAPS) + 2
NUM_CLASSES = _NUM_USES * _NUM_GAPS
_SHAPE = _NUM_USES, _NUM_GAPS, NUM_BINS
_WIDTHS = np.diff((0.0, *EDGES))[:, None]

Floats = NDArray[np.float64]


def class_of(uses: int, gap: float | None) -> int:
    """Return the class of blocks that were used so often.

    Args:
        gap: seconds between the last two requests of their session; None for a session's first request.
    """
    column = 0 if gap is None else 1 + bisect_right(_GAPS, gap)
    return bisect_right(_USES, uses) * _NUM_GAPS + column


class ReuseTable:
    """Counts, by class and bin of age, of blocks that reached the bin and that were used again in it.

    Attributes:
        ranks: by class and bin, expected uses for each block and second, within the best horizon.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything: equal ranks, which leave the order to recency."""
        # Arrays of the interpreter: a single count is read and written in half the time that numpy takes.
        self._reached = array("d", bytes(8 * NUM_CLASSES * NUM_BINS))
        self._used = array("d", bytes(8 * NUM_CLASSES * NUM_BINS))
        self.ranks = [[0.0] * NUM_BINS] * NUM_CLASSES

    def note_reached(self, kind: int, index: int, num_blocks: int) -> None:
        """Blocks of class `kind` have reached bin `index` of age without a use."""
        self._reached[kind * NUM_BINS + index] += min(num_blocks, MAX_WEIGHT)

    def note_passed(self, kind: int, first: int, last: int, num_blocks: int) -> None:
        """Blocks of class `kind` have reached all bins of age from `first` to `last` without a use."""
        reached, weight, row = self._reached, min(num_blocks, MAX_WEIGHT), kind * NUM_BINS
        for index in range(row + first, row + last + 1):
            reached[index] += weight

    def take_back(self, kind: int, num_blocks: int) -> None:
        """Blocks that were said to be new in a class are of another; what has faded since is not owed."""
        place = kind * NUM_BINS
        self._reached[place] = max(0.0, self._reached[place] - min(num_blocks, MAX_WEIGHT))

    def note_used(self, kind: int, age: float, num_blocks: int) -> None:
        """Blocks of class `kind` were used again at this age."""
        self._used[kind * NUM_BINS + bisect_right(EDGES, age)] += min(num_blocks, MAX_WEIGHT)

    def learn(self) -> None:
        """Compute the ranks anew, and let old counts fade."""
        used, reached = (np.frombuffer(counts).reshape(_SHAPE) for counts in (self._used, self._reached))
        of_all = _chances(used.sum((0, 1)) + 0.01, reached.sum((0, 1)) + 1.0)
        of_uses = _chances(used.sum(1) + PRIOR_BLOCKS * of_all, reached.sum(1) + PRIOR_BLOCKS)[:, None]
        of_class = _chances(used + PRIOR_BLOCKS * of_uses, reached + PRIOR_BLOCKS)
        # Rounded: errors of rounding must not decide between classes that have no history.
        self.ranks = _densities(of_class.reshape(NUM_CLASSES, NUM_BINS)).astype(np.float32).tolist()
        used *= KEPT_AT_LEARNING
        reached *= KEPT_AT_LEARNING


def _chances(used: Floats, reached: Floats) -> Floats:
    chances: Floats = np.minimum(0.999, used / reached)
    return chances


def _densities(chances: Floats) -> Floats:
    """Return, from the middle of each bin on, the highest of expected uses over expected seconds, of any horizon.

    Args:
        chances: that a block which has reached the bin is used in it; shape (classes, bins).
    """
    chances = chances.T[:-1]
    left = np.cumprod(1.0 - chances, axis=0)
    uses = left / (1.0 - chances) * chances
    seconds = _WIDTHS * (left + uses / 2)
    # From a bin to a horizon: half of the first bin, and of what it leaves, whatever the bins up to the horizon make.
    # All of it is divided by that share, so that one table of sums serves every first bin.
    share = left / (1.0 - chances / 2)
    uses, seconds = np.cumsum(uses, axis=0), np.cumsum(seconds, axis=0)
    uses_before = uses - share * chances / 2
    seconds_before = seconds - share * _WIDTHS / 2 * (1.0 - chances / 4)
    best = np.zeros((NUM_BINS, len(left[0])))
    for first in range(NUM_BINS - 1):  # one array for all of them would not fit the processor's caches
        ahead = (uses[first:] - uses_before[first]) / (seconds[first:] - seconds_before[first])
        ahead.max(axis=0, out=best[first])
    return best.T
