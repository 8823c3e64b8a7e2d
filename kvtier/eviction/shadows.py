"""Shadow caches: what other policies and sizes would have hit, found by replaying a sample of the keys.

A shadow is a real policy with a small capacity and no bytes. It is shown the keys whose hash falls into a share of all
hashes, and its capacity is that share of the cache's: C. Waldspurger, N. Park, A. Garthwaite and I. Ahmad, "Efficient
MRC Construction with SHARDS", FAST 2015. Whole chains as the unit of the sample were tried, and are worse: a head that
all requests share makes it all or nothing, and one session more or less moves the result by points. Of a chain, the
sample keeps some blocks in their order; the first of them that a shadow lacks ends its hit, as in the cache itself.

Its weakness: a block that every request uses is in the sample or not, so that the rates are not those of the cache.
All shadows see the same sample; their differences are what to look at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Mapping, Sequence
from itertools import chain, islice
from typing import NamedTuple

from kvtier.abc import EvictionPolicy
from kvtier.errors import InvariantError
from kvtier.keys import GROUP_BYTES, OffloadKey

FEWEST_KEYS = 128
"""Least capacity of a shadow, if the cache has as much."""

MAX_KEYS = 512
"""Most capacity of a shadow: what is beyond costs warmth and brings no better order of policies."""

EARNED_PER_USE = 1 / 4096
"""Sampled uses that every use of a block pays for: replaying one costs about 30 times as much as storing a block."""

FIRST_CREDIT = 4096
"""Sampled uses that are free, once: a young cache learns before it rests."""

COUNTED_IN_ROUND = 1024
"""Sampled uses that are to count before the next rest, beside those that warm the shadows."""

BATCH_KEYS = 8
"""Sampled keys that a policy is given at once: a call costs as much as several keys."""

MAX_RUN_KEYS = 32
"""Sampled keys of one request that are followed, its first ones: it bounds what a step of work takes."""

MAX_WAITING = 16
"""Batches that may wait for being replayed; what comes beyond is not followed."""

WARM_CAPACITIES = 2
"""A shadow's hits count once it has seen this many times its capacity."""

_SCALE = 256
_HASH_END = GROUP_BYTES + 1

Run = Sequence[OffloadKey]
"""Sampled keys of one request, in prefix order."""


