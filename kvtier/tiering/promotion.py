"""Promotions: which blocks a request may bring into the primary tier, the slots it holds there, how a plan is done."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from kvtier.clock import Clock
from kvtier.errors import InvariantError, KeyFormatError
from kvtier.events import BlocksEvicted, BlocksStored, Observer
from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable, Placement
from kvtier.tiering.flights import Promotions
from kvtier.tiering.guarded_tier import Job, TierGuard
from kvtier.tiering.lookups import Lookups
from kvtier.tiering.requests import RequestState, split_scan
from kvtier.tiering.settings import TieringSettings

PRIMARY = "primary"


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


class Promoter:
    """Leases, allocates and submits what a plan says; publishes what lands, for all who wait for it."""

    def __init__(
        self,
        table: BlockTable,
        guards: Sequence[TierGuard],
        settings: TieringSettings,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._table = table
        self._guards = guards
        self._settings = settings
        self._clock = clock
        self._observer = observer
        self.promotions = Promotions()
        self.leases = Leases(table, max(1, int(table.num_slots * settings.promotion_budget)))
        self.lookups = Lookups(table, guards, self.promotions, settings, clock, observer)

    def plan_step(self, scanned: Sequence[RequestState]) -> None:
        """Plan for the requests that looked blocks up in this step, oldest first; their scans are over."""
        for state in sorted(scanned, key=_arrival):
            if state.may_wait and (state.found or state.deferred_since is not None):
                self.promote(state)
                state.note_plan()
            state.forget_scan()

    def promote(self, state: RequestState) -> None:
        """Plan for one request at the end of a step, and start what the plan says."""
        if state.awaiting and not state.unresolved and state.awaiting.issuperset(state.scan):
            return  # all of it is on its way
        num_awaited = len(state.awaiting)
        room = self.leases.room(len(self.promotions.flights))
        plan = plan_promotions(state, self._table, room, self.promotions.late, self.leases.held)
        if plan.waits or state.awaiting:
            self.leases.hold(state, plan.hits)
            self.promotions.join(plan.joins, state)
            for index, keys in plan.by_tier.items():
                placement = self._place(keys)
                self._submit(self._guards[index], placement, state)
                self.lookups.deny(state, keys[len(placement.keys) :])
            self.lookups.shorten_deadline(state, len(state.awaiting) - num_awaited)
        self.lookups.deny(state, plan.denied)
        now = self._clock()
        if not plan.waits and not state.unresolved and not state.awaiting:
            state.stop_waiting(now)
        if state.lease and not state.awaiting and state.lease_expires is None:
            state.lease_expires = now + self._settings.lease_timeout

    def _place(self, keys: Sequence[OffloadKey]) -> Placement:
        try:
            return self._table.plan(keys)
        except KeyFormatError:  # a tier claims to hold what cannot be a key here
            return Placement([], [], len(keys))

    def _submit(self, guard: TierGuard, placement: Placement, state: RequestState) -> None:
        if not placement.keys:
            return
        slots = list(self._table.apply(placement).values())
        if placement.victims:
            self._observer.on_event(BlocksEvicted(PRIMARY, placement.victims))
        self.promotions.depart(placement.keys, slots, state)
        if not guard.load(placement.keys, slots, state.context):
            self._fail(guard, placement.keys, slots)

    def land(self, guard: TierGuard, job: Job) -> None:
        """Take in the end of a promotion job: good blocks become ready, the rest misses for those who waited."""
        table = self._table
        successful = job.successful
        keys: Sequence[OffloadKey] = job.keys
        slots: Sequence[int] = job.slots
        bad_keys: list[OffloadKey] = []
        bad_slots: list[int] = []
        if len(successful) < len(keys):
            bad = [(key, slot) for key, slot in zip(keys, slots, strict=True) if key not in successful]
            good = [(key, slot) for key, slot in zip(keys, slots, strict=True) if key in successful]
            bad_keys, bad_slots = [key for key, _ in bad], [slot for _, slot in bad]
            keys, slots = [key for key, _ in good], [slot for _, slot in good]
        table.publish(slots)
        get_slot = table.slot_of.get
        arrived = [key for key, slot in zip(keys, slots, strict=True) if get_slot(key) == slot]
        for state, theirs in self.promotions.land(keys, slots).items():
            self.leases.hold(state, theirs)
            state.sources.update(dict.fromkeys(theirs, guard.name))
            self._end_wait(state)
        if arrived:
            self._observer.on_event(BlocksStored(arrived, guard.name))
        if bad_keys:
            self._fail(guard, bad_keys, bad_slots)

    def _fail(self, guard: TierGuard, keys: Sequence[OffloadKey], slots: Sequence[int]) -> None:
        for state, theirs in self.promotions.land(keys, slots).items():
            state.failed.update((guard.index, key) for key in theirs)
            self._end_wait(state)
        self._table.discard(keys, slots)

    def _end_wait(self, state: RequestState) -> None:
        if not state.awaiting:
            now = self._clock()
            state.stop_waiting(now)
            state.lease_expires = now + self._settings.lease_timeout

    def take_over_abandoned(self, keys: Sequence[OffloadKey]) -> None:
        """Detach blocks that are on their way to nobody, so that they can be stored in other slots."""
        abandoned = self.promotions.abandoned(keys)
        self.promotions.abandon(abandoned)
        self._table.remove(abandoned)

    def expire(self, state: RequestState, now: float) -> None:
        """End the request's wait and its lease if their time is over."""
        if state.deferred_since is not None:
            self.lookups.expire(state, now)
        if not state.scan and (state.deferred_since is not None or state.probing_since):
            state.pause(now)
        if state.lease_expires is not None and now >= state.lease_expires:
            self.leases.release(state)

    def let_go(self, state: RequestState) -> None:
        """The request waits for nothing and holds nothing any more."""
        if state.awaiting:
            self.promotions.leave(state)
        if state.lease or state.lease_expires is not None:
            self.leases.release(state)


def _arrival(state: RequestState) -> int:
    return state.arrival
