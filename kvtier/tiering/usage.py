"""Passes uses of blocks on to all whom they concern."""

from __future__ import annotations

from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable
from kvtier.tiering.cascades import Cascades
from kvtier.tiering.requests import RequestState
from kvtier.tiering.tiers import SecondaryTiers
from kvtier.tiering.uses import RequestUses
from kvtier.types import ReqContext


class Usage:
    """Tells the primary's policy and the tiers of uses, and cascades what waited for one."""

    def __init__(self, table: BlockTable, tiers: SecondaryTiers, cascades: Cascades) -> None:
        """Args: table: of the primary tier."""
        self._table, self._tiers, self._cascades = table, tiers, cascades

    def note(
        self, keys: list[OffloadKey], req_context: ReqContext, state: RequestState | None, all_held: bool = False
    ) -> None:
        """Count one use of `keys`, in prefix order, each of them once.

        Args:
            state: of the request; None if nothing is known of it: then every use counts.
            all_held: the primary tier holds all of `keys`.
        """
        uses = state.uses if state is not None else RequestUses()
        counted, fresh = uses.count(keys, None if all_held else self._table.slot_of)
        if counted:
            self._table.touch(counted)
        if fresh:
            self._tiers.touch(fresh, req_context)
        if self._cascades.count_uses:
            self._cascades.on_use(uses.admissible(keys, counted, self._table), req_context)
