"""Which blocks of a tier each request has used. A block counts once per request, however often the engine reports it.

Engines differ. vLLM up to 0.30 touches all blocks of a request at every lookup, at every step of a wait and after every
store; later versions touch nothing. If each touch counted, a long wait would look like popularity. And a trace, where
each request asks once, would predict other hits than the engine has.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence, Set
from itertools import chain

from kvtier.clock import Clock
from kvtier.hints import NO_HINT, Hint, read_hint
from kvtier.keys import OffloadKey
from kvtier.primary.retention import Retention
from kvtier.primary.table import BlockTable, Placement
from kvtier.types import ReqContext

Keys = list[OffloadKey]


class Arrivals:
    """Gives every request a time that no other has: now or, if need be, the next float after the previous time."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._last = clock, -math.inf

    def next(self) -> float:
        """Return the time for a request that comes now, in seconds of the clock."""
        now = self._clock()
        if now <= self._last:
            now = math.nextafter(self._last, math.inf)
        self._last = now
        return now


class RequestUses:
    """The blocks that a request has used, whether the primary tier held them then, and which were not ready yet.

    Most requests load once and store once, and nobody asks for their blocks again. So a use is first only appended to
    a list, and `_known` moves the lists into a dictionary when they are needed.

    Attributes:
        came: when the request came, in seconds; policies tell requests apart by it.
        request: name of the request.
        hint: of the request.
    """

    __slots__ = ("_aside", "_early", "_held", "_named", "_were_offered", "came", "hint", "request")

    def __init__(self, came: float, request: str = "", hint: Hint = NO_HINT) -> None:
        self.came, self.request, self.hint = came, request, hint
        self._held: dict[OffloadKey, bool] = {}
        self._aside: list[Keys] = []
        self._early: set[OffloadKey] = set()
        self._named: list[Keys] = []
        self._were_offered = False
        """Whether some of `_named` were offered. Only such a list may have a key twice."""

    def count(self, keys: Keys) -> tuple[Keys, Keys]:
        """Record a use of `keys`, no key twice. Unless `note_missing` follows, the primary tier holds all of them.

        Returns:
            Two lists, both in the order of `keys`. The first: keys whose use counts in the primary tier, that is, all
            but those that it held at an earlier use. The second: keys that the request uses for the first time, whose
            use counts in the other tiers.
        """
        fresh = keys = keys.copy()  # callers may change their list, and `_named` and `_aside` keep this one
        if self._held or self._aside:
            known = self._known()
            if not known.keys().isdisjoint(keys):
                fresh = [key for key in keys if key not in known]
                keys = [key for key in keys if not known.get(key, False)]
        if fresh:
            self._named.append(fresh)
        if keys:
            self._aside.append(keys)
        return keys, fresh

    def note_missing(self, keys: Keys) -> None:
        """Record that the primary tier did not hold these of the keys whose use `count` has just recorded."""
        if keys:
            self._known().update(dict.fromkeys(keys, False))

    def admissible(self, named: Keys, counted: Keys, table: BlockTable) -> Keys:
        """Return those of `named` whose use may admit them to another tier now. A block must be readable for that.

        A block whose use counted while it was not yet readable is returned at a later use, once it is.

        Args:
            counted: the first list that `count` returned for `named`.
            table: of the primary tier.
        """
        early, is_ready = self._early, table.is_ready
        due = [key for key in named if key in early and is_ready(key)] if early else []
        for key in due:
            early.remove(key)
        early.update(key for key in counted if key in table and not is_ready(key))
        return [*due, *filter(is_ready, counted)]

    def note_stored(self, keys: Keys) -> None:
        """Record that the request stores these blocks, which counts as its use of them in every tier."""
        if self._early:
            self._early.difference_update(keys)
        if keys:
            self._aside.append(keys.copy())

    def note_offer(self, keys: Keys) -> None:
        """Record the blocks that the request offers for storing, in prefix order, whether held or not."""
        self._named.append(keys.copy())
        self._were_offered = True

    @property
    def own(self) -> Set[OffloadKey]:
        """Every block that the request has used or stored. What it stores later must not evict them."""
        return self._known().keys()

    def in_order(self, context: ReqContext) -> Keys:
        """Return the request's blocks up to the last one that was named, in the order of the prompt.

        Blocks of all KV groups are sorted together by the token where they end. Blocks that the engine found on its
        device are included: nobody named them, but the request used them, and the blocks behind them are worth nothing
        without them. If the engine does not give the position of every named block, only named blocks are returned, in
        the order of the calls.
        """
        named = self._named
        is_one_list = len(named) == 1 and not self._were_offered
        keys = named[0] if is_one_list else list(dict.fromkeys(chain.from_iterable(named)))
        positions = context.offload_key_positions
        if not keys or not all(map(positions.__contains__, keys)):
            return keys
        ends = dict(zip(keys, map(positions.__getitem__, keys), strict=True))
        last = max(ends.values())
        ends.update((key, end) for key, end in positions.items() if end <= last)
        return sorted(ends, key=ends.__getitem__)

    def _known(self) -> dict[OffloadKey, bool]:
        for keys in self._aside:
            self._held.update(dict.fromkeys(keys, True))
        self._aside.clear()
        return self._held

    def clear(self) -> None:
        """Forget all uses: the cache was reset."""
        self._held.clear()
        self._aside.clear()
        self._early.clear()
        self._named.clear()
        self._were_offered = False


