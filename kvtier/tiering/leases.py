"""Leases: slots that are pinned for requests between their plan and their load."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtier.errors import InvariantError
from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable
from kvtier.tiering.requests import Lease, RequestState


class HandedOver(NamedTuple):
    """What a lease has held, for the load that follows.

    Attributes:
        slots: by key, in the order of the load.
        places: the same slots, in the same order.
        by_source: how many of the blocks came from which tier.
    """

    slots: dict[OffloadKey, int]
    places: NDArray[np.int32]
    by_source: Mapping[str, int]


class Leases:
    """Pins slots and counts them against the budget of promotions. Several requests may hold the same slot.

    Attributes:
        held: by slot, how many requests hold it. Others may read it.
    """

    def __init__(self, table: BlockTable, budget: int, timeout: float) -> None:
        """Args: budget: most slots that leases and flights may hold together; timeout: of a lease, in seconds."""
        self._table, self._timeout = table, timeout
        self.held = array("i", bytes(4 * table.num_slots))
        self._counts = np.frombuffer(self.held, np.int32)  # the same memory, for many slots in one call
        self._num_held = 0
        self.budget = budget

    def room(self, num_flights: int) -> int:
        """Return how many slots the budget still allows."""
        return self.budget - self._num_held - num_flights

    def hold(self, state: RequestState, keys: Sequence[OffloadKey]) -> None:
        """Pin the slots of `keys`, which are ready, for `state`. Their sources are known already."""
        lease = state.lease
        if not lease.slots.keys().isdisjoint(keys):
            keys = [key for key in keys if key not in lease.slots]
        if not keys:
            return
        slots, held = self._table.slot_of.values_of(keys), self.held
        lease.slots.update(zip(keys, slots, strict=True))
        if lease.places is None or lease.by_source is None:
            lease.places, lease.by_source = array("i"), {}
        lease.places.extend(slots)
        for source, count in state.plans.count_sources(keys).items():
            lease.by_source[source] = lease.by_source.get(source, 0) + count
        for slot in slots:
            if not held[slot]:
                self._num_held += 1
            held[slot] += 1
        self._table.pin(slots)

    def start_timeout(self, state: RequestState, now: float) -> None:
        """Let the lease end after the timeout unless the request loads before. The request waits for nothing more."""
        state.lease.expires = now + self._timeout

    def release(self, state: RequestState) -> None:
        """Unpin all that `state` holds."""
        self._table.unpin(self._take(state).slots.values())

    def hand_over(self, state: RequestState, keys: list[OffloadKey]) -> HandedOver | None:
        """End the lease of `keys`, whose slots stay pinned once; None if the request does not hold just these."""
        slots = state.lease.slots
        if len(slots) != len(keys):
            return None
        if list(slots) == keys:  # blocks mostly arrive in order, and a list of the same objects is soon compared
            return self._take(state)
        if not set(keys).issuperset(slots):
            return None
        taken = dict(zip(keys, map(slots.__getitem__, keys), strict=True))
        places = np.fromiter(taken.values(), np.int32, len(taken))
        return HandedOver(taken, places, self._take(state).by_source)

    def lose(self, state: RequestState, keys: Set[OffloadKey]) -> bool:
        """Unpin those of `keys`, which the table has forgotten, that `state` holds; return whether it held any."""
        lease = state.lease
        slots = lease.slots
        lost = [slots.pop(key) for key in [key for key in slots if key in keys]]
        if lost:
            lease.places = array("i", slots.values())
            lease.by_source = dict(state.plans.count_sources(list(slots))) if slots else {}
            self._drop(np.asarray(lost, np.int32))
            self._table.unpin(lost)
        return bool(lost)

    def _take(self, state: RequestState) -> HandedOver:
        lease = state.lease
        state.lease = Lease()
        if lease.places is None or lease.by_source is None:
            return HandedOver({}, np.zeros(0, np.int32), {})
        places = np.frombuffer(lease.places, np.int32)
        self._drop(places)
        return HandedOver(lease.slots, places, lease.by_source)

    def _drop(self, places: NDArray[np.int32]) -> None:
        """Count one holder less for each of these slots, none of which comes twice."""
        left = self._counts[places] - 1
        self._counts[places] = left
        self._num_held -= len(places) - int(np.count_nonzero(left))

    def check_invariants(self, requests: Iterable[RequestState]) -> None:
        """Raise InvariantError unless the holders are exactly the requests' leases."""
        counted: Counter[int] = Counter()
        for state in requests:
            lease = state.lease
            if list(lease.places or ()) != list(lease.slots.values()):
                raise InvariantError(f"the lease of {state.context.req_id} has other places than slots")
            if sum((lease.by_source or {}).values()) != len(lease.slots):
                raise InvariantError(f"the lease of {state.context.req_id} has other sources than blocks")
            for key, slot in lease.slots.items():
                counted[slot] += 1
                if self._table.slot_of.get(key) != slot:
                    raise InvariantError(f"slot {slot} is leased for a block that is not in it")
                if not self._table.is_pinned(slot):
                    raise InvariantError(f"slot {slot} is leased and not pinned")
        if self._num_held != len(counted) or any(self.held[slot] != counted[slot] for slot in range(len(self.held))):
            raise InvariantError("leases and their holders differ")