class Sampler:
    """Picks the keys that shadows see, by one byte of their hashes, or two for very large caches.

    Attributes:
        capacity: keys that a shadow of the same size has.
    """

    def __init__(self, capacity: int) -> None:
        """Args: capacity: of the cache, at least 1."""
        wanted = min(MAX_KEYS, max(FEWEST_KEYS, capacity // _SCALE))
        num_values = min(_SCALE, max(1, round(wanted * _SCALE / capacity)))
        # Evenly spread values: hashes that are counters, as in traces, are then sampled evenly, too.
        values = bytes(index * _SCALE // num_values for index in range(num_values))
        self._others = bytes(set(range(_SCALE)) - set(values))
        self._values = frozenset(values)
        # For caches that need less than one value of 256: the byte before is below this, too.
        self._most_second = min(_SCALE, max(1, MAX_KEYS * _SCALE * _SCALE // capacity))
        self.capacity = max(1, capacity * num_values * self._most_second // (_SCALE * _SCALE))

    def pick(self, keys: Sequence[OffloadKey]) -> list[OffloadKey]:
        """Return those of `keys`, all of one length, that are in the sample, in their order."""
        size = len(keys[0]) if keys else 0
        last_bytes = b"".join(keys)[size - _HASH_END :: size] if size else b""
        if not last_bytes.translate(None, self._others):
            return []
        values = self._values
        picked = [key for key, value in zip(keys, last_bytes, strict=False) if value in values]
        if self._most_second < _SCALE:
            return [key for key in picked if key[-_HASH_END - 1] < self._most_second]
        return picked


class ShadowCache:
    """One policy with one capacity, and what it has hit.

    Attributes:
        hits, blocks: uses of sampled blocks that were hits, and all of them, since the shadow was warm.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        """Args: policy: empty."""
        self.policy = policy
        self.hits = self.blocks = 0
        self.rest()

    def rest(self) -> None:
        """Nothing is replayed for a while: what is held then is of no use until it has been replaced."""
        self._until_warm = WARM_CAPACITIES * self.policy.capacity

    @property
    def is_warm(self) -> bool:
        """Whether hits count."""
        return self._until_warm <= 0

    def replay(self, runs: Sequence[Run], keys: Sequence[OffloadKey]) -> int:
        """Use the keys of a batch; return how many of them were hits: those before the first of their run not held.

        Args:
            runs: oldest first.
            keys: all of them, each once, the newest run first: the order in which a policy is given one use.
        """
        policy = self.policy
        held = set(filter(policy.__contains__, keys))
        hits = len(held) if len(runs) == len(keys) else _leading_hits(runs, held)
        if held:
            policy.touch([key for key in keys if key in held])
        if len(held) < len(keys):
            self._make_room([key for key in keys if key not in held], keys)
            for run in runs:
                # One call a run: to some policies, what one call inserts is of one request.
                missing = [key for key in run if key not in held]
                if missing:
                    policy.insert(missing)
        if self._until_warm > 0:
            self._until_warm -= len(keys)
        else:
            self.hits += hits
            self.blocks += len(keys)
        return hits

    def _make_room(self, missing: list[OffloadKey], batch: Sequence[OffloadKey]) -> None:
        policy = self.policy
        wanted = len(policy) + len(missing) - policy.capacity
        if wanted > 0:
            own = set(batch)
            policy.evict(list(islice((key for key in policy.candidates(missing) if key not in own), wanted)))

    def clear(self) -> None:
        """Forget everything but the counts."""
        self.policy.clear()
        self.rest()


def _leading_hits(runs: Sequence[Run], held: set[OffloadKey]) -> int:
    hits = 0
    for run in runs:
        for key in run:
            if key not in held:
                break
            hits += 1
    return hits


class Batch(NamedTuple):
    """Sampled keys to replay in one call of each policy; see `ShadowCache.replay`."""

    runs: list[Run]
    keys: list[OffloadKey]


class SampledUses:
    """Turns calls about all keys into batches of sampled ones, within a budget.

    Attributes:
        batches: to be replayed, oldest first.
        resting: whether the budget is spent.
        num_rests: how often that happened.
    """

    def __init__(self, capacity: int) -> None:
        """Args: capacity: of the cache."""
        self.sampler = Sampler(capacity)
        # Together less than half of the capacity, which is what the smallest shadow has.
        self._batch_keys = max(1, min(BATCH_KEYS, self.sampler.capacity // 8))
        self._most_run = max(1, min(MAX_RUN_KEYS, self.sampler.capacity // 4))
        self._round = float(2 * WARM_CAPACITIES * self.sampler.capacity + COUNTED_IN_ROUND)
        self._credit = max(float(FIRST_CREDIT), self._round)
        self.resting = False
        self.num_rests = 0
        self.clear()

    def clear(self) -> None:
        """Forget what was used; what it cost is not forgotten."""
        self.batches: deque[Batch] = deque()
        self._runs: list[Run] = []
        self._run: list[OffloadKey] = []
        self._known: set[OffloadKey] = set()

    def note_found(self, keys: Sequence[OffloadKey], held: Container[OffloadKey]) -> None:
        """A request uses those of `keys` that are `held`: the beginning of its run.

        What the cache does not hold is no use of it: a request that waits may name its missing blocks at every step.
        """
        if self.resting:
            self._credit += len(keys) * EARNED_PER_USE
            return
        if self._run:
            self._end_run()
        if self._earns(len(keys)):
            self._run = [key for key in self.sampler.pick(keys) if key in held]

    def note_new(self, keys: Sequence[OffloadKey]) -> None:
        """A request uses `keys`, which the cache did not hold: the end of its run."""
        if self._earns(len(keys)):
            picked = self.sampler.pick(keys)
            if picked:
                self._run += picked
        if self._run:
            self._end_run()

    def _earns(self, num_keys: int) -> bool:
        """Add what the uses pay for; return whether there is credit to follow them."""
        self._credit += num_keys * EARNED_PER_USE
        if self.resting and self._credit >= self._round:
            self.resting = False
        return not self.resting

    def _end_run(self) -> None:
        """Add the run to the batch; a key comes once in a batch, whatever used it again."""
        known = self._known
        run = [key for key in dict.fromkeys(self._run) if key not in known][: self._most_run]
        self._run = []
        if not run:
            return
        known.update(run)
        self._runs.append(run)
        if len(known) < self._batch_keys:
            return
        if len(self.batches) < MAX_WAITING:
            self.batches.append(Batch(self._runs, list(chain.from_iterable(reversed(self._runs)))))
            self._credit -= len(known)
        self._runs, self._known = [], set()
        if self._credit <= 0:
            self.resting = True
            self.num_rests += 1


class Shadows:
    """Every policy at the cache's size, and the one in charge at half and at twice of it.

    Attributes:
        caches: by name: the policies' names, `HALF` and `DOUBLE`.
    """

    HALF = "half"
    DOUBLE = "double"

    def __init__(self, capacity: int, kinds: Mapping[str, type[EvictionPolicy]], current: str) -> None:
        """Args: capacity: of the cache; kinds: policies by name; current: the name of the one in charge."""
        self.uses = SampledUses(capacity)
        self._kinds = dict(kinds)
        self.size = self.uses.sampler.capacity
        self._share = self.size / capacity
        self.caches = {name: self._make(kind, self.size) for name, kind in self._kinds.items()}
        self._batch: Batch | None = None
        self._left: list[str] = []
        self._hits: dict[str, int] = {}
        self._counts = False
        self._num_rests = 0
        self.put_in_charge(current)

    def _make(self, kind: type[EvictionPolicy], capacity: int) -> ShadowCache:
        return ShadowCache(kind.for_sample(capacity, min(1.0, self._share)))

    def put_in_charge(self, current: str) -> None:
        """Another policy is in charge: the shadows of other sizes begin anew, with its kind."""
        kind = self._kinds[current]
        former = [self.caches.get(name) for name in (self.HALF, self.DOUBLE)]
        self.caches[self.HALF] = self._make(kind, max(1, self.size // 2))
        self.caches[self.DOUBLE] = self._make(kind, self.size * 2)
        for name, old in zip((self.HALF, self.DOUBLE), former, strict=True):
            if old is not None:
                self.caches[name].hits, self.caches[name].blocks = old.hits, old.blocks
        self._batch = None

    @property
    def is_busy(self) -> bool:
        """Whether a batch has been replayed in some shadows, and not yet in all."""
        return self._batch is not None

    @property
    def is_warm(self) -> bool:
        """Whether the hits of all policies count."""
        return all(self.caches[name].is_warm for name in self._kinds)

    def work(self) -> tuple[int, Mapping[str, int]] | None:
        """Replay one batch in one shadow, if there is one.

        Returns:
            When that ended a batch, and if all policies were warm: the keys in it, and the hits by name.
        """
        if self._batch is None and not self._begin():
            return None
        batch = self._batch
        if batch is None:
            return None
        name = self._left.pop()
        self._hits[name] = self.caches[name].replay(batch.runs, batch.keys)
        if self._left:
            return None
        self._batch = None
        return (len(batch.keys), self._hits) if self._counts else None

    def _begin(self) -> bool:
        uses = self.uses
        if not uses.batches:
            return False
        if self._num_rests != uses.num_rests:
            self._num_rests = uses.num_rests
            for cache in self.caches.values():
                cache.rest()
        self._batch = uses.batches.popleft()
        self._left = list(self.caches)
        self._hits, self._counts = {}, self.is_warm
        return True

    def clear(self) -> None:
        """Forget everything but the counts."""
        self.uses.clear()
        for cache in self.caches.values():
            cache.clear()
        self._batch = None

    def check_invariants(self) -> None:
        """Raise InvariantError if a shadow contradicts itself or outgrew its share."""
        for name, cache in self.caches.items():
            cache.policy.check_invariants()
            if len(cache.policy) > cache.policy.capacity or cache.hits > cache.blocks:
                raise InvariantError(f"shadow {name}: {len(cache.policy)} keys, {cache.hits} of {cache.blocks} hits")
        if len(self.uses.batches) > MAX_WAITING:
            raise InvariantError(f"shadows: {len(self.uses.batches)} batches wait")
