"""Which policy is better than the one in charge, by what their shadows hit: with a margin, and twice in a row.

All shadows replay the same keys, so that the difference of two of them varies much less than either. Differences are
summed up batch by batch with their squares: a difference that a few batches made counts for as much as they vary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from math import sqrt
from typing import NamedTuple

WINDOW_KEYS = 256
"""Sampled uses between two comparisons."""

KEPT_AT_WINDOW = 0.8
"""What of the sums outlives a comparison: a window counts half after three others."""

MARGIN = 0.01
"""Share of the uses, in hits, that a better policy gains at least: who takes over begins without a memory."""

MIN_DEVIATIONS = 2.0
"""A better policy's gain is at least so many of its standard deviations."""


class PolicySwitch(NamedTuple):
    """Another policy takes over; the rates are shares of the sampled uses that each would have hit lately, 0 to 1."""

    former: str
    chosen: str
    former_rate: float
    chosen_rate: float


class Contest:
    """Compares shadows of one size."""

    def __init__(self, names: Iterable[str]) -> None:
        """Args: names: of the policies."""
        self._names = tuple(names)
        self._pairs = tuple(combinations(self._names, 2))
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._num_keys = 0.0
        self._in_window = 0
        self._hits = dict.fromkeys(self._names, 0.0)
        self._squares = dict.fromkeys(self._pairs, 0.0)
        self._better: frozenset[str] = frozenset()

    def note(self, num_keys: int, hits: Mapping[str, int]) -> None:
        """Count a batch: its size, and what each policy hit of it."""
        self._in_window += num_keys
        self._num_keys += num_keys
        for name in self._names:
            self._hits[name] += hits[name]
        for pair in self._pairs:
            difference = hits[pair[0]] - hits[pair[1]]
            if difference:
                self._squares[pair] += difference * difference

    def decide(self, current: str) -> PolicySwitch | None:
        """Return the policy that should replace `current`, if a window has just ended and the one before agrees."""
        if self._in_window < WINDOW_KEYS:
            return None
        better = frozenset(name for name in self._names if self._beats(name, current))
        twice, self._better = better & self._better, better
        switch = None
        if twice:
            chosen = max(sorted(twice), key=self._hits.__getitem__)
            switch = PolicySwitch(current, chosen, self.rate(current), self.rate(chosen))
            self._better = frozenset()
        self._fade()
        return switch

    def rate(self, name: str) -> float:
        """Return the share of the sampled uses that a policy hit lately, 0 to 1."""
        return self._hits[name] / self._num_keys if self._num_keys else 0.0

    def _beats(self, name: str, current: str) -> bool:
        if name == current:
            return False
        gain = self._hits[name] - self._hits[current]
        squares = self._squares.get((name, current)) or self._squares.get((current, name), 0.0)
        return gain >= MARGIN * self._num_keys and gain >= MIN_DEVIATIONS * sqrt(squares)

    def _fade(self) -> None:
        self._in_window = 0
        self._num_keys *= KEPT_AT_WINDOW
        for name in self._names:
            self._hits[name] *= KEPT_AT_WINDOW
        for pair in self._pairs:
            self._squares[pair] *= KEPT_AT_WINDOW
