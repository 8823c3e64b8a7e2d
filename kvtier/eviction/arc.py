"""ARC: balances recency and frequency; hits on keys that were evicted too early (ghosts) set the balance.

N. Megiddo and D. S. Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003, figure 4.

Its weakness: p moves by one key per ghost hit, or by the ratio of the ghost lists if that is larger. So a large cache
adapts slowly when the workload changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from math import ceil, floor

from kvtier.abc import EvictionPolicy
from kvtier.errors import InvariantError
from kvtier.key_queues import KeyQueue, are_disjoint, clear_queues, key_queues
from kvtier.keys import OffloadKey


class ARCPolicy(EvictionPolicy):
    """Adaptive replacement, tail-first within one call.

    Held keys are in T1 (used once) or T2 (used again). Evicted keys are remembered in B1 or B2. Every list runs
    from its oldest to its most recent key. `p` is the target size of T1: a hit in B1 raises it, a hit in B2
    lowers it.

    With one key per call (`candidates([x])`, `evict`, `insert([x])`) every decision is the paper's. A batch follows
    the paper key by key, from its tail, with two differences. Adaptation does not count the ghosts made from the
    batch's own victims. Ghosts are trimmed once, at the end of the batch.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._t1: KeyQueue[None]
        self._t2: KeyQueue[None]
        self._b1: KeyQueue[None]
        self._b2: KeyQueue[None]
        self._t1, self._t2, self._b1, self._b2 = key_queues(4, capacity)
        self._p = 0.0
        # Ghosts made since the last insert. The paper adapts p before it evicts; here `evict` runs before `insert`,
        # so adaptation subtracts them.
        self._fresh_b1 = 0
        self._fresh_b2 = 0
        self._strangers: Sequence[OffloadKey] = ()
        """Keys without a ghost since the last `candidates`, which most often come in the next `insert`."""

    @property
    def p(self) -> float:
        """Target size of T1 in keys, 0 to `capacity`."""
        return self._p

    def insert(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Hold `keys`. Keys with a ghost go to T2, and each of them adapts p; the others go to T1."""
        t1, t2, b1, b2 = self._t1, self._t2, self._b1, self._b2
        if (keys and keys == self._strangers[: len(keys)]) or are_disjoint((b1, b2), keys):
            t1.append(keys[::-1], None)
            keys = ()
        self._strangers = ()
        for key in reversed(keys):
            if key in b1:
                self._p = self._raised(self._p, len(b1) - self._fresh_b1, len(b2) - self._fresh_b2)
                t2.take((key,), b1)
            elif key in b2:
                self._p = self._lowered(self._p, len(b1) - self._fresh_b1, len(b2) - self._fresh_b2)
                t2.take((key,), b2)
            else:
                t1.append((key,), None)
        self._fresh_b1 = self._fresh_b2 = 0
        self._trim_ghosts()

    def touch(self, keys: Sequence[OffloadKey], now: float = 0.0) -> bool:
        """Move the held ones of `keys` to the recent end of T2."""
        return self._t2.take(keys[::-1], self._t1, self._t2)

    def evict(self, keys: Sequence[OffloadKey]) -> None:
        """Stop holding `keys` and remember them: keys of T1 in B1, keys of T2 in B2."""
        left = len(self._t1)
        self._b1.take(keys, self._t1)
        num_recent = left - len(self._t1)
        if num_recent < len(keys):
            self._b2.take(keys, self._t2)
        self._fresh_b1 += num_recent
        self._fresh_b2 += len(keys) - num_recent

    def remove(self, keys: Sequence[OffloadKey]) -> None:
        """Forget `keys`, as held keys and as ghosts."""
        for queue in (self._t1, self._t2, self._b1, self._b2):
            queue.discard(keys)

    def candidates(self, incoming: Sequence[OffloadKey] = ()) -> Iterator[OffloadKey]:
        """Yield every held key in the order in which the paper's REPLACE evicts while `incoming` is inserted.

        The n-th victim is the paper's choice for the n-th key from the tail of `incoming`. After those, p stays fixed.
        """
        if are_disjoint((self._b1, self._b2), incoming):
            self._strangers = list(incoming)
            return self._candidates_for_strangers(len(incoming))
        return self._candidates_one_by_one(incoming)

    def _candidates_one_by_one(self, incoming: Sequence[OffloadKey]) -> Iterator[OffloadKey]:
        b1, b2 = self._b1, self._b2
        recent, frequent = iter(self._t1), iter(self._t2)
        left1, left2 = len(self._t1), len(self._t2)
        size1, ghosts1, ghosts2, p = left1, len(b1) - self._fresh_b1, len(b2) - self._fresh_b2, self._p
        for arrival in islice(reversed(incoming), left1 + left2):
            in_b2 = arrives_in_t1 = False
            if arrival in b1:
                p = self._raised(p, ghosts1, ghosts2)
                ghosts1 -= 1
            elif arrival in b2:
                p = self._lowered(p, ghosts1, ghosts2)
                ghosts2 -= 1
                in_b2 = True
            else:
                arrives_in_t1 = True
            if left1 and (not left2 or size1 > p or (in_b2 and size1 == p)):
                left1 -= 1
                size1 -= 1
                yield next(recent)
            else:
                left2 -= 1
                yield next(frequent)
            size1 += arrives_in_t1
        yield from islice(recent, max(0, ceil(size1 - p)))
        yield from frequent
        yield from recent

    def _candidates_for_strangers(self, num_incoming: int) -> Iterator[OffloadKey]:
        """Return the same order where no incoming key has a ghost.

        Then p stays fixed and every incoming key goes to T1. T2 gives the victims until T1 is larger than p, and T1
        gives them from then on. So the order consists of slices, found without a step per key.
        """
        recent, frequent, left1, left2 = iter(self._t1), iter(self._t2), len(self._t1), len(self._t2)
        num = min(num_incoming, left1 + left2)
        first2 = min(num, left2, max(0, floor(self._p) - left1 + 1) if left1 else left2)
        from1 = min(num - first2, left1)
        return chain(
            islice(frequent, first2),
            islice(recent, from1),
            islice(frequent, num - first2 - from1),
            islice(recent, max(0, ceil(left1 + num - from1 - self._p))),
            frequent,
            recent,
        )

    def settle(self, keys: Sequence[OffloadKey]) -> None:
        """Move the held ones of `keys` to the recent end of their own list, tail first."""
        self._t1.renew_all(keys[::-1], self._t2)

    line_up = settle

    def clear(self) -> None:
        """Forget everything, ghosts and p included."""
        clear_queues((self._t1, self._t2, self._b1, self._b2))
        self._p = 0.0
        self._fresh_b1 = self._fresh_b2 = 0
        self._strangers = ()

    def __len__(self) -> int:
        return len(self._t1) + len(self._t2)

    def __contains__(self, key: object) -> bool:
        return key in self._t1 or key in self._t2

    def check_invariants(self) -> None:
        """Raise InvariantError if lists overlap, lists are longer than the paper allows, or p is out of its range."""
        lists = (self._t1, self._t2, self._b1, self._b2)
        total = sum(map(len, lists))
        self._t1.check_invariants()
        if len(set().union(*lists)) != total:
            raise InvariantError("ARC: a key is in two lists")
        if len(self) > self.capacity:
            raise InvariantError(f"ARC holds {len(self)} keys, capacity {self.capacity}")
        if len(self._t1) + len(self._b1) > self.capacity or total > 2 * self.capacity:
            raise InvariantError(f"ARC: too many ghosts, lists of {[*map(len, lists)]}, capacity {self.capacity}")
        if not 0 <= self._p <= self.capacity:
            raise InvariantError(f"ARC: p={self._p} outside 0 to {self.capacity}")

    def _raised(self, p: float, ghosts1: int, ghosts2: int) -> float:
        return min(float(self.capacity), p + max(1.0, ghosts2 / max(1, ghosts1)))

    def _lowered(self, p: float, ghosts1: int, ghosts2: int) -> float:
        return max(0.0, p - max(1.0, ghosts1 / max(1, ghosts2)))

    def _trim_ghosts(self) -> None:
        t1, b1, b2 = self._t1, self._b1, self._b2
        # In a full policy these are the paper's limits. A tenant's policy holds less than its capacity, and remembers
        # no more keys than it holds.
        b1.drop(b1.oldest(len(b1) - min(self.capacity - len(t1), len(self))))
        b2.drop(b2.oldest(len(b1) + len(b2) - len(self)))
