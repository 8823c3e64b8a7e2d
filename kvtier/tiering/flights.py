"""The blocks on their way from tiers into the primary tier, and who waits for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat

from kvtier.errors import InvariantError
from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable
from kvtier.tiering.requests import RequestState

Flight = tuple[int, tuple[RequestState, ...]]
"""One block on its way: its slot and who waits for it."""


class Flights:
    """The blocks on their way from tiers, by key."""

    def __init__(self) -> None:
        self.by_key: dict[OffloadKey, Flight] = {}
        self.late: set[OffloadKey] = set()
        """In-flight keys, from a tier or the device, for which a request has timed out; no other may wait for them."""

    def depart(self, keys: Sequence[OffloadKey], slots: Sequence[int], waiter: RequestState) -> None:
        """A job fills `slots` with `keys`, for `waiter`."""
        self.by_key.update(zip(keys, zip(slots, repeat((waiter,)), strict=False), strict=True))
        waiter.awaiting.update(keys)

    def join(self, keys: Iterable[OffloadKey], waiter: RequestState) -> None:
        """`waiter` waits for those of `keys` that a tier is bringing."""
        for key in keys:
            flight = self.by_key.get(key)
            if flight is not None and key not in waiter.awaiting:
                slot, waiters = flight
                self.by_key[key] = slot, (*waiters, waiter)
                waiter.awaiting.add(key)

    def strand(self, waiter: RequestState, device_stores: Iterable[OffloadKey]) -> None:
        """`waiter` has timed out: no other request may wait for what it awaited, `device_stores` included."""
        self.late |= waiter.awaiting
        self.late.update(device_stores)
        self.leave(waiter)

    def leave(self, waiter: RequestState) -> None:
        """`waiter` waits no more; flights go on without it."""
        for key in waiter.awaiting:
            slot, waiters = self.by_key[key]
            self.by_key[key] = slot, tuple([other for other in waiters if other is not waiter])
        waiter.awaiting.clear()

    def land(self, keys: Iterable[OffloadKey], slots: Iterable[int]) -> dict[RequestState, list[OffloadKey]]:
        """The flights of `keys` into `slots` have ended; return each waiting request with its keys."""
        flights, late = self.by_key, self.late
        awaited: dict[RequestState, list[OffloadKey]] = {}
        group: tuple[RequestState, ...] | None = None
        lists: list[list[OffloadKey]] = []
        for key, slot in zip(keys, slots, strict=True):
            flight = flights.get(key)
            if flight is None or flight[0] != slot:
                continue
            del flights[key]
            if late:
                late.discard(key)
            if flight[1] is not group:  # neighbours mostly have the same ones
                group = flight[1]
                lists = [awaited.setdefault(waiter, []) for waiter in group]
            for theirs in lists:
                theirs.append(key)
        for waiter, theirs in awaited.items():
            waiter.awaiting.difference_update(theirs)
        return awaited

    def abandoned(self, keys: Iterable[OffloadKey]) -> list[OffloadKey]:
        """Return those of `keys` in flight for which no request may wait or does wait; a store may take them over."""
        flights, late = self.by_key, self.late
        return [key for key in keys if key in flights and (key in late or not flights[key][1])]

    def abandon(self, keys: Iterable[OffloadKey]) -> None:
        """Forget these flights; their slots are in quarantine until the jobs have ended."""
        for key in keys:
            self.late.discard(key)
            flight = self.by_key.pop(key, None)
            for waiter in flight[1] if flight is not None else ():
                waiter.awaiting.discard(key)

    def clear(self) -> None:
        """The cache is reset: nothing is on its way or late any more."""
        self.abandon(list(self.by_key))
        self.late.clear()

    def end_stores(self, keys: Iterable[OffloadKey]) -> None:
        """Device stores of `keys` have ended: requests may wait for these keys again."""
        self.late.difference_update(keys)

    @property
    def has_live(self) -> bool:
        """Whether any request waits for a flight."""
        return any(waiters for _, waiters in self.by_key.values())

    def check_invariants(self, table: BlockTable) -> None:
        """Raise InvariantError unless every flight has a filling slot and its waiters know of it."""
        for key, (slot, waiters) in self.by_key.items():
            if table.slot_of.get(key) != slot or slot not in table.filling:
                raise InvariantError(f"a flight has slot {slot}, which is not filling")
            if any(key not in waiter.awaiting for waiter in waiters):
                raise InvariantError("a flight counts a waiter that does not wait")
