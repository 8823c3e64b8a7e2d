"""Promotions: what a request may bring into the primary tier, and what is on its way."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat, zip_longest

from kvtier.errors import InvariantError
from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable
from kvtier.tiering.requests import RequestState, split_scan


@dataclass(frozen=True, slots=True)
class PromotionPlan:
    """What one request gets at the end of a step; changes nothing by itself.

    Attributes:
        hits: ready keys to lease.
        joins: keys already on their way, to wait for; not those that it awaits already.
        by_tier: keys to promote, per tier index, in the engine's order.
        denied: keys over the budget.
    """

    hits: list[OffloadKey]
    joins: list[OffloadKey]
    by_tier: dict[int, list[OffloadKey]]
    denied: list[OffloadKey]

    @property
    def waits(self) -> bool:
        """Whether the request has anything to wait for."""
        return bool(self.joins or self.by_tier)


def plan_promotions(
    state: RequestState,
    table: BlockTable,
    room: int,
    late: Container[OffloadKey] = (),
    held: Container[int] = (),
) -> PromotionPlan:
    """Choose what to lease and promote for one request: all that is certain, up to the first unresolved key.

    Args:
        late: keys whose promotion somebody waited for in vain; nobody joins it.
        room: primary slots that the budget still grants, for new leases and promotions together.
        held: slots that some lease holds already; another lease of them costs nothing.
    """
    groups = [_certain_head(state, group) for group in split_scan(state.scan)]
    hits: list[OffloadKey] = []
    joins: list[OffloadKey] = []
    denied: list[OffloadKey] = []
    by_tier: dict[int, list[OffloadKey]] = {}
    get_slot, filling, lease, awaiting = table.slot_of.get, table.filling, state.lease, state.awaiting
    for key in _in_step(groups):
        if key in lease or key in awaiting:
            continue
        slot = get_slot(key)
        if slot is not None:
            if slot in filling:
                if key not in late:
                    joins.append(key)
            elif slot in held:
                hits.append(key)
            elif room > 0:
                hits.append(key)
                room -= 1
        elif key in state.found:
            if room > 0:
                by_tier.setdefault(state.found[key], []).append(key)
                room -= 1
            else:
                denied.append(key)
    return PromotionPlan(hits, joins, by_tier, denied)


def _in_step(groups: Sequence[Sequence[OffloadKey]]) -> Iterable[OffloadKey]:
    """Return the groups' keys, the first of each, then the second of each: a cut leaves the groups even."""
    if len(groups) == 1:
        return groups[0]
    return [key for row in zip_longest(*groups) for key in row if key is not None]


def _certain_head(state: RequestState, keys: Sequence[OffloadKey]) -> Sequence[OffloadKey]:
    if not state.unresolved:
        return keys
    for index, key in enumerate(keys):
        if key in state.unresolved:
            return keys[:index]
    return keys


Flight = tuple[int, tuple[RequestState, ...]]
"""One block on its way: its slot and who waits for it."""


