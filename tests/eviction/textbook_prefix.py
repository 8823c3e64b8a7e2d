"""The prefix policy as its description says, for requests of one block, over a plain dict: the yardstick of tests.

Every block known, held or evicted, has its class, its uses, the time of its last use and the bin of age it is in. At
every request all of them are looked at; the victim is the least of all by a comparison of all.
"""

import struct
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import count

BINS = 24
EDGES = [1.5**n for n in range(BINS - 1)]
GAP_EDGES = (4, 8, 15, 30, 60, 120, 300, 900)
USE_EDGES = (2, 3, 4, 6, 11, 50)
GAPS, USES = range(10), range(7)


@dataclass
class Block:
    uses: int
    gap: int
    time: float
    place: int
    """When it came into its bin, among all."""
    bin: int = 0
    held: bool = True

    @property
    def kind(self) -> tuple[int, int]:
        return sum(self.uses >= edge for edge in USE_EDGES), self.gap


class TextbookPrefix:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.known: dict[Hashable, Block] = {}
        self.evicted: list[Hashable] = []
        self.reached = {(uses, gap, n): 0.0 for uses in USES for gap in GAPS for n in range(BINS)}
        self.used = dict(self.reached)
        self.ranks = dict(self.reached)
        self.times, self.places = count(), count()
        self.num_uses, self.learn_at = 0, 256
        self.declined = 0

    def __contains__(self, x: Hashable) -> bool:
        return x in self.known and self.known[x].held

    def request(self, x: Hashable) -> Hashable | None:
        """Use `x`; return what it evicted."""
        now, victim = float(next(self.times)), None
        self.grow_older(now)
        if x not in self and sum(other.held for other in self.known.values()) == self.capacity:
            victim = min((key for key in self.known if key in self), key=self.order)
            if self.ranks[*self.used_again(x, now).kind, 0] < self.order(victim)[0]:
                self.decline(x, now)
                return None
            self.known[victim].held = False
            self.evicted.append(victim)
            self.forget()
        if x in self.evicted:
            self.evicted.remove(x)
        former, block = self.known.get(x), self.used_again(x, now)
        if former is not None:
            self.used[*former.kind, self.bin_of(now - former.time)] += 1
        block.place = next(self.places)
        self.known[x] = block
        self.reached[*block.kind, 0] += 1
        self.num_uses += 1
        if self.num_uses >= self.learn_at:
            self.learn()
            self.learn_at = self.num_uses + min(2048, self.num_uses)
        return victim

    def used_again(self, x: Hashable, now: float) -> Block:
        former = self.known.get(x)
        if former is None:
            return Block(1, 0, now, 0)
        return Block(former.uses + 1, 1 + sum(now - former.time >= edge for edge in GAP_EDGES), now, 0)

    def order(self, key: Hashable) -> tuple[float, int, tuple[int, int], int]:
        block = self.known[key]
        return self.ranks[*block.kind, block.bin], -block.bin, block.kind, block.place

    def decline(self, x: Hashable, now: float) -> None:
        self.declined += 1
        if x not in self.known:
            self.known[x] = Block(1, 0, now, next(self.places), held=False)
            self.reached[0, 0, 0] += 1
            self.evicted.append(x)
            self.forget()

    def forget(self) -> None:
        if len(self.evicted) > 4 * self.capacity:
            del self.known[self.evicted.pop(0)]

    def grow_older(self, now: float) -> None:
        for block in sorted(self.known.values(), key=lambda block: (-block.bin, block.time)):
            reached = range(block.bin + 1, self.bin_of(now - block.time) + 1)
            for n in reached:
                self.reached[*block.kind, n] += 1
            if reached:
                block.bin, block.place = reached[-1], next(self.places)

    def bin_of(self, age: float) -> int:
        return sum(age >= edge for edge in EDGES)

    def learn(self) -> None:
        """Used again over reached, a class without history like its uses, these like all; then the best horizon."""
        chance = {}
        for n in range(BINS):
            used, reached = (sum(table[u, g, n] for u in USES for g in GAPS) for table in (self.used, self.reached))
            of_all = min(0.999, (used + 0.01) / (reached + 1.0))
            for u in USES:
                used, reached = (sum(table[u, g, n] for g in GAPS) for table in (self.used, self.reached))
                of_uses = min(0.999, (used + 100 * of_all) / (reached + 100))
                for g in GAPS:
                    own = (self.used[u, g, n] + 100 * of_uses) / (self.reached[u, g, n] + 100)
                    chance[u, g, n] = min(0.999, own)
        for u in USES:
            for g in GAPS:
                for n in range(BINS - 1):
                    self.ranks[u, g, n] = best_density([chance[u, g, m] for m in range(BINS - 1)], n)
        for counts in (self.used, self.reached):
            for place in counts:
                counts[place] *= 0.993


def best_density(chances: list[float], first: int) -> float:
    """From the middle of bin `first`: half of its chance is left, and half of its width."""
    surviving, uses, time, best = 1.0, 0.0, 0.0, 0.0
    for n in range(first, BINS - 1):
        part = 2 if n == first else 1
        again = surviving * (chances[n] / part)
        width = EDGES[n] - (EDGES[n - 1] if n else 0.0)
        uses += again
        time += width / part * (surviving - again / 2)
        surviving -= again
        best = max(best, uses / time)
    return struct.unpack("f", struct.pack("f", best))[0]  # errors of rounding decide nothing
