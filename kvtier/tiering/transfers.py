"""Copies between device and arena: which slots each request has under one, and how each ends."""

from __future__ import annotations

from collections.abc import Callable, Collection

from kvtier.errors import BlockNotReadyError
from kvtier.events import Observer, UnexpectedCall
from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable, Placement
from kvtier.tiering.requests import RequestState
from kvtier.tiering.stale import StaleTransfers


class DeviceTransfers:
    """Begins and ends loads and stores of requests; a completion that nothing waits for is counted.

    Completions name keys, not slots; the slot a request was given is remembered with it, so that a completion
    from before a reset ends the old copy and not a newer one of the same key.
    """

    def __init__(self, table: BlockTable, observer: Observer, finished: Callable[[], int]) -> None:
        """Args: finished: as for `StaleTransfers`."""
        self._table = table
        self._observer = observer
        self.stale = StaleTransfers(table, finished)

    def begin_load(self, state: RequestState, keys: list[OffloadKey]) -> tuple[list[int], list[OffloadKey]]:
        """Pin the slots of `keys`, once each though a key comes twice.

        Returns:
            The slots, one per key given, and the keys, each once.

        Raises:
            BlockNotReadyError: a key is not ready; nothing was pinned.
        """
        slots = self._table.ready_slots(keys)
        if slots is None:
            missing = sum(not self._table.is_ready(key) for key in keys)
            raise BlockNotReadyError(f"{missing} of {len(keys)} blocks are not ready in the primary tier")
        loading = state.loading
        if not loading:
            loading.update(zip(keys, slots, strict=True))
            self._table.pin(loading.values())
            return slots, keys if len(loading) == len(keys) else list(loading)
        once = dict(zip(keys, slots, strict=True))
        for key, slot in once.items():
            self._table.pin((slot,))
            if key in loading:
                state.loading_again.append((key, slot))
            else:
                loading[key] = slot
        return slots, list(once)

    def end_load(self, req_id: str, state: RequestState | None, keys: Collection[OffloadKey]) -> None:
        """Unpin what the request was loading under `keys`."""
        left = keys
        if self.stale.pending:
            self.stale.sweep()
            left = self.stale.complete_loads(req_id, keys)
        done, slots = _take(state.loading, left) if state is not None else ([], [])
        self._count_unexpected("complete_load", left, done)
        self._table.unpin(slots)
        if state is not None and state.loading_again:
            again, state.loading_again = state.loading_again, []
            for key, slot in again:
                if key in state.loading:
                    state.loading_again.append((key, slot))
                else:
                    state.loading[key] = slot

    def begin_store(self, state: RequestState, placement: Placement) -> list[int]:
        """Apply the placement for `state` and return the slots to fill."""
        placed = self._table.apply(placement)
        if state.storing:
            state.storing.update(placed)
        else:
            state.storing = placed
        return list(placed.values())

    def end_store(
        self, req_id: str, state: RequestState | None, keys: Collection[OffloadKey], success: bool
    ) -> list[OffloadKey]:
        """End the request's stores of `keys`; return those that are ready now, in the order they were prepared."""
        left = keys
        if self.stale.pending:
            self.stale.sweep()
            left = self.stale.complete_stores(req_id, keys)
        done, slots = _take(state.storing, left) if state is not None else ([], [])
        self._count_unexpected("complete_store", left, done)
        if success:
            self._table.publish(slots)
            return done
        self._table.discard(done, slots)
        return []

    def _count_unexpected(self, what: str, asked: Collection[OffloadKey], done: list[OffloadKey]) -> None:
        if len(done) < len(asked) and (times := len(set(asked)) - len(done)):
            self._observer.on_event(UnexpectedCall(what, times))


def _take(pending: dict[OffloadKey, int], keys: Collection[OffloadKey]) -> tuple[list[OffloadKey], list[int]]:
    """Remove `keys` from what is pending; return those that were, and their slots, in the order of `pending`."""
    done = list(pending)
    if keys == done or pending.keys() == keys:  # all of them, as a list or as a set
        slots = list(pending.values())
        pending.clear()
        return done, slots
    wanted = keys if isinstance(keys, set | frozenset) else set(keys)
    done = [key for key in pending if key in wanted]
    return done, [pending.pop(key) for key in done]
