"""Leases: slots that are pinned for requests between their plan and their load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence, Set

from kvtier.errors import InvariantError
from kvtier.keys import OffloadKey
from kvtier.primary.slot_counts import SlotCounts
from kvtier.primary.table import BlockTable
from kvtier.tiering.requests import RequestState


class Leases:
    """Pins slots and counts them against the budget of promotions. Several requests may hold the same slot."""

    def __init__(self, table: BlockTable, budget: int, timeout: float) -> None:
        """Args: budget: most slots that leases and flights may hold together; timeout: of a lease, in seconds."""
        self._table, self._timeout = table, timeout
        self._holders = SlotCounts()
        self.budget = budget

    @property
    def held(self) -> Container[int]:
        """The slots that requests hold."""
        return self._holders.slots

    def room(self, num_flights: int) -> int:
        """Return how many slots the budget still allows."""
        return self.budget - len(self._holders) - num_flights

    def hold(self, state: RequestState, keys: Sequence[OffloadKey]) -> None:
        """Pin the slots of `keys`, which are ready, for `state`."""
        lease = state.lease.slots
        if not lease.keys().isdisjoint(keys):
            keys = [key for key in keys if key not in lease]
        taken = dict(zip(keys, self._table.slot_of.values_of(keys), strict=True))
        lease.update(taken)
        self._holders.add(taken.values())
        self._table.pin(taken.values())

    def start_timeout(self, state: RequestState, now: float) -> None:
        """Let the lease end after the timeout unless the request loads before. The request waits for nothing more."""
        state.lease.expires = now + self._timeout

    def release(self, state: RequestState) -> None:
        """Unpin all that `state` holds."""
        self._table.unpin(self._take(state).values())

    def hand_over(self, state: RequestState, keys: list[OffloadKey]) -> tuple[list[int], dict[OffloadKey, int]] | None:
        """End the lease of `keys`, whose slots stay pinned once; None if the request does not hold just these.

        Returns:
            The slots, in the order of `keys`, and by key.
        """
        slots = state.lease.slots
        if len(slots) != len(keys):
            return None
        if list(slots) == keys:  # blocks mostly arrive in order, and a list of the same objects is soon compared
            return list(slots.values()), self._take(state)
        if slots.keys() != set(keys):
            return None
        return list(map(slots.__getitem__, keys)), self._take(state)

    def lose(self, state: RequestState, keys: Set[OffloadKey]) -> bool:
        """Unpin those of `keys`, which the table has forgotten, that `state` holds; return whether it held any."""
        slots = state.lease.slots
        lost = [slots.pop(key) for key in [key for key in slots if key in keys]]
        self._holders.drop(lost)
        self._table.unpin(lost)
        return bool(lost)

    def _take(self, state: RequestState) -> dict[OffloadKey, int]:
        lease = state.lease
        taken, lease.slots, lease.expires = lease.slots, {}, None
        self._holders.drop(taken.values())
        return taken

    def check_invariants(self, requests: Iterable[RequestState]) -> None:
        """Raise InvariantError unless the holders are exactly the requests' leases."""
        counted: Counter[int] = Counter()
        for state in requests:
            for key, slot in state.lease.slots.items():
                counted[slot] += 1
                if self._table.slot_of.get(key) != slot:
                    raise InvariantError(f"slot {slot} is leased for a block that is not in it")
                if not self._table.is_pinned(slot):
                    raise InvariantError(f"slot {slot} is leased and not pinned")
        if any(counted[slot] != self._holders.of(slot) for slot in counted.keys() | self._holders.slots):
            raise InvariantError("leases and their holders differ")
