"""The uses of a slotted tier's blocks by each live request, by the same rules as in the primary tier."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kvtier.clock import Clock
from kvtier.hints import read_hint
from kvtier.keys import OffloadKey
from kvtier.primary.retention import Retention
from kvtier.primary.table import BlockTable, Placement
from kvtier.primary.uses import Arrivals, RequestUses
from kvtier.types import ReqContext

_UNKNOWN = RequestUses(0.0)
"""Of a request that was not announced, or has ended: it says nothing of its blocks."""


class TierUses:
    """Applies three rules to each request between `begin` and `end`; they do not hold for unannounced requests.

    A request's stores do not evict blocks that it has used. A block counts at most one use per request. At the end of a
    request its blocks are ordered by recency, tail first, so that evictions shorten prefixes from their ends. A
    request's hint applies here, too.
    """

    def __init__(self, clock: Clock, retention: Retention) -> None:
        self._times, self._retention = Arrivals(clock), retention
        self._by_request: dict[str, RequestUses] = {}

    def begin(self, req_context: ReqContext) -> None:
        """Learn of a new request."""
        hint = read_hint(req_context.kv_transfer_params).hint
        self._by_request.setdefault(req_context.req_id, RequestUses(self._times.next(), req_context.req_id, hint))

    def _serve(self, table: BlockTable, req_context: ReqContext) -> RequestUses | None:
        uses = self._by_request.get(req_context.req_id)
        self._retention.serve(table, _UNKNOWN if uses is None else uses)
        return uses

    def touch(self, table: BlockTable, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Count a use of those of `keys`, in prefix order, that `table` holds and that count for this request."""
        counted = list(dict.fromkeys(keys))
        uses = self._serve(table, req_context)
        if uses is not None:
            uses.note_offer(counted)
            counted, _ = uses.count(counted, table.slot_of)
        if counted:
            table.touch(counted, self._came(uses))

    def load(self, table: BlockTable, keys: Sequence[OffloadKey], req_context: ReqContext) -> None:
        """Count the use of blocks that are loaded for a request. A later touch decides their order of recency."""
        counted = list(dict.fromkeys(keys))
        uses = self._serve(table, req_context)
        if uses is not None:
            own = uses.own
            counted = [key for key in counted if key not in own]
            uses.note_stored(counted)
        if counted:
            table.touch(counted, self._came(uses))

    def plan_store(self, table: BlockTable, keys: Sequence[OffloadKey], req_context: ReqContext) -> Placement:
        """Choose places for a request's blocks; see `BlockTable.plan`."""
        uses = self._serve(table, req_context)
        if len(keys) <= table.num_free:
            return table.plan(keys)
        table.touch((), self._came(uses))  # tells the policy the time of the request for which it chooses victims
        return table.plan(keys, () if uses is None else (uses.own,))

    def store(
        self, table: BlockTable, offered: Sequence[OffloadKey], placement: Placement, req_context: ReqContext
    ) -> list[int]:
        """Apply the plan for a request's blocks, which were `offered` in prefix order; return the slots."""
        uses = self._by_request.get(req_context.req_id)
        if uses is not None:
            uses.note_offer(list(offered))
            uses.note_stored(placement.keys)
        return list(table.apply(placement, self._came(uses)).values())

    def _came(self, uses: RequestUses | None) -> float:
        return self._times.next() if uses is None else uses.came

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
