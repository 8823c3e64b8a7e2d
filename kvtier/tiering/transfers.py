"""Copies between device and arena: which slots each request has under one, and how each ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kvtier.errors import BlockNotReadyError
from kvtier.events import Observer, UnexpectedCall
from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable, Placement, SlotState
from kvtier.tiering.requests import RequestState
from kvtier.tiering.stale import StaleTransfers

_READY = SlotState.READY


class DeviceTransfers:
    """Begins and ends loads and stores of requests; a completion that nothing waits for is counted.

    Completions name keys, not slots; the slot a request was given is remembered with it, so that a completion
    from before a reset ends the old copy and not a newer one of the same key.
    """

    def __init__(self, table: BlockTable, observer: Observer) -> None:
        self._table = table
        self._observer = observer
        self.stale = StaleTransfers(table)

    def begin_load(self, state: RequestState, keys: Sequence[OffloadKey]) -> list[int]:
        """Pin the slots of `keys` and return them.

        Raises:
            BlockNotReadyError: a key is not ready; nothing was pinned.
        """
        get, states = self._table.slot_of.get, self._table.states
        slots = [get(key, -1) for key in keys]
        missing = sum([slot < 0 or states[slot] is not _READY for slot in slots])
        if missing:
            raise BlockNotReadyError(f"{missing} of {len(slots)} blocks are not ready in the primary tier")
        self._table.pin(slots)
        loading = state.loading
        if not loading and len(set(keys)) == len(keys):
            loading.update(zip(keys, slots, strict=True))
            return slots
        for key, slot in zip(keys, slots, strict=True):
            if key in loading:
                state.loading_again.append((key, slot))
            else:
                loading[key] = slot
        return slots

    def end_load(self, req_id: str, state: RequestState | None, keys: Collection[OffloadKey]) -> None:
        """Unpin what the request was loading under `keys`."""
        left = self.stale.complete_loads(req_id, keys) if len(self.stale) else keys
        loading = state.loading if state is not None else {}
        slots = [loading.pop(key, -1) for key in left]
        if state is not None and state.loading_again:
            again, state.loading_again = state.loading_again, []
            for key, slot in again:
                if loading.setdefault(key, slot) != slot or key not in left:
                    state.loading_again.append((key, slot))
        if -1 in slots:
            self._observer.on_event(UnexpectedCall("complete_load", slots.count(-1)))
            slots = [slot for slot in slots if slot >= 0]
        self._table.unpin(slots)

    def begin_store(self, state: RequestState, placement: Placement) -> list[int]:
        """Apply the placement for `state` and return the slots to fill."""
        slots = self._table.apply(placement)
        state.storing.update(zip(placement.keys, slots, strict=True))
        return slots

    def end_store(
        self, req_id: str, state: RequestState | None, keys: Collection[OffloadKey], success: bool
    ) -> list[OffloadKey]:
        """End the request's stores of `keys`; return those that are ready now, in the order they were prepared."""
        left = self.stale.complete_stores(req_id, keys) if len(self.stale) else keys
        storing = state.storing if state is not None else {}
        wanted = set(left)
        done = [key for key in storing if key in wanted]
        slots = [storing.pop(key) for key in done]
        if len(done) < len(left):
            self._observer.on_event(UnexpectedCall("complete_store", len(left) - len(done)))
        if success:
            self._table.publish(slots)
            return done
        self._table.discard(done, slots)
        return []
