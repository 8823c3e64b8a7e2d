"""Reports uses of blocks to every part of the cache that counts them."""

from __future__ import annotations

from kvtier.keys import OffloadKey
from kvtier.primary.retention import Retention
from kvtier.primary.table import BlockTable
from kvtier.primary.uses import RequestUses
from kvtier.tiering.cascades import Cascades
from kvtier.tiering.tiers import SecondaryTiers
from kvtier.types import ReqContext


class Usage:
    """Reports uses to the primary's policy, to the secondary tiers and to `second_touch` admission."""

    def __init__(self, table: BlockTable, tiers: SecondaryTiers, cascades: Cascades, retention: Retention) -> None:
        """Args: table, retention: of the primary tier."""
        self._table, self._tiers, self._cascades, self._retention = table, tiers, cascades, retention

    def note(self, keys: list[OffloadKey], req_context: ReqContext, uses: RequestUses, all_held: bool = False) -> None:
        """Count one use of each of `keys`, which are in prefix order without repetition.

        Args:
            uses: of the request.
            all_held: whether the primary tier is known to hold all of `keys`.
        """
        counted, fresh = uses.count(keys)
        if counted:
            self._retention.serve(self._table, uses)
            if not (self._table.touch(counted, uses.came) or all_held):
                uses.note_missing(self._table.slot_of.missing(counted))
        if fresh:
            self._tiers.touch(fresh, req_context)
        if self._cascades.count_uses:
            for guard, admitted in self._cascades.on_use(uses.admissible(keys, counted, self._table)):
                self._cascades.start(guard, admitted, req_context)
