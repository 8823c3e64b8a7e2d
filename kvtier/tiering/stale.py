"""Device copies that a reset left running: their slots stay in quarantine until the copy has ended.

The end is learnt from a late completion or from what workers publish, whichever comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable
from kvtier.tiering.requests import RequestState


@dataclass(slots=True, eq=False)
class _Stale:
    req_id: str
    sequence: int
    slots: dict[OffloadKey, list[int]]


class StaleTransfers:
    """Slots under copies from before a reset, by request.

    Attributes:
        pending: whether any such copy may still be running.
    """

    def __init__(self, table: BlockTable, finished: Callable[[], int]) -> None:
        """Args: finished: returns the highest number such that workers have ended all transfers up to it."""
        self._table, self._finished = table, finished
        self._stores: list[_Stale] = []
        self._loads: list[_Stale] = []
        self.pending = False

    def take_over(self, state: RequestState, sequence: int) -> None:
        """Take the request's unfinished copies, all of transfers numbered up to `sequence`."""
        req_id = state.context.req_id
        if state.storing:
            self._stores.append(_Stale(req_id, sequence, {key: [slot] for key, slot in state.storing.items()}))
        loads: dict[OffloadKey, list[int]] = {}
        for key, slot in [*state.loading.items(), *state.loading_again]:
            loads.setdefault(key, []).append(slot)
        if loads:
            self._loads.append(_Stale(req_id, sequence, loads))
        self.pending = bool(self._stores or self._loads)
        state.storing.clear()
        state.loading.clear()
        state.loading_again.clear()

    def slots(self) -> list[int]:
        """Return the slots under such copies, once for each copy."""
        entries = [*self._stores, *self._loads]
        return [slot for entry in entries for slots in entry.slots.values() for slot in slots]

    def complete_stores(self, req_id: str, keys: Iterable[OffloadKey]) -> list[OffloadKey]:
        """Release what these late completions end; return the keys that were not among it."""
        return self._complete(self._stores, req_id, keys)

    def complete_loads(self, req_id: str, keys: Iterable[OffloadKey]) -> list[OffloadKey]:
        """Release what these late completions end; return the keys that were not among it."""
        return self._complete(self._loads, req_id, keys)

    def _complete(self, stale: list[_Stale], req_id: str, keys: Iterable[OffloadKey]) -> list[OffloadKey]:
        left: list[OffloadKey] = []
        for key in keys:
            entry = next((entry for entry in stale if entry.req_id == req_id and key in entry.slots), None)
            if entry is None:
                left.append(key)
                continue
            slots = entry.slots[key]
            self._table.unpin((slots.pop(),))
            if not slots:
                del entry.slots[key]
        stale[:] = [entry for entry in stale if entry.slots]
        self.pending = bool(self._stores or self._loads)
        return left

    def sweep(self) -> None:
        """Release what workers have ended, lest it take the completion of a newer copy."""
        finished = self._finished()
        for stale in (self._stores, self._loads):
            for entry in stale:
                if entry.sequence <= finished:
                    for slots in entry.slots.values():
                        self._table.unpin(slots)
            stale[:] = [entry for entry in stale if entry.sequence > finished]
        self.pending = bool(self._stores or self._loads)
