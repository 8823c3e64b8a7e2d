"""The prefix policy as its description says, one key at a time, over a plain list of blocks: the yardstick of tests.

Every block known, held or evicted, has its class, its uses, the time of its last use and the bin of age it is in. At
every use all of them are looked at; the victim is the least of all by a comparison of all.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import pairwise

BINS = 15
CLASSES = 9


@dataclass
class Block:
    kind: int
    uses: int
    time: int
    bin: int = 0
    held: bool = True


class TextbookPrefix:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.known: dict[Hashable, Block] = {}
        self.evicted: list[Hashable] = []
        self.edges = [capacity / 16 * 1.6**n for n in range(BINS - 1)]
        self.reached = {(kind, n): 0.0 for kind in range(CLASSES) for n in range(BINS)}
        self.used = dict(self.reached)
        self.ranks = dict(self.reached)
        self.now, self.found, self.learn_at = 0, 0, 256

    def __contains__(self, x: Hashable) -> bool:
        return x in self.known and self.known[x].held

    def request(self, x: Hashable) -> Hashable | None:
        """Use `x`; return what it evicted."""
        victim = None
        if x in self:
            self.found += 1
            self.use(x, 0)
        else:
            if sum(block.held for block in self.known.values()) == self.capacity:
                victim = self.evict()
            if x in self.evicted:
                self.evicted.remove(x)
            found, self.found = self.found + (x in self.known), 0
            self.use(x, 2 if found > 1 else 0)
        return victim

    def use(self, x: Hashable, kind_of_new: int) -> None:
        block = self.known.pop(x, None)
        kind, uses = kind_of_new, 1
        if block is not None:
            uses, kind = block.uses, block.kind
            if block.time != self.now:
                self.used[kind, self.bin_of(self.now - block.time)] += 1
                uses += 1
            if uses > 1:
                kind = 3 + sum(uses >= least for least in (3, 4, 6, 11, 50))
        self.now += 1
        self.known[x] = Block(kind, uses, self.now)
        self.reached[kind, 0] += 1
        for other in self.known.values():
            while other.bin < self.bin_of(self.now - other.time):
                other.bin += 1
                self.reached[other.kind, other.bin] += 1
        if self.now >= self.learn_at:
            self.learn()
            self.learn_at = self.now + min(2048, self.now)

    def bin_of(self, age: int) -> int:
        return sum(age >= edge for edge in self.edges)

    def evict(self) -> Hashable:
        held = [
            (self.ranks[block.kind, self.bin_of(self.now - block.time)], block.time, key)
            for key, block in self.known.items()
            if block.held
        ]
        victim = min(held, key=lambda entry: entry[:2])[2]
        self.known[victim].held = False
        self.evicted.append(victim)
        if len(self.evicted) > 4 * self.capacity:
            del self.known[self.evicted.pop(0)]
        return victim

    def learn(self) -> None:
        """Used again over reached, a class without history like all; expected uses over expected time, best horizon."""
        overall = [
            (sum(self.used[kind, n] for kind in range(CLASSES)) + 0.01)
            / (sum(self.reached[kind, n] for kind in range(CLASSES)) + 1.0)
            for n in range(BINS)
        ]
        widths = [end - start for start, end in pairwise([0.0, *self.edges])]
        for kind in range(CLASSES):
            hazard = [
                min(0.999, (self.used[kind, n] + 100 * min(overall[n], 0.999)) / (self.reached[kind, n] + 100))
                for n in range(BINS)
            ]
            lower = [other for other in range(kind) if kind > 2 or kind == other]
            for n in range(BINS - 1, -1, -1):
                rank = best_density(hazard, widths, n) if n < BINS - 1 else 0.0
                older = [self.ranks[kind, n + 1]] if n < BINS - 1 else []
                self.ranks[kind, n] = max([rank, *older])
            for n in range(BINS):
                self.ranks[kind, n] = max([self.ranks[kind, n], *(self.ranks[other, n] for other in lower)])
        for counts in (self.used, self.reached):
            for place in counts:
                counts[place] *= 0.993


def best_density(hazard: list[float], widths: list[float], first: int) -> float:
    """From the middle of bin `first`: half of its hazard is left, and half of its width."""
    surviving, uses, time, best = 1.0, 0.0, 0.0, 0.0
    for n in range(first, BINS - 1):
        part = 2 if n == first else 1
        again = surviving * (hazard[n] / part)
        uses += again
        time += widths[n] / part * (surviving - again / 2)
        surviving -= again
        best = max(best, uses / time)
    return best
