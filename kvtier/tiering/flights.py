"""The blocks on their way from secondary tiers into the primary tier, and the requests that wait for them.

A block is queued until a tier has been asked for it. Then it is in flight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvtier.errors import InvariantError
from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable
from kvtier.tiering.requests import RequestState

Flight = tuple[int, tuple[RequestState, ...]]
"""One block in flight: its slot, and the requests that wait for it."""


class Flights:
    """The blocks on their way from secondary tiers, by key."""

    def __init__(self) -> None:
        self.by_key: dict[OffloadKey, Flight] = {}
        self.queued: dict[OffloadKey, tuple[RequestState, ...]] = {}
        """The requests that wait for each queued block. Such a block has no slot. It is dropped when no request waits
        for it any more."""
        self.late: set[OffloadKey] = set()
        """Keys in flight, from a tier or the device, for which a request has timed out. No other may wait for them."""
        self.unwanted_slots: set[int] = set()
        """Slots that jobs are filling with blocks that no request waits for."""

    def __len__(self) -> int:
        return len(self.by_key) + len(self.queued)

    def queue(self, keys: Sequence[OffloadKey], waiter: RequestState) -> None:
        """Queue `keys`, for which a tier will be asked, with `waiter` waiting for them."""
        self.queued.update(dict.fromkeys(keys, (waiter,)))
        waiter.awaiting.update(keys)

    def depart(self, keys: Sequence[OffloadKey], slots: Sequence[int]) -> None:
        """Note that a job now fills `slots` with `keys`, which were queued."""
        self.by_key.update(zip(keys, zip(slots, map(self.queued.pop, keys), strict=True), strict=True))

    def drop(self, keys: Iterable[OffloadKey]) -> dict[RequestState, list[OffloadKey]]:
        """Remove queued `keys`, for which no tier will be asked. Return each waiting request with its keys."""
        awaited: dict[RequestState, list[OffloadKey]] = {}
        for key in keys:
            for waiter in self.queued.pop(key, ()):
                awaited.setdefault(waiter, []).append(key)
        for waiter, theirs in awaited.items():
            waiter.awaiting.difference_update(theirs)
        return awaited

    def join(self, keys: Iterable[OffloadKey], waiter: RequestState) -> None:
        """Let `waiter` wait for those of `keys` that are queued or in flight."""
        for key in keys:
            if key in waiter.awaiting:
                continue
            if key in self.queued:
                self.queued[key] = (*self.queued[key], waiter)
            elif key in self.by_key:
                slot, waiters = self.by_key[key]
                self.by_key[key] = slot, (*waiters, waiter)
                self.unwanted_slots.discard(slot)
            else:
                continue
            waiter.awaiting.add(key)

    def strand(self, waiter: RequestState, device_stores: Iterable[OffloadKey]) -> None:
        """End the waits of `waiter`, which has timed out. No other request may wait for the same blocks in flight.

        Args:
            device_stores: keys that it awaited from the device.
        """
        self.late.update(filter(self.by_key.__contains__, waiter.awaiting))
        self.late.update(device_stores)
        self.leave(waiter)

    def leave(self, waiter: RequestState) -> None:
        """End the waits of `waiter`. Flights go on; queued blocks that no other request waits for are dropped."""
        for key in waiter.awaiting:
            if key in self.queued:
                others = tuple([other for other in self.queued[key] if other is not waiter])
                if others:
                    self.queued[key] = others
                else:
                    del self.queued[key]
                continue
            slot, waiters = self.by_key[key]
            others = tuple([other for other in waiters if other is not waiter])
            self.by_key[key] = slot, others
            if not others:
                self.unwanted_slots.add(slot)
        waiter.awaiting.clear()

    def land(self, keys: Sequence[OffloadKey], slots: Sequence[int]) -> dict[RequestState, list[OffloadKey]]:
        """Remove the flights of `keys` into `slots`, which have ended. Return each waiting request with its keys."""
        flights, late = self.by_key, self.late
        if self.unwanted_slots:
            self.unwanted_slots.difference_update(slots)
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
            if flight[1] is not group:  # neighbouring blocks mostly have the same waiters
                group = flight[1]
                lists = [awaited.setdefault(waiter, []) for waiter in group]
            for theirs in lists:
                theirs.append(key)
        for waiter, theirs in awaited.items():
            waiter.awaiting.difference_update(theirs)
        return awaited

    def abandoned(self, keys: Iterable[OffloadKey]) -> list[OffloadKey]:
        """Return those of `keys` in flight that no request waits for or may wait for. A store may replace them."""
        flights, late = self.by_key, self.late
        return [key for key in keys if key in flights and (key in late or not flights[key][1])]

    def unwanted(self, keys: Iterable[OffloadKey]) -> set[OffloadKey]:
        """Return those of `keys` in flight that no request waits for."""
        flights = self.by_key
        return {key for key in keys if key in flights and not flights[key][1]}

    def abandon(self, keys: Iterable[OffloadKey]) -> None:
        """Forget these flights. The caller removes their blocks, whose slots stay quarantined until the jobs end."""
        for key in keys:
            self.late.discard(key)
            flight = self.by_key.pop(key, None)
            if flight is None:
                continue
            self.unwanted_slots.add(flight[0])
            for waiter in flight[1]:
                waiter.awaiting.discard(key)

    def clear(self) -> None:
        """Forget everything that is on its way, because the cache is reset."""
        self.abandon(list(self.by_key))
        self.drop(list(self.queued))
        self.late.clear()

    def end_stores(self, keys: Iterable[OffloadKey]) -> None:
        """Let requests wait for `keys` again, because their stores from the device have ended."""
        self.late.difference_update(keys)

    @property
    def has_live(self) -> bool:
        """Whether any request waits for a block, queued or in flight."""
        return bool(self.queued) or any(waiters for _, waiters in self.by_key.values())

    def check_invariants(self, table: BlockTable) -> None:
        """Raise InvariantError if a flight has no filling slot, or if it and its waiters disagree."""
        for key, (slot, waiters) in self.by_key.items():
            if table.slot_of.get(key) != slot or slot not in table.filling:
                raise InvariantError(f"a flight has slot {slot}, which is not filling")
            if any(key not in waiter.awaiting for waiter in waiters):
                raise InvariantError("a flight counts a waiter that does not wait")
            if (slot in self.unwanted_slots) is not (not waiters):
                raise InvariantError(f"slot {slot} is wanted or not, as somebody waits or nobody does")
        for key, waiters in self.queued.items():
            if not waiters or any(key not in waiter.awaiting for waiter in waiters):
                raise InvariantError("a block is queued for nobody, or for one that does not wait")
        if not self.queued.keys().isdisjoint(self.by_key):
            raise InvariantError("a block is queued and in flight")
