"""Tracks copies between device and arena: the slots that each request is copying, and how each copy ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from kvtier.errors import BlockNotReadyError
from kvtier.events import BlocksLoaded, Observer, UnexpectedCall
from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable, Placement
from kvtier.tiering.requests import RequestState
from kvtier.tiering.running_copies import Copies, RunningCopies


@dataclass(slots=True, eq=False)
class _Stale:
    req_id: str | None  # None if the engine completes them no more
    sequence: int
    running: dict[OffloadKey, RunningCopies]


class StaleTransfers:
    """Copies that were running at a reset, by request. Their slots stay in quarantine until the copy has ended.

    A late completion, the number that workers publish, or a call of `end` shows that a copy has ended, whichever comes
    first.

    Attributes:
        pending: whether any such copy may still be running.
    """

    def __init__(self, table: BlockTable, finished: Callable[[], int]) -> None:
        """Args: finished: returns the number up to which workers have ended every transfer."""
        self._table, self._finished = table, finished
        self._stores: list[_Stale] = []
        self._loads: list[_Stale] = []
        self.pending = False

    def take_over(self, state: RequestState, sequence: int, late_completions: bool) -> None:
        """Take the request's unfinished copies. Their transfers have numbers up to `sequence`.

        Args:
            late_completions: whether the engine still completes these copies.
        """
        req_id = state.context.req_id if late_completions else None
        if state.copies.storing:
            stores = {key: RunningCopies([slot], 1) for key, slot in state.copies.storing.entries()}
            self._stores.append(_Stale(req_id, sequence, stores))
        if state.copies.loading:
            loads = {key: RunningCopies([slot], 1) for key, slot in state.copies.loading.items()}
            self._loads.append(_Stale(req_id, sequence, loads | state.copies.loading_again))
        self.pending = bool(self._stores or self._loads)
        state.copies.storing.clear()
        state.copies.loading.clear()
        state.copies.loading_again.clear()
        state.copies.arriving.clear()

    def slots(self) -> list[int]:
        """Return the slots under such copies, one entry per copy."""
        entries = [*self._stores, *self._loads]
        return [slot for entry in entries for running in entry.running.values() for slot in running.slots]

    def complete_stores(self, req_id: str, keys: Iterable[OffloadKey]) -> list[OffloadKey]:
        """Free the slots of the stores that these late completions end. Return the keys without such stores."""
        return self._complete(self._stores, req_id, keys)

    def give_back_loads(self, req_id: str, copies: Copies, keys: Iterable[OffloadKey]) -> None:
        """Let the request's newer loads of `keys` wait for these ones, too: a completion may be that of either."""
        for entry in self._loads:
            if entry.req_id == req_id:
                for key in copies.loading.keys() & entry.running.keys() & set(keys):
                    newer = copies.loading_again.setdefault(key, RunningCopies([copies.loading[key]], 1))
                    older = entry.running.pop(key)
                    newer.slots += older.slots
                    newer.num_running += older.num_running

    def complete_loads(self, req_id: str, keys: Iterable[OffloadKey]) -> list[OffloadKey]:
        """Free the slots of the loads that these late completions end. Return the keys without such loads."""
        return self._complete(self._loads, req_id, keys)

    def _complete(self, stale: list[_Stale], req_id: str, keys: Iterable[OffloadKey]) -> list[OffloadKey]:
        left: list[OffloadKey] = []
        for key in keys:
            entry = next((entry for entry in stale if entry.req_id == req_id and key in entry.running), None)
            if entry is None:
                left.append(key)
            elif entry.running[key].end_one():
                self._table.unpin(entry.running.pop(key).slots)
        stale[:] = [entry for entry in stale if entry.running]
        self.pending = bool(self._stores or self._loads)
        return left

    def end(self) -> None:
        """Free the slots of all such copies: the engine knows that they have ended."""
        self._table.unpin(self.slots())
        self._stores.clear()
        self._loads.clear()
        self.pending = False

    def sweep(self) -> None:
        """Free the slots of copies that workers report as finished.

        Without this, a later completion of the same key would be credited to the old copy.
        """
        finished = self._finished()
        for stale in (self._stores, self._loads):
            for entry in stale:
                if entry.sequence <= finished:
                    for running in entry.running.values():
                        self._table.unpin(running.slots)
            stale[:] = [entry for entry in stale if entry.sequence > finished]
        self.pending = bool(self._stores or self._loads)