class TierUses:
    """The uses of a secondary tier's blocks by each live request, by the same rules as in the primary tier.

    A request's stores do not evict blocks that it has used. A block counts at most one use per request. At the end of a
    request its blocks are ordered by recency, tail first, so that evictions shorten prefixes from their ends. A
    request's hint applies here, too. An unannounced request has used nothing before, and its end orders nothing.
    """

    def __init__(self, clock: Clock, retention: Retention) -> None:
        self._times, self._retention = Arrivals(clock), retention
        self._by_request: dict[str, RequestUses] = {}

    def begin(self, req_context: ReqContext) -> None:
        """Learn of a new request."""
        hint = read_hint(req_context.kv_transfer_params).hint
        self._by_request.setdefault(req_context.req_id, RequestUses(self._times.next(), req_context.req_id, hint))

    def _of(self, req_context: ReqContext) -> RequestUses:
        return self._by_request.get(req_context.req_id) or RequestUses(self._times.next())

    def touch(self, table: BlockTable, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Count a use of those of `keys`, in prefix order, that `table` holds and that count for this request."""
        named, uses = list(dict.fromkeys(keys)), self._of(req_context)
        self._retention.serve(table, uses)
        uses.note_offer(named)
        counted, _ = uses.count(named)
        if counted and not table.touch(counted, uses.came):
            uses.note_missing(table.slot_of.missing(counted))

    def load(self, table: BlockTable, keys: Sequence[OffloadKey], req_context: ReqContext) -> None:
        """Count the use of blocks that are loaded for a request. A later touch decides their order of recency."""
        uses = self._of(req_context)
        self._retention.serve(table, uses)
        own = uses.own
        counted = [key for key in dict.fromkeys(keys) if key not in own]
        uses.note_stored(counted)
        if counted:
            table.touch(counted, uses.came)

    def plan_store(self, table: BlockTable, keys: Sequence[OffloadKey], req_context: ReqContext) -> Placement:
        """Choose places for a request's blocks; see `BlockTable.plan`."""
        uses = self._of(req_context)
        self._retention.serve(table, uses)
        if len(keys) <= table.num_free:
            return table.plan(keys)
        table.touch((), uses.came)  # tells the policy the time of the request for which it chooses victims
        return table.plan(keys, uses.own)

    def store(
        self, table: BlockTable, offered: Sequence[OffloadKey], placement: Placement, req_context: ReqContext
    ) -> list[int]:
        """Apply the plan for a request's blocks, which were `offered` in prefix order; return the slots."""
        uses = self._of(req_context)
        uses.note_offer(list(offered))
        uses.note_stored(placement.keys)
        return table.apply(placement, uses.came)

    def end(self, table: BlockTable | None, req_context: ReqContext) -> None:
        """Learn of a request's end, and order its blocks by their positions in the prompt, as far as known."""
        uses = self._by_request.pop(req_context.req_id, None)
        if uses is not None and table is not None:
            self._retention.serve(table, uses)
            uses.note_offer(list(uses.own))  # includes blocks that were loaded but never touched
            table.settle(uses.in_order(req_context))

    def clear(self) -> None:
        """Forget all uses, since the tier has lost its blocks."""
        for uses in self._by_request.values():
            uses.clear()
