"""The blocks of a tier that each live request uses: the primary tier's rules for a request, in a tier below it."""

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
    """Three rules for every request between `begin` and `end`; a request that was not announced just uses blocks.

    What it has used is no victim of what it stores. A block counts one use for it. At its end all of its blocks take
    their places tail-first, so that the next evictions shorten chains and do not cut them. Its hint counts here, too.
    """

    def __init__(self, clock: Clock, retention: Retention) -> None:
        self._times, self._retention = Arrivals(clock), retention
        self._by_request: dict[str, RequestUses] = {}

    def begin(self, req_context: ReqContext) -> None:
        """A request comes."""
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
        """Count the use of blocks that are read for a request. Their place among others follows from a later touch."""
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
        table.touch((), self._came(uses))  # says whose blocks the victims are to make room for
        return table.plan(keys, () if uses is None else (uses.own,))

    def store(
        self, table: BlockTable, offered: Sequence[OffloadKey], placement: Placement, req_context: ReqContext
    ) -> list[int]:
        """Put a request's blocks, those of `offered` that were not here, in the places planned; return the slots."""
        uses = self._by_request.get(req_context.req_id)
        if uses is not None:
            uses.note_offer(list(offered))
            uses.note_stored(placement.keys)
        return list(table.apply(placement, self._came(uses)).values())

    def _came(self, uses: RequestUses | None) -> float:
        return self._times.next() if uses is None else uses.came

    def end(self, table: BlockTable | None, req_context: ReqContext) -> None:
        """A request is over: settle its blocks by their position in the prompt, as far as that is known."""
        uses = self._by_request.pop(req_context.req_id, None)
        if uses is not None and table is not None:
            self._retention.serve(table, uses)
            uses.note_offer(list(uses.own))  # blocks that were read and never touched
            table.settle(uses.in_order(req_context))

    def clear(self) -> None:
        """The tier has lost its blocks: what requests used of them does not count any more."""
        for uses in self._by_request.values():
            uses.clear()
