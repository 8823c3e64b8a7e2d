"""What blocks of each history have given so far: reuse by class and age, and the ranks that follow from it.

Ages are counted in uses of blocks, not in seconds: measured on real traces neither is the better predictor, and a
count needs no clock. Bins of age and all constants are multiples of the capacity, because only a comparison of
what stays with what goes matters.

Source: N. Beckmann, H. Chen and A. Cidon, "LHD: Improving Cache Hit Rate by Maximizing Hit Density", NSDI 2018.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

FIRST_EDGE = 1 / 16
"""End of the first bin of age, in capacities."""

EDGE_GROWTH = 1.6
NUM_BINS = 15
"""The last bin begins at about 28 capacities."""

MAX_WEIGHT = 20
"""A part counts as at most so many blocks: one long prompt is one decision of one user, not hundreds."""

PRIOR_BLOCKS = 100.0
"""A class without history behaves like all of them; its own history weighs as much after so many blocks."""

KEPT_AT_LEARNING = 0.993
"""What of the counts outlives each learning: after 100 of them, half."""

NEW, NEW_BRANCH, NEW_TURN = 0, 1, 2
"""Classes of blocks used once: with no known prefix, a long addition to one, a short one (MAX_TURN_BLOCKS)."""

MAX_TURN_BLOCKS = 3
_USES_OF_CLASS = (2, 3, 4, 6, 11, 50)
_FIRST_USED = NEW_TURN + 1
NUM_CLASSES = _FIRST_USED + len(_USES_OF_CLASS)


def class_of(uses: int) -> int:
    """Return the class of blocks that were used more than once."""
    return NEW_TURN + bisect_right(_USES_OF_CLASS, uses)


class ReuseTable:
    """Counts, by class and bin of age, of blocks that reached the bin and that were used again in it.

    Attributes:
        edges: where the bins after the first begin, in uses of blocks, rising.
        ranks: by class and bin, expected uses for each block and unit of time, within the best horizon. Never lower
            for more uses or for less age, so that no block ranks below one that needs it.
    """

    def __init__(self, capacity: int, share: float = 1.0) -> None:
        """Args: share: of all uses that this table is told, for the prior."""
        self._prior = PRIOR_BLOCKS * share
        self.edges = [capacity * FIRST_EDGE * EDGE_GROWTH**index for index in range(NUM_BINS - 1)]
        self._widths = [end - start for start, end in pairwise([0.0, *self.edges])]
        self.clear()

    def clear(self) -> None:
        """Forget everything: equal ranks, which leave the order to recency."""
        self.reached = [[0.0] * NUM_BINS for _ in range(NUM_CLASSES)]
        self.used = [[0.0] * NUM_BINS for _ in range(NUM_CLASSES)]
        self.ranks = [[0.0] * NUM_BINS for _ in range(NUM_CLASSES)]

    def note_reached(self, kind: int, index: int, num_blocks: int) -> None:
        """Blocks of class `kind` have reached bin `index` of age without a use."""
        self.reached[kind][index] += min(num_blocks, MAX_WEIGHT)

    def take_back(self, kind: int, num_blocks: int) -> None:
        """Blocks that were new in the first bin go on as part of more; what has faded since is not owed."""
        reached = self.reached[kind]
        reached[0] = max(0.0, reached[0] - min(num_blocks, MAX_WEIGHT))

    def note_used(self, kind: int, age: int, num_blocks: int) -> None:
        """Blocks of class `kind` were used again at this age."""
        self.used[kind][bisect_right(self.edges, age)] += min(num_blocks, MAX_WEIGHT)

    def learn(self) -> None:
        """Compute the ranks anew, and let old counts fade."""
        every = [
            (sum(row[index] for row in self.used) + 0.01) / (sum(row[index] for row in self.reached) + 1.0)
            for index in range(NUM_BINS)
        ]
        prior = self._prior
        best_below = [0.0] * NUM_BINS
        floor = best_below
        for kind in range(NUM_CLASSES):
            used, reached = self.used[kind], self.reached[kind]
            chances = [
                min(0.999, (used[i] + prior * min(every[i], 0.999)) / (reached[i] + prior)) for i in range(NUM_BINS)
            ]
            ranks = self._densities(chances)
            for index in range(NUM_BINS - 2, -1, -1):
                ranks[index] = max(ranks[index], ranks[index + 1])
            if kind >= _FIRST_USED:
                floor = best_below
            ranks = [max(pair) for pair in zip(ranks, floor, strict=True)]
            best_below = [max(pair) for pair in zip(ranks, best_below, strict=True)]
            self.ranks[kind] = ranks
            self.used[kind] = [count * KEPT_AT_LEARNING for count in used]
            self.reached[kind] = [count * KEPT_AT_LEARNING for count in reached]

    def _densities(self, chances: list[float]) -> list[float]:
        """Return, from the middle of each bin on, the highest of expected uses over expected time, of any horizon."""
        widths, densities = self._widths, [0.0] * NUM_BINS
        for first in range(NUM_BINS - 1):
            chance = chances[first] / 2
            left, uses, time = 1.0 - chance, chance, widths[first] / 2 * (1.0 - chance / 2)
            best = uses / time
            for index in range(first + 1, NUM_BINS - 1):
                chance = left * chances[index]
                uses += chance
                time += widths[index] * (left - chance / 2)
                left -= chance
                if uses > best * time:
                    best = uses / time
            densities[first] = best
        return densities
