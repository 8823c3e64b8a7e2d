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

from kvtier.abc import EvictionPolicy
from kvtier.errors import InvariantError
from kvtier.eviction.reuse import MOST_TURN_BLOCKS, NEW, NEW_BRANCH, NEW_TURN, NUM_CLASSES, ReuseTable, class_of
from kvtier.keys import OffloadKey

GHOSTS_PER_KEY = 4
"""Evicted keys that are remembered, for each key of the capacity: sessions come back later than they are evicted."""

LEARN_AFTER = 2048
"""Uses of blocks between two computations of the ranks; the first ones come earlier."""

_FIRST_LEARNING = 256


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

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._table = ReuseTable(capacity)
        self._part_of: dict[OffloadKey, Part] = {}
        self._ghosts: OrderedDict[OffloadKey, Part] = OrderedDict()
        self._queues: list[OrderedDict[Part, None]] = [OrderedDict() for _ in range(NUM_CLASSES)]
        # Parts by the bin of age they are in, oldest first; those without a block leave at the next border.
        self._ageing: list[deque[Part]] = [deque() for _ in range(len(self._table.edges) + 1)]
        self._now = 0
        self._learn_at = _FIRST_LEARNING
        self._num_found = 0

    def touch(self, keys: Sequence[OffloadKey]) -> None:
        """Count a use of the held ones of `keys`; a use at once after another by the same keys is the same use."""
        part_of = self._part_of
        parts = [part_of.get(key) for key in keys]
        if None in parts:
            keys = [key for key, part in zip(keys, parts, strict=True) if part is not None]
            parts = [part for part in parts if part is not None]
        if keys:
            self._num_found += len(keys)
            self._use(keys, parts, NEW)

    def insert(self, keys: Sequence[OffloadKey]) -> None:
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
            kind = NEW_TURN if parts.count(None) <= MOST_TURN_BLOCKS else NEW_BRANCH
        self._use(keys, parts, kind)

    def _use(self, keys: Sequence[OffloadKey], parts: Sequence[Part | None], kind_of_new: int) -> None:
        """Move `keys` from `parts` into new ones: from the tail, lest a block seem less used than those behind it."""
        now = self._now
        groups = [(part, len(list(same))) for part, same in groupby(parts)]
        end, most_uses = len(keys), 0
        fresh: list[tuple[list[OffloadKey], int, int]] = []
        for part, size in reversed(groups):
            uses = 1
            if part is not None:
                is_again = part.time == now
                uses = part.uses + (not is_again)
                if not is_again:
                    self._table.note_used(part.kind, now - part.time, size)
            most_uses = max(uses, most_uses)
            kind = class_of(most_uses) if most_uses > 1 else kind_of_new if part is None else part.kind
            block = list(keys[end - size : end])
            end -= size
            if fresh and fresh[-1][1] == kind:
                fresh[-1] = (block + fresh[-1][0], kind, most_uses)
            else:
                fresh.append((block, kind, most_uses))
            if part is not None:
                self._leave(part, block)
        self._now = now = now + len(keys)
        for block, kind, uses in fresh:
            self._add(Part(block, kind, uses, now))
        self._age()

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
            self._learn_at = now + min(LEARN_AFTER, now)

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
            for key in reversed(part.keys):
                if part_of.get(key) is part:
                    yield key
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
            ghosts.update(dict.fromkeys(block, part))
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
        """Join the held ones of `keys` to parts of the present, by their classes; no use is counted."""
        part_of = self._part_of
        held = [key for key in keys if key in part_of]
        blocks: list[Part] = []
        for part, same in groupby(held, key=part_of.__getitem__):
            block = list(same)
            part.held -= len(block)
            if blocks and blocks[-1].kind == part.kind:
                blocks[-1].keys += block
                blocks[-1].held += len(block)
            else:
                blocks.append(Part(block, part.kind, part.uses, self._now))
            self._tidy(part)
        for part in reversed(blocks):
            self._add(part)

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
        self._learn_at = _FIRST_LEARNING

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