class DeviceTransfers:
    """Begins and ends the copies of requests. A completion without a running copy is reported as an event.

    Completions name keys, not slots. Each request remembers its slots, so that a completion from before a reset ends
    the old store and not a newer one of the same key. While a request loads a key several times, before and after a
    reset, too, nobody knows which of the loads a completion ends. So all their slots are held until the last one.
    """

    def __init__(self, table: BlockTable, observer: Observer, finished: Callable[[], int]) -> None:
        """Args: finished: as for `StaleTransfers`."""
        self._table = table
        self._observer = observer
        self.stale = StaleTransfers(table, finished)

    def begin_load(self, state: RequestState, keys: list[OffloadKey]) -> tuple[list[int], list[OffloadKey]]:
        """Pin the slots of `keys`, once per key even if a key comes twice.

        Returns:
            One slot per given key, and the keys without repetition.

        Raises:
            BlockNotReadyError: a key is not ready; nothing was pinned.
        """
        slots = self._table.ready_slots(keys)
        if slots is None:
            missing = sum(not self._table.is_ready(key) for key in keys)
            raise BlockNotReadyError(f"{missing} of {len(keys)} blocks are not ready in the primary tier")
        loading = state.copies.loading
        if not loading:
            loading.update(zip(keys, slots, strict=True))
            self._table.pin(loading.values())
            return slots, keys if len(loading) == len(keys) else list(loading)
        once = dict(zip(keys, slots, strict=True))
        self._table.pin(once.values())
        again = state.copies.loading_again
        for key, slot in once.items():
            if key not in loading:
                loading[key] = slot
            elif key not in again:
                again[key] = RunningCopies([loading[key], slot], 2)
            else:
                again[key].add(slot)
        return slots, list(once)

    def begin_leased_load(self, state: RequestState, slots: dict[OffloadKey, int]) -> None:
        """Begin the load of leased blocks by a request that loads nothing else. The lease's pins become the load's.

        Args:
            slots: by key.
        """
        state.copies.loading = slots

    def announce(self, state: RequestState, loaded: BlocksLoaded) -> None:
        """Keep the event of a load that has begun until all loads of the request have ended, or one has failed."""
        state.copies.arriving.append(loaded)

    def end_load(
        self, req_id: str, state: RequestState | None, keys: Collection[OffloadKey], success: bool
    ) -> list[OffloadKey]:
        """Unpin the slots that the request was loading for `keys`.

        Returns:
            The blocks that the table has forgotten, none if the copy succeeded.
        """
        left = keys
        if self.stale.pending:
            self.stale.sweep()
            if state is not None:
                self.stale.give_back_loads(req_id, state.copies, keys)
            left = self.stale.complete_loads(req_id, keys)
        dropped: list[OffloadKey] = []
        if state is not None and state.copies.loading_again:
            left, dropped = self._end_repeated_loads(state.copies.loading_again, left, success)
        done: dict[OffloadKey, int] = {}
        if state is not None:
            done, state.copies.loading = _split(state.copies.loading, left)
        if success:
            self._count_unexpected("complete_load", left, done)
            self._table.unpin(done.values())
        else:
            dropped += self._table.discard(list(done), list(done.values()))
        if state is not None and state.copies.arriving:
            self._report_arrived(state.copies, success)
        return dropped

    def _report_arrived(self, copies: Copies, success: bool) -> None:
        if not success:
            copies.arriving.clear()
        elif not copies.loading:
            arrived, copies.arriving = copies.arriving, []
            for event in arrived:
                self._observer.on_event(event)

    def _end_repeated_loads(
        self, running: dict[OffloadKey, RunningCopies], keys: Iterable[OffloadKey], success: bool
    ) -> tuple[list[OffloadKey], list[OffloadKey]]:
        """End one of the loads of each of `keys`; if it failed, forget the block, whichever slot it was loaded from.

        Returns:
            The keys that the request loads no more after this completion, and those that the table has forgotten.
        """
        last, dropped = [], []
        for key in dict.fromkeys(keys):
            if key not in running:
                last.append(key)
                continue
            if not success and self._table.slot_of.get(key) in running[key].slots:
                dropped += self._table.remove((key,))
            if running[key].end_one():
                self._table.unpin(running.pop(key).slots[1:])  # the first slot is among the request's loads
                last.append(key)
        return last, dropped

    def begin_store(self, state: RequestState, placement: Placement) -> list[int]:
        """Apply the placement for `state` and return the slots to fill."""
        slots = self._table.apply(placement, state.uses.came)
        state.copies.storing.begin(placement.keys.copy(), slots)  # the engine gets these keys, too
        return slots

    def end_store(
        self, req_id: str, state: RequestState | None, keys: Collection[OffloadKey], success: bool
    ) -> list[OffloadKey]:
        """End the request's stores of `keys`. Return the keys that are ready now, in the order of their preparation."""
        left = keys
        if self.stale.pending:
            self.stale.sweep()
            left = self.stale.complete_stores(req_id, keys)
        done, slots = state.copies.storing.end(left) if state is not None else ([], [])
        self._count_unexpected("complete_store", left, done)
        if success:
            self._table.publish(slots)
            return done
        self._table.discard(done, slots)
        return []

    def _count_unexpected(self, what: str, asked: Collection[OffloadKey], done: Collection[OffloadKey]) -> None:
        if len(done) < len(asked) and (times := len(set(asked)) - len(done)):
            self._observer.on_event(UnexpectedCall(what, times))


def _split(
    pending: dict[OffloadKey, int], keys: Collection[OffloadKey]
) -> tuple[dict[OffloadKey, int], dict[OffloadKey, int]]:
    """Return those of `pending` that are among `keys`, and the others, both in the order of `pending`."""
    wanted = keys if isinstance(keys, set | frozenset) else None
    # Engines mostly complete a transfer as a whole. To compare with `pending.keys()` would take three times as long.
    if len(keys) == len(pending) and (keys == list(pending) if wanted is None else wanted.issuperset(pending)):
        return pending, {}
    wanted = wanted or set(keys)
    others = {key: slot for key, slot in pending.items() if key not in wanted}
    if len(others) == len(pending):
        return {}, pending
    return {key: slot for key, slot in pending.items() if key in wanted}, others