class Promotions:
    """The blocks on their way from tiers, by key."""

    def __init__(self) -> None:
        self.flights: dict[OffloadKey, Flight] = {}
        self.late: set[OffloadKey] = set()
        """Keys on their way from a tier or the device that somebody awaited in vain: nobody else shall."""

    def depart(self, keys: Sequence[OffloadKey], slots: Sequence[int], waiter: RequestState) -> None:
        """A job fills `slots` with `keys`, for `waiter`."""
        self.flights.update(zip(keys, zip(slots, repeat((waiter,)), strict=False), strict=True))
        waiter.awaiting.update(keys)

    def join(self, keys: Iterable[OffloadKey], waiter: RequestState) -> None:
        """`waiter` waits for those of `keys` that a tier is bringing."""
        for key in keys:
            flight = self.flights.get(key)
            if flight is not None and key not in waiter.awaiting:
                slot, waiters = flight
                self.flights[key] = slot, (*waiters, waiter)
                waiter.awaiting.add(key)

    def leave(self, waiter: RequestState, late: bool = False) -> None:
        """`waiter` waits no more; flights go on without it. `late` ones are joined by nobody: its time was up."""
        if late:
            self.late |= waiter.awaiting
        for key in waiter.awaiting:
            slot, waiters = self.flights[key]
            self.flights[key] = slot, tuple([other for other in waiters if other is not waiter])
        waiter.awaiting.clear()

    def land(self, keys: Iterable[OffloadKey], slots: Iterable[int]) -> dict[RequestState, list[OffloadKey]]:
        """The flights of `keys` into `slots` are over; return who waited for which. Abandoned ones had nobody."""
        flights, late = self.flights, self.late
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
        """Return those of `keys` that are late or on their way to nobody; a store may take them over."""
        flights, late = self.flights, self.late
        return [key for key in keys if key in flights and (key in late or not flights[key][1])]

    def abandon(self, keys: Iterable[OffloadKey]) -> None:
        """Forget these flights: whatever arrives finds its slot in quarantine."""
        for key in keys:
            self.late.discard(key)
            flight = self.flights.pop(key, None)
            for waiter in flight[1] if flight is not None else ():
                waiter.awaiting.discard(key)

    def clear(self) -> None:
        """The cache is reset: nothing is on its way or late any more."""
        self.abandon(list(self.flights))
        self.late.clear()

    def end_stores(self, keys: Iterable[OffloadKey]) -> None:
        """Device stores of `keys` have ended: those that were late are so no more."""
        self.late.difference_update(keys)

    @property
    def has_live(self) -> bool:
        """Whether any request waits for a flight."""
        return any(waiters for _, waiters in self.flights.values())

    def check_invariants(self, table: BlockTable) -> None:
        """Raise InvariantError unless every flight has a filling slot and its waiters know of it."""
        for key, (slot, waiters) in self.flights.items():
            if table.slot_of.get(key) != slot or slot not in table.filling:
                raise InvariantError(f"a flight has slot {slot}, which is not filling")
            if any(key not in waiter.awaiting for waiter in waiters):
                raise InvariantError("a flight counts a waiter that does not wait")


class Leases:
    """Slots that requests hold between their plan and their load; several may hold one slot."""

    def __init__(self, table: BlockTable, budget: int) -> None:
        """Args: budget: most slots that leases and flights may hold together."""
        self._table = table
        self._holders: dict[int, int] = {}
        self.budget = budget

    @property
    def held(self) -> Container[int]:
        """The slots that requests hold."""
        return self._holders.keys()

    def room(self, num_flights: int) -> int:
        """Slots that the budget still grants."""
        return self.budget - len(self._holders) - num_flights

    def hold(self, state: RequestState, keys: Iterable[OffloadKey]) -> None:
        """Pin the slots of `keys`, which are ready, for `state`."""
        lease, holders, slot_of = state.lease, self._holders, self._table.slot_of
        taken = {key: slot_of[key] for key in keys if key not in lease}
        lease.update(taken)
        for slot in taken.values():
            holders[slot] = holders.get(slot, 0) + 1
        self._table.pin(taken.values())

    def release(self, state: RequestState) -> None:
        """Unpin all that `state` holds."""
        for slot in state.lease.values():
            left = self._holders[slot] - 1
            if left:
                self._holders[slot] = left
            else:
                del self._holders[slot]
        self._table.unpin(state.lease.values())
        state.lease.clear()
        state.lease_expires = None

    def check_invariants(self, requests: Iterable[RequestState]) -> None:
        """Raise InvariantError unless the holders are exactly the requests' leases."""
        counted: dict[int, int] = {}
        for state in requests:
            for slot in state.lease.values():
                counted[slot] = counted.get(slot, 0) + 1
                if not self._table.is_pinned(slot):
                    raise InvariantError(f"slot {slot} is leased and not pinned")
        if counted != self._holders:
            raise InvariantError("leases and their holders differ")
