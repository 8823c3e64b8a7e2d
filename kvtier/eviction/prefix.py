"""Prefix: blocks in chains, ranked by what chains of their history have given so far.

What it knows of a KV cache: a block is worth nothing without those before it; those before it were used at least as
often, and as lately; sessions that came back once come back more often than new ones; and how soon depends on the
workload, which is learned while it runs.

Sources: hit density, and ranking by what is expected within the best horizon: N. Beckmann, H. Chen and A. Cidon, "LHD:
Improving Cache Hit Rate by Maximizing Hit Density", NSDI 2018. Reuse probability by class and age of KV blocks:
J. Wang et al., "KVCache Cache in the Wild", USENIX ATC 2025. Whether a conversation goes on is the question of D. Yang,
A. Li, K. Li and W. Lloyd, "Learned Prefix Caching for Efficient LLM Inference" (LPC), NeurIPS 2025, whose predictor
reads what the user wrote; this policy sees keys only.

Its weakness: it must learn. On a trace whose reuse follows no class it is LRU with some noise, and a cache so large
that little is evicted has nothing to choose.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heapreplace
from itertools import groupby, islice
from typing import Self

from kvtier.abc import EvictionPolicy
from kvtier.errors import InvariantError
from kvtier.eviction.reuse import MAX_TURN_BLOCKS, NEW, NEW_BRANCH, NEW_TURN, NUM_CLASSES, ReuseTable, class_of
from kvtier.keys import OffloadKey

GHOSTS_PER_KEY = 4
"""Evicted keys that are remembered, for each key of the capacity: sessions come back later than they are evicted."""

LEARN_AFTER = 2048
"""Uses of blocks between two computations of the ranks; the first ones come earlier."""

_FIRST_LEARNING = 256
_ONCE_USED = (NEW, NEW_BRANCH, NEW_TURN)
_MIN_BETWEEN_LEARNINGS = 128
"""A shadow learns more often than its share of the uses says, but no more often than this: learning is not cheap."""

_MIN_FIRST_LEARNING = 32


class Part:
    """Blocks that one call used, which follow one another and have one history.

    Attributes:
        keys: in prefix order; those that a later call used, or that were evicted, may still be named.
        kind: class, for the table; uses: of each block.
        time: of the use, in uses of blocks.
        held, ghosts: blocks of it that are held, and those evicted that are remembered.
    """

    __slots__ = ("ghosts", "held", "keys", "kind", "time", "uses")

    def __init__(self, keys: list[OffloadKey], kind: int, uses: int, time: int) -> None:
        self.keys, self.kind, self.uses, self.time = keys, kind, uses, time
        self.held, self.ghosts = len(keys), 0


class PrefixPolicy(EvictionPolicy):
    """Lowest expected hits for a block's room first, tail-first within one call.

    A block is held in the part of its last use; parts of a class wait in the order of their time. Ranks never rise with
    age, so that the next victim is the oldest part of some class, and finding it costs a comparison of classes.
    A request is what comes up to and with one insert: a `touch` of what it found, then its new blocks.
    """

    def __init__(self, capacity: int, share: float = 1.0) -> None:
        """Args: capacity: as for every policy; share: of all keys that it is shown, see `for_sample`."""
        super().__init__(capacity)
        self._table = ReuseTable(capacity, share)
        self._learn_after = max(_MIN_BETWEEN_LEARNINGS, int(LEARN_AFTER * share))
        self._first_learning = max(_MIN_FIRST_LEARNING, int(_FIRST_LEARNING * share))
        self._part_of: dict[OffloadKey, Part] = {}
        self._ghosts: OrderedDict[OffloadKey, Part] = OrderedDict()
        self._queues: list[OrderedDict[Part, None]] = [OrderedDict() for _ in range(NUM_CLASSES)]
        # Parts by the bin of age they are in, oldest first; those without a block leave at the next border.
        self._ageing: list[deque[Part]] = [deque() for _ in range(len(self._table.edges) + 1)]
        self._now = 0
        self._learn_at = self._first_learning
        self._num_found = 0

    @classmethod
    def for_sample(cls, capacity: int, share: float) -> Self:
        """Return a policy that learns from as many uses of all keys as it would if it were shown them all."""
        return cls(capacity, share)

    def touch(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Count a use of the held ones of `keys`; a use at once after another by the same keys is the same use."""
        part_of = self._part_of
        parts = [part_of.get(key) for key in keys]
        if None in parts:
            keys = [key for key, part in zip(keys, parts, strict=True) if part is not None]
            parts = [part for part in parts if part is not None]
        if keys:
            self._num_found += len(keys)
            self._use(keys, parts, NEW)

    def insert(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Hold `keys`: with their former uses those that a ghost remembers, as new the others."""
        if not keys:
            return
        ghosts = self._ghosts
        parts: list[Part | None] = [None] * len(keys)
        num_found, self._num_found = self._num_found, 0
        if not ghosts.keys().isdisjoint(keys):
            parts = [ghosts.pop(key, None) for key in keys]
            num_found += len(keys) - parts.count(None)
        kind = NEW
        if num_found > 1:
            kind = NEW_TURN if parts.count(None) <= MAX_TURN_BLOCKS else NEW_BRANCH
        self._use(keys, parts, kind)

    def _use(self, keys: Sequence[OffloadKey], parts: Sequence[Part | None], kind_of_new: int) -> None:
        """Move `keys` from `parts` into new ones."""
        now, begin = self._now, 0
        groups: list[tuple[list[OffloadKey], int, int]] = []
        for part, same in groupby(parts):
            end = begin + len(list(same))
            block, begin = list(keys[begin:end]), end
            if part is None:
                groups.append((block, 1, kind_of_new))
                continue
            is_again = part.time == now
            if not is_again:
                self._table.note_used(part.kind, now - part.time, len(block))
            groups.append((block, part.uses + (not is_again), part.kind))
            self._leave(part, block)
        self._now = now + len(keys)
        self._add_all(groups)
        self._age()

    def _add_all(self, groups: list[tuple[list[OffloadKey], int, int]]) -> None:
        """Make parts of the present of (blocks, uses, class if that is one), in prefix order.

        From the tail, lest a block seem less used than those behind it.
        """
        fresh: list[Part] = []
        most_uses = 0
        for block, uses, kind_of_one in reversed(groups):
            most_uses = max(uses, most_uses)
            kind = class_of(most_uses) if most_uses > 1 else kind_of_one
            if fresh and fresh[-1].kind == kind:
                former = fresh.pop()
                block = block + former.keys
            fresh.append(Part(block, kind, most_uses, self._now))
        for part in fresh:
            self._add(part)

    def _leave(self, part: Part, keys: Sequence[OffloadKey]) -> None:
        """Blocks of `part` go elsewhere: all of them are held, or all of them were ghosts."""
        if keys[0] in self._part_of:
            part.held -= len(keys)
            self._tidy(part)
        else:
            part.ghosts -= len(keys)

    def _tidy(self, part: Part) -> None:
        """Drop what the part no longer holds, once that is most of it."""
        if not part.held:
            self._queues[part.kind].pop(part, None)
            part.keys = []
        elif len(part.keys) > 2 * part.held + 4:
            part_of = self._part_of
            part.keys = [key for key in part.keys if part_of.get(key) is part]

    def _add(self, part: Part) -> None:
        self._part_of.update(dict.fromkeys(part.keys, part))
        self._queues[part.kind][part] = None
        self._ageing[0].append(part)
        self._table.note_reached(part.kind, 0, part.held)

    def _age(self) -> None:
        """Count the parts that came into the next bin of age, and learn from time to time."""
        now, ageing = self._now, self._ageing
        for index, edge in enumerate(self._table.edges):
            queue = ageing[index]
            while queue and now - queue[0].time >= edge:
                part = queue.popleft()
                if size := part.held + part.ghosts:
                    self._table.note_reached(part.kind, index + 1, size)
                    ageing[index + 1].append(part)
        last = ageing[-1]
        while last and now - last[0].time >= 2 * self._table.edges[-1]:
            last.popleft()
        if now >= self._learn_at:
            self._table.learn()
            self._learn_at = now + min(self._learn_after, now)

    def candidates(self, incoming: Sequence[OffloadKey] = ()) -> Iterator[OffloadKey]:
        """Yield the held keys, lowest rank first, among equals oldest first; `incoming` does not matter."""
        ranks, edges, now, part_of = self._table.ranks, self._table.edges, self._now, self._part_of

        def entry(parts: Iterator[Part]) -> tuple[float, int, int, Part, Iterator[Part]] | None:
            part = next(parts, None)
            if part is None:
                return None
            rank = ranks[part.kind][bisect_right(edges, now - part.time)]
            return rank, part.time, part.kind, part, parts

        heap = [found for queue in self._queues if (found := entry(iter(queue)))]
        heapify(heap)
        while heap:
            *_, part, parts = heap[0]
            if part.held == len(part.keys):
                yield from reversed(part.keys)
            else:
                yield from [key for key in reversed(part.keys) if part_of.get(key) is part]
            following = entry(parts)
            if following is None:
                heappop(heap)
            else:
                heapreplace(heap, following)

    def evict(self, keys: Sequence[OffloadKey]) -> None:
        """Stop holding `keys` and remember their parts, as long as there is room for ghosts."""
        part_of, ghosts = self._part_of, self._ghosts
        for part, same in groupby(keys, key=part_of.pop):
            block = list(same)
            for key in block:
                ghosts[key] = part
            part.held -= len(block)
            part.ghosts += len(block)
            while part.keys and part_of.get(part.keys[-1]) is not part:
                part.keys.pop()
            self._tidy(part)
        for key in list(islice(ghosts, max(0, len(ghosts) - GHOSTS_PER_KEY * self.capacity))):
            ghosts.pop(key).ghosts -= 1

    def remove(self, keys: Sequence[OffloadKey]) -> None:
        """Forget `keys`, as held keys and as ghosts, and if nothing is left, what was learned, too."""
        for key in keys:
            part = self._part_of.pop(key, None)
            if part is not None:
                part.held -= 1
                self._tidy(part)
            ghost = self._ghosts.pop(key, None)
            if ghost is not None:
                ghost.ghosts -= 1
        if not self._part_of and not self._ghosts:
            self.clear()

    def settle(self, keys: Sequence[OffloadKey]) -> None:
        """Join the held ones of `keys` to parts of the present, as if one call had brought them; no use is counted."""
        held = [key for key in keys if key in self._part_of]
        groups = [(part, list(same)) for part, same in groupby(held, key=self._part_of.__getitem__)]
        kind_of_new = _kind_of_new_in(groups)
        for part, block in groups:
            if len(block) == len(part.keys) and self._now - part.time < self._table.edges[0]:
                self._table.take_back(part.kind, len(block))
            part.held -= len(block)
            self._tidy(part)
        self._add_all([(block, part.uses, kind_of_new) for part, block in groups])

    def uses_of(self, key: OffloadKey) -> int:
        """Return how often a block is known to have been used; 0 if it is not held."""
        part = self._part_of.get(key)
        return part.uses if part is not None else 0

    def clear(self) -> None:
        """Forget everything, what was learned included."""
        self._part_of.clear()
        self._ghosts.clear()
        for queue in self._queues:
            queue.clear()
        for parts in self._ageing:
            parts.clear()
        self._table.clear()
        self._now = self._num_found = 0
        self._learn_at = self._first_learning

    def __len__(self) -> int:
        return len(self._part_of)

    def __contains__(self, key: object) -> bool:
        return key in self._part_of

    def check_invariants(self) -> None:
        """Raise InvariantError if parts and keys contradict each other, or something outgrows its bound."""
        if len(self) > self.capacity or len(self._ghosts) > GHOSTS_PER_KEY * self.capacity:
            raise InvariantError(f"prefix: {len(self)} keys, {len(self._ghosts)} ghosts, capacity {self.capacity}")
        if not self._ghosts.keys().isdisjoint(self._part_of):
            raise InvariantError("prefix: a key is held and a ghost")
        held = [part for queue in self._queues for part in queue]
        if sum(part.held for part in held) != len(self) or {*self._part_of.values()} != set(held):
            raise InvariantError("prefix: parts and keys differ")
        for part in held:
            if part.held != sum(self._part_of.get(key) is part for key in part.keys):
                raise InvariantError("prefix: a part miscounts its keys")


def _kind_of_new_in(groups: Sequence[tuple[Part, Sequence[OffloadKey]]]) -> int:
    """Return the class of the blocks used once in one request: the first call knew what it had found before them."""
    num_known, num_new, first_kind = 0, 0, NEW
    for part, block in groups:
        if part.kind not in _ONCE_USED:
            num_known += len(block) if not num_new else 0
            continue
        if not num_new:
            first_kind = part.kind
        num_new += len(block)
    if first_kind == NEW and num_known <= 1:
        return NEW
    return NEW_TURN if num_new <= MAX_TURN_BLOCKS else NEW_BRANCH
