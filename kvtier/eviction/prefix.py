"""Prefix: keeps blocks in prefix trees, and ranks them by the reuse that blocks of the same history have had so far.

It rests on four properties of a KV cache. A block is worth nothing without the blocks before it. A session that came
back once comes back more often than a new one. Its last gap tells how soon. All of this depends on the workload, so
the policy learns it while it runs.

Sources: hit density, and ranking by what is expected within the best horizon: N. Beckmann, H. Chen and A. Cidon, "LHD:
Improving Cache Hit Rate by Maximizing Hit Density", NSDI 2018. Reuse probability by class and age of KV blocks:
J. Wang et al., "KVCache Cache in the Wild", USENIX ATC 2025. Whether a conversation goes on is the question of D. Yang,
A. Li, K. Li and W. Lloyd, "Learned Prefix Caching for Efficient LLM Inference" (LPC), NeurIPS 2025, whose predictor
reads what the user wrote; this policy sees keys only.

Its weakness: it must learn. On a trace whose reuse does not depend on the class it is LRU with some noise. In a cache
so large that little is evicted it has nothing to choose.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from operator import itemgetter

from kvtier.abc import EvictionPolicy
from kvtier.errors import InvariantError
from kvtier.eviction.ages import Ages
from kvtier.eviction.chains import Chains, Part, Request, are_same, living
from kvtier.eviction.leaves import Leaves
from kvtier.eviction.reuse import ReuseTable, class_of
from kvtier.key_queues import KeyQueue, key_queues
from kvtier.keys import OffloadKey

GHOSTS_PER_KEY = 4
"""Evicted keys that are remembered, per key of capacity: many sessions come back after their blocks were evicted."""

LEARN_AFTER = 2048
"""Uses of blocks between two computations of the ranks. The first computation comes after `_FIRST_LEARNING` uses; from
there the distance doubles up to this."""

ASKED_AT_ONCE = 64
"""Most blocks of a part about which the policy asks at once whether they may be evicted: a caller mostly wants fewer
victims than a long part has blocks."""

_FIRST_LEARNING = 256
_MAX_REQUESTS = 1024
"""Most requests whose state is kept, and no more than the capacity. A forgotten request that uses blocks again counts
as a new one."""


class PrefixPolicy(EvictionPolicy):
    """Evicts the blocks with the fewest expected hits per block and second first, tail-first within a chain.

    A rank may rise with age: an agent's tool call returns after a while. Only leaves are victims, so no block goes
    before the blocks that depend on it, not even if these may not be evicted (`num_evictable`). Incoming blocks compete
    with held ones if the tier allows it (`may_decline`): while every held block ranks higher than the tail of a
    request, that tail is not stored.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._table = ReuseTable()
        self._chains = Chains(capacity)
        self._number_of = self._chains.number_of
        self._ghosts: KeyQueue[int]  # numbers of the parts that they were evicted from
        (self._ghosts,) = key_queues(1, GHOSTS_PER_KEY * capacity)
        self._requests: OrderedDict[float, Request] = OrderedDict()
        self._leaves = Leaves(self._table)
        self._ages = Ages(self._table, self._leaves)
        self._begin()

    def _begin(self) -> None:
        self._current = Request(0.0)
        self._now = 0.0
        self._num_uses = 0
        self._learn_at = _FIRST_LEARNING

    # -- uses ---------------------------------------------------------------------------------------------

    def touch(self, keys: Sequence[OffloadKey], now: float = 0.0) -> bool:
        """Count a use of the held ones of `keys`, except of blocks whose last use was by the same request."""
        request, chains = self._request(now), self._chains
        used: list[Part] = []
        place, count = 0, len(keys)
        known = chains.find(keys[0]) if keys else None
        while known is not None:  # mostly whole parts, so that few keys have to be looked up
            run, following = chains.run_at(keys, place, known)
            if run and known.request is not request:
                used += self._take(known, list(run), request)
            place, known = place + len(run), following
        others = self._number_of.held(keys[place:]) if place < count else []
        for part, same in groupby(others, key=chains.find):
            if part is not None and part.request is not request:
                used += self._take(part, list(same), request)
        num_held = place + len(others)
        if num_held:
            request.last = others[-1] if others else keys[-1]
            self._end_use(request, used, num_held)
        return num_held == count

    def _take(self, part: Part, keys: list[OffloadKey], request: Request) -> list[Part]:
        """Count a use of `keys`, which are among the keys of `part`, and cut `part` so that they stand alone.

        Returns:
            The parts that hold exactly `keys` afterwards, in prefix order.
        """
        first = 0
        if not are_same(part.keys, keys):
            first = part.keys.index(keys[0])
            if not are_same(part.keys[first : first + len(keys)], keys):  # the caller gave keys out of prefix order
                wanted = set(keys)
                runs = [list(same) for is_wanted, same in groupby(part.keys, wanted.__contains__) if is_wanted]
                return [
                    taken
                    for run in runs
                    for taken in self._take(self._chains.parts[self._number_of[run[0]]], run, request)
                ]
        request.note_known(part.request, len(keys))
        self._table.note_used(part.kind, request.time - part.request.time, len(keys))
        if first:
            self._ages.enter(self._chains.cut(part, first))
        rest = part
        if len(keys) < len(part.keys):
            part = self._chains.cut(part, len(keys))
            if rest.is_leaf:
                self._leaves.enter(rest)
        else:
            self._leaves.leave(part)
            part = self._chains.renew(part) if part.ghosts else part
        part.uses += 1
        part.request = request
        return [part]

    def insert(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Hold `keys`. Keys with a ghost keep their former uses; the others are new."""
        request, ghosts = self._request(now), self._ghosts
        if not keys:
            return
        former: list[Part | None] = [None] * len(keys)
        if not ghosts.isdisjoint(keys):
            former = self._ghosts_of(keys)
            ghosts.discard(keys)
        new: list[Part] = []
        end = 0
        for ghost, same in groupby(former):
            begin, end = end, end + len(list(same))
            part = Part(list(keys[begin:end]), 0, self._uses_with(ghost, request, end - begin), request)
            self._chains.hold(part)
            self._link(part, request.last)
            request.last = part.keys[-1]
            new.append(part)
        self._end_use(request, new, len(keys))

    def _uses_with(self, ghost: Part | None, request: Request, num_blocks: int) -> int:
        """Count the return of evicted blocks, and return how often they were used, this request included.

        Args:
            ghost: the part that the blocks were evicted from; None if they are new.
        """
        if ghost is None:
            return 1
        ghost.ghosts -= num_blocks
        self._chains.retire(ghost)
        if ghost.request is request:
            return ghost.uses
        request.note_known(ghost.request, num_blocks)
        self._table.note_used(ghost.kind, request.time - ghost.request.time, num_blocks)
        return ghost.uses + 1

    def _request(self, now: float) -> Request:
        """Return the request that came at `now`, which no two requests share; let parts age up to a new one."""
        request = self._requests.get(now)
        if request is None:
            request = self._requests[now] = Request(now)
            if len(self._requests) > min(_MAX_REQUESTS, self.capacity):
                self._requests.popitem(last=False)
            if now > self._now:
                self._now = now
                self._ages.advance(now)
        self._current = request
        return request

    def _end_use(self, request: Request, parts: Sequence[Part], num_blocks: int) -> None:
        """Enter used `parts` in the first bin of their class; learn if enough blocks were used since the last time."""
        for part in parts:
            part.kind, part.bin = class_of(part.uses, request.gap), 0
            self._table.note_reached(part.kind, 0, len(part.keys))
            self._ages.enter(part)
            if not part.children:
                self._leaves.enter(part)
        request.length += num_blocks
        self._num_uses += num_blocks
        if self._num_uses >= self._learn_at:
            self._learn_at = self._num_uses + min(LEARN_AFTER, self._num_uses)
            self._leaves.learn()

    def settle(self, keys: Sequence[OffloadKey]) -> None:
        """Join the parts of a request that is over. Its blocks that were not stored become ghosts."""
        blocks = self._blocks(keys)
        users = {part.request for part, _ in blocks if part is not None}
        # The request that is over was open, with its last block among `keys`. Others used some of the blocks before it
        # or since. Of those that are open, too, it is the oldest.
        own = {user.last for user in users}
        own = own.intersection(keys[-1:] if own <= {None, *keys[-1:]} else keys)
        open_users = [user for user in users if user.last in own]
        request = min(open_users or users, key=lambda user: user.time, default=self._current)
        request.length = len(keys)
        gap = request.gap
        before: OffloadKey | None = None
        above: Part | None = None
        for part, block in blocks:
            part = part and living(part)  # a former round may have joined it to another part
            if part is None:
                self._remember([key for key in dict.fromkeys(block) if key not in self._ghosts], request)
            elif part.keys[0] == block[0]:
                if part.parent is None:
                    self._link(part, before)
                if part.request is request:
                    self._classify(part, class_of(part.uses, gap))
                    part = self._join(part) if above is not None and part.parent is above else part
            before, above = block[-1], part
        request.last = None
        for part, _ in blocks:
            if part is not None:
                living(part).freeze()
        self._forget_ghosts(GHOSTS_PER_KEY * self.capacity)

    def _blocks(self, keys: Sequence[OffloadKey]) -> list[tuple[Part | None, Sequence[OffloadKey]]]:
        """Return `keys` in groups of neighbours of one part, each with that part; None for keys that are not held."""
        blocks: list[tuple[Part | None, Sequence[OffloadKey]]] = []
        place, part = 0, self._chains.find(keys[0]) if keys else None
        while part is not None:
            run, following = self._chains.run_at(keys, place, part)
            if run:
                blocks.append((part, run))
            place, part = place + len(run), following
        others = groupby(keys[place:], key=self._chains.find)
        return [*blocks, *((part, list(same)) for part, same in others)]

    def _classify(self, part: Part, kind: int) -> None:
        """Move a part to its final class: the request's gap may have become known after the part was entered."""
        if kind != part.kind:
            if not part.bin:
                self._table.take_back(part.kind, len(part.keys))
                self._table.note_reached(kind, 0, len(part.keys))
            is_leaf = self._leaves.leave(part)
            part.kind = kind
            if is_leaf:
                self._leaves.enter(part)

    def _join(self, part: Part) -> Part:
        """Join a part to its parent if the same request used both and they have one class and age; return the part that
        holds its blocks then.
        """
        above = part.parent
        if (
            above is None
            or above.request is not part.request
            or (above.kind, above.bin) != (part.kind, part.bin)
            or len(above.children) > 1
            or part.place + 1 < len(above.keys)
            or above.ghosts
            or part.ghosts
        ):
            return part
        if not part.children:
            self._leaves.leave(part)
        if not part.bin:  # each part counts up to MAX_WEIGHT blocks, and two parts are one from now on
            for kept in (part, above):
                self._table.take_back(kept.kind, len(kept.keys))
        # Two parts of one class and age have one rank and go together. If uses had to be equal, too, each turn of a
        # session would stay a part of its own.
        above.uses = min(above.uses, part.uses)
        above = self._chains.join(part)
        if not above.bin:
            self._table.note_reached(above.kind, 0, len(above.keys))
        if above.is_leaf:
            self._leaves.enter(above)
        return above

    def _remember(self, keys: Sequence[OffloadKey], request: Request) -> None:
        """Keep ghosts of blocks that a request brought and that were not stored."""
        if keys:
            ghost = Part([], class_of(1, request.gap), 1, request)
            ghost.ghosts = len(keys)
            self._ghosts.append(keys, self._chains.number(ghost))
            self._table.note_reached(ghost.kind, 0, len(keys))
            self._ages.enter(ghost)

    def _link(self, part: Part, before: OffloadKey | None) -> None:
        parent = self._chains.link(part, before) if before is not None else None
        if parent is not None:
            self._leaves.leave(parent)

    # -- victims ------------------------------------------------------------------------------------------

    def candidates(self, incoming: Sequence[OffloadKey] = ()) -> Iterator[OffloadKey]:
        """Yield the held keys, lowest rank first. If keys may be declined, end where all that is left ranks above the
        tail of `incoming`.
        """
        return chain.from_iterable(self._victims(self._ranks_of(incoming) if self.may_decline else [], len(incoming)))

    def _victims(self, ranks: Sequence[float], num_incoming: int) -> Iterator[Iterable[OffloadKey]]:
        """Yield the blocks of one part after another, as far as they may be evicted and no block that stays needs them.
        If incoming blocks may be declined, end once there is room for those that rank high enough.

        Args:
            ranks: of the incoming blocks, tail first; empty if none of them may be declined.
        """
        num_given = num_declined = 0
        stuck: set[Part] = set()
        for rank, part in self._leaves.victims(stuck):
            while num_declined < len(ranks) and ranks[num_declined] < rank:
                num_declined += 1
            if num_declined and num_given >= num_incoming - num_declined:
                return
            if self.num_evictable is len:
                yield reversed(part.keys)
                if part.request is not self._current:  # no caller evicts blocks that the same request has used
                    num_given += len(part.keys)
                continue
            for end in range(len(part.keys), 0, -ASKED_AT_ONCE):
                asked = part.keys[max(0, end - ASKED_AT_ONCE) : end][::-1]
                count = self.num_evictable(asked)
                yield asked[:count]
                num_given += count
                if count < len(asked):
                    stuck.add(part)
                    break

    def _ranks_of(self, incoming: Sequence[OffloadKey]) -> list[float]:
        """Return the ranks that `incoming` will have, tail first. No block ranks below one that depends on it."""
        if not incoming:
            return []
        request = Request(self._current.time)
        request.num_known = self._current.num_known
        request.former_time, request.former_length = self._current.former_time, self._current.former_length
        if self._ghosts.isdisjoint(incoming):
            return [self._table.ranks[class_of(1, request.gap)][0]] * len(incoming)
        former = self._ghosts_of(incoming)
        for ghost in former:
            if ghost is not None and ghost.request is not self._current:
                request.note_known(ghost.request, 1)
        gap, highest, ranks = request.gap, -1.0, list[float]()
        for ghost, same in groupby(reversed(former)):
            kind = class_of(1 if ghost is None else ghost.uses + 1, gap)
            highest = max(highest, self._table.ranks[kind][0])
            ranks += [highest for _ in same]
        return ranks

    def evict(self, keys: Sequence[OffloadKey]) -> None:
        """Stop holding `keys`, and remember them and their parts as ghosts; the oldest ghosts beyond the limit go.

        The limit follows from what was held so far. A full policy held its capacity, but a tenant's policy holds a part
        of a tier, and all tenants together must not remember more than one policy would.
        """
        ghosts, most_ghosts = self._ghosts, GHOSTS_PER_KEY * len(self)
        former = map(self._chains.parts.__getitem__, self._number_of.pop_all(keys))
        for part, same in groupby(zip(former, keys, strict=True), key=itemgetter(0)):
            block = [key for _, key in same]
            ghosts.append(block, self._chains.number(part))
            part.ghosts += len(block)
            self._drop(part, block)
        self._forget_ghosts(most_ghosts)

    def _drop(self, part: Part, keys: list[OffloadKey]) -> None:
        self._chains.drop(part, keys)
        if part.keys:
            return
        self._leaves.leave(part)
        self._chains.retire(part)
        parent = self._chains.unlink(part)
        if parent is not None:
            self._leaves.enter(parent)

    def _forget_ghosts(self, most: int) -> None:
        oldest = self._ghosts.oldest(len(self._ghosts) - most)
        for ghost in self._ghosts_of(oldest):
            if ghost is not None:
                ghost.ghosts -= 1
                if not ghost.ghosts:
                    self._chains.retire(ghost)
        self._ghosts.drop(oldest)

    def _ghosts_of(self, keys: Sequence[OffloadKey]) -> list[Part | None]:
        """Return the part that each key was evicted from; None for keys that are no ghosts."""
        parts, ghosts = self._chains.parts, self._ghosts
        return [None if (number := ghosts.get(key)) is None else parts[number] for key in keys]

    def remove(self, keys: Sequence[OffloadKey]) -> None:
        """Forget `keys`, held or ghosts. If no held key and no ghost is left, forget what was learned, too."""
        held: dict[Part, list[OffloadKey]] = {}
        for key in keys:
            part, (ghost,) = self._chains.find(key), self._ghosts_of((key,))
            if part is not None:
                del self._number_of[key]
                held.setdefault(part, []).append(key)
            if ghost is not None:
                del self._ghosts[key]
                ghost.ghosts -= 1
                self._chains.retire(ghost)
        for part, block in held.items():
            self._drop(part, block)
        if not self._number_of and not self._ghosts:
            self.clear()

    def uses_of(self, key: OffloadKey) -> int:
        """Return how many uses of a held block are known; 0 if it is not held."""
        part = self._chains.find(key)
        return part.uses if part is not None else 0

    def clear(self) -> None:
        """Forget everything, including what was learned."""
        for state in (self._chains, self._ghosts, self._requests, self._leaves, self._ages, self._table):
            state.clear()
        self._begin()

    def __len__(self) -> int:
        return len(self._number_of)

    def __contains__(self, key: object) -> bool:
        return key in self._number_of

    def check_invariants(self) -> None:
        """Raise InvariantError if parts and keys contradict each other, or there are too many keys or ghosts."""
        if len(self) > self.capacity or len(self._ghosts) > GHOSTS_PER_KEY * self.capacity:
            raise InvariantError(f"prefix: {len(self)} keys, {len(self._ghosts)} ghosts, capacity {self.capacity}")
        if not self._ghosts.isdisjoint(self._number_of):
            raise InvariantError("prefix: a key is held and a ghost")
        self._ghosts.check_invariants()
        self._chains.check_invariants()
        self._leaves.check_invariants({self._chains.parts[number] for number in self._number_of.every_value()})
