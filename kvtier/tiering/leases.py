"""Leases: slots that are pinned for requests between their plan and their load."""

from __future__ import annotations

from collections.abc import Container, Iterable

from kvtier.errors import InvariantError
from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable
from kvtier.tiering.requests import RequestState


class Leases:
    """Pins slots and counts them against the budget of promotions. Several requests may hold the same slot."""

    def __init__(self, table: BlockTable, budget: int, timeout: float) -> None:
        """Args: budget: most slots that leases and flights may hold together; timeout: of a lease, in seconds."""
        self._table, self._timeout = table, timeout
        self._holders: dict[int, int] = {}
        self.budget = budget

    @property
    def held(self) -> Container[int]:
        """The slots that requests hold."""
        return self._holders.keys()

    def room(self, num_flights: int) -> int:
        """Return how many slots the budget still allows."""
        return self.budget - len(self._holders) - num_flights

    def hold(self, state: RequestState, keys: Iterable[OffloadKey]) -> None:
        """Pin the slots of `keys`, which are ready, for `state`."""
        lease, holders, slot_of = state.lease.slots, self._holders, self._table.slot_of
        taken = {key: slot_of[key] for key in keys if key not in lease}
        lease.update(taken)
        for slot in taken.values():
            holders[slot] = holders.get(slot, 0) + 1
        self._table.pin(taken.values())

    def start_timeout(self, state: RequestState, now: float) -> None:
        """Let the lease end after the timeout unless the request loads before. The request waits for nothing more."""
        state.lease.expires = now + self._timeout

    def release(self, state: RequestState) -> None:
        """Unpin all that `state` holds."""
        self._table.unpin(self._take(state).values())

    def hand_over(self, state: RequestState, keys: list[OffloadKey]) -> tuple[list[int], dict[OffloadKey, int]] | None:
        """End the lease of `keys`, whose slots stay pinned once; None if the request holds others, or has lost some.

        Returns:
            The slots, in the order of `keys`, and by key.
        """
        slots = state.lease.slots
        if self._table.num_quarantined or len(slots) != len(keys):  # a leased block that was removed is in quarantine
            return None
        if list(slots) == keys:  # blocks mostly arrive in order, and a list of the same objects is soon compared
            return list(slots.values()), self._take(state)
        if slots.keys() != set(keys):
            return None
        return list(map(slots.__getitem__, keys)), self._take(state)

    def _take(self, state: RequestState) -> dict[OffloadKey, int]:
        lease, holders = state.lease, self._holders
        taken, lease.slots, lease.expires = lease.slots, {}, None
        slots = taken.values()  # no slot comes twice
        # No Python loop: nearly all slots have one holder.
        counts = list(map(holders.pop, slots))
        if counts.count(1) < len(counts):
            holders.update((slot, count - 1) for slot, count in zip(slots, counts, strict=True) if count > 1)
        return taken

    def check_invariants(self, requests: Iterable[RequestState]) -> None:
        """Raise InvariantError unless the holders are exactly the requests' leases."""
        counted: dict[int, int] = {}
        for state in requests:
            for slot in state.lease.slots.values():
                counted[slot] = counted.get(slot, 0) + 1
                if not self._table.is_pinned(slot):
                    raise InvariantError(f"slot {slot} is leased and not pinned")
        if counted != self._holders:
            raise InvariantError("leases and their holders differ")
