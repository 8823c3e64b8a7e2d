"""Counts of reuse by class and age of blocks, and the eviction ranks computed from them.

A class has two parts: how often a block was used, and the gap before the last request of its session. Ages are in
seconds for every capacity, because people and tools decide when a session comes back, not the size of a cache.

Source: N. Beckmann, H. Chen and A. Cidon, "LHD: Improving Cache Hit Rate by Maximizing Hit Density", NSDI 2018.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 24
EDGES = tuple(1.5**index for index in range(NUM_BINS - 1))
"""Starts of the second and all later bins of age, in seconds. The last bin starts after two hours."""

MAX_WEIGHT = 20
"""A part counts as at most this many blocks: one long prompt is one decision of one user, not hundreds."""

PRIOR_BLOCKS = 100.0
"""Weight of the prior, in blocks. A class without history is taken to behave like all classes with the same number of
uses, and these like all blocks. After this many blocks a class's own history weighs as much as the prior."""

KEPT_AT_LEARNING = 0.993
"""Factor that fades the counts at each learning: after 100 learnings half is left."""

_USES = (2, 3, 4, 6, 11, 50)
"""Bounds between classes, in uses of a block."""

_GAPS = (4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0, 900.0)
"""Bounds between classes, in seconds. Tools answer within a minute, people within minutes."""

_NUM_USES, _NUM_GAPS = len(_USES) + 1, len(_GAPS) + 2
NUM_CLASSES = _NUM_USES * _NUM_GAPS
_SHAPE = _NUM_USES, _NUM_GAPS, NUM_BINS
_WIDTHS = np.diff((0.0, *EDGES))[:, None]

Floats = NDArray[np.float64]


def class_of(uses: int, gap: float | None) -> int:
    """Return the class of blocks.

    Args:
        uses: how often each block was used.
        gap: seconds between the last two requests of their session; None for a session's first request.
    """
    column = 0 if gap is None else 1 + bisect_right(_GAPS, gap)
    return bisect_right(_USES, uses) * _NUM_GAPS + column


class ReuseTable:
    """Counts, by class and bin of age, the blocks that reached the bin and the blocks that were used again in it.

    Attributes:
        ranks: by class and bin, the expected uses per block and second within the best horizon.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything. All ranks are equal then, so that recency decides."""
        # Not numpy arrays: to read and write a single number takes half the time in an array of the standard library.
        self._reached = array("d", bytes(8 * NUM_CLASSES * NUM_BINS))
        self._used = array("d", bytes(8 * NUM_CLASSES * NUM_BINS))
        self.ranks = [[0.0] * NUM_BINS] * NUM_CLASSES

    def note_reached(self, kind: int, index: int, num_blocks: int) -> None:
        """Count blocks of class `kind` that have reached bin `index` of age without a use."""
        self._reached[kind * NUM_BINS + index] += min(num_blocks, MAX_WEIGHT)

    def note_passed(self, kind: int, first: int, last: int, num_blocks: int) -> None:
        """Count blocks of class `kind` that have reached all bins from `first` to `last` without a use."""
        reached, weight, row = self._reached, min(num_blocks, MAX_WEIGHT), kind * NUM_BINS
        for index in range(row + first, row + last + 1):
            reached[index] += weight

    def take_back(self, kind: int, num_blocks: int) -> None:
        """Undo `note_reached` for the first bin: the blocks belong to another class. Counts that have faded since do
        not become negative.
        """
        place = kind * NUM_BINS
        self._reached[place] = max(0.0, self._reached[place] - min(num_blocks, MAX_WEIGHT))

    def note_used(self, kind: int, age: float, num_blocks: int) -> None:
        """Count blocks of class `kind` that were used again at `age`, in seconds."""
        self._used[kind * NUM_BINS + bisect_right(EDGES, age)] += min(num_blocks, MAX_WEIGHT)

    def learn(self) -> None:
        """Compute the ranks from the counts, and let the counts fade."""
        # frombuffer copies nothing: the last two lines change the counts themselves.
        used, reached = (np.frombuffer(counts).reshape(_SHAPE) for counts in (self._used, self._reached))
        of_all = _chances(used.sum((0, 1)) + 0.01, reached.sum((0, 1)) + 1.0)
        of_uses = _chances(used.sum(1) + PRIOR_BLOCKS * of_all, reached.sum(1) + PRIOR_BLOCKS)[:, None]
        of_class = _chances(used + PRIOR_BLOCKS * of_uses, reached + PRIOR_BLOCKS)
        # Classes without history have equal ranks but for errors in the last digits, which float32 rounds away.
        self.ranks = _densities(of_class.reshape(NUM_CLASSES, NUM_BINS)).astype(np.float32).tolist()
        used *= KEPT_AT_LEARNING
        reached *= KEPT_AT_LEARNING


def _chances(used: Floats, reached: Floats) -> Floats:
    chances: Floats = np.minimum(0.999, used / reached)
    return chances


def _densities(chances: Floats) -> Floats:
    """Return the expected uses per expected second from the middle of each bin on, for the horizon where it is highest.

    Args:
        chances: probability that a block which has reached the bin is used in it; shape (classes, bins).

    Returns:
        Shape (classes, bins). The last bin, which has no end, gets 0.
    """
    chances = chances.T[:-1]
    left = np.cumprod(1.0 - chances, axis=0)
    uses = left / (1.0 - chances) * chances
    seconds = _WIDTHS * (left + uses / 2)
    # From the middle of a bin to a horizon: the second half of that bin and all bins up to the horizon. Both are
    # differences of cumulative sums over all blocks. `share` is the part of all blocks that is left at the middle of
    # the bin; it stands in uses and seconds alike and drops out of their ratio, so one table of sums serves all bins.
    share = left / (1.0 - chances / 2)
    uses, seconds = np.cumsum(uses, axis=0), np.cumsum(seconds, axis=0)
    uses_before = uses - share * chances / 2
    seconds_before = seconds - share * _WIDTHS / 2 * (1.0 - chances / 4)
    best = np.zeros((NUM_BINS, len(left[0])))
    for first in range(NUM_BINS - 1):  # one array for all first bins would not fit the processor's caches
        more_uses, more_seconds = uses[first:] - uses_before[first], seconds[first:] - seconds_before[first]
        # Where next to no block reaches an age, both differences are lost to rounding.
        ahead = np.divide(more_uses, more_seconds, out=np.zeros_like(more_uses), where=more_seconds > 0)
        ahead.max(axis=0, out=best[first])
    return best.T
