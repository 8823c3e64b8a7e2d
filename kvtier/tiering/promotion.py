"""Promotions: which blocks a request may bring into the primary tier, and how a plan is carried out."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from operator import itemgetter

from kvtier.clock import Clock
from kvtier.errors import KeyFormatError
from kvtier.events import BlocksEvicted, BlocksStored, Observer, RequestGaveUp
from kvtier.keys import GROUP_BYTES, OffloadKey
from kvtier.primary.table import BlockTable, Placement
from kvtier.secondary.jobs import Job
from kvtier.tiering.flights import Flights
from kvtier.tiering.guarded_tier import TierGuard
from kvtier.tiering.leases import Leases
from kvtier.tiering.requests import RequestState
from kvtier.tiering.waiting import Waiting

PRIMARY = "primary"

_group_of = itemgetter(slice(-GROUP_BYTES, None))


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
    """Choose what to lease and promote for one request: the keys up to the first unresolved one; change nothing.

    Args:
        late: in-flight keys that nobody may wait for any more.
        room: primary slots that the budget still grants, for new leases and promotions together.
        held: slots that some lease holds already; another lease of them costs nothing.
    """
    scan = state.scan
    groups = [_certain_head(group, scan.unresolved) for group in split_scan(scan.keys)]
    hits: list[OffloadKey] = []
    joins: list[OffloadKey] = []
    denied: list[OffloadKey] = []
    by_tier: dict[int, list[OffloadKey]] = {}
    get_slot, filling, lease, awaiting = table.slot_of.get, table.filling, state.lease.slots, state.awaiting
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
        elif key in scan.found:
            if room > 0:
                by_tier.setdefault(scan.found[key], []).append(key)
                room -= 1
            else:
                denied.append(key)
    return PromotionPlan(hits, joins, by_tier, denied)


def _in_step(groups: Sequence[Sequence[OffloadKey]]) -> Iterable[OffloadKey]:
    """Return the groups' keys, the first of each, then the second of each: a cut leaves the groups even."""
    if len(groups) == 1:
        return groups[0]
    return [key for row in zip_longest(*groups) for key in row if key is not None]


def _certain_head(keys: Sequence[OffloadKey], unresolved: Container[OffloadKey]) -> Sequence[OffloadKey]:
    if unresolved:
        for index, key in enumerate(keys):
            if key in unresolved:
                return keys[:index]
    return keys


def split_scan(scan: Collection[OffloadKey]) -> list[list[OffloadKey]]:
    """Return what was looked up, by KV group, in the engine's order.

    A group whose scan comes to a key again has started over: the later scan replaces the earlier.
    """
    if len(set(map(_group_of, scan))) == 1 and len(set(scan)) == len(scan):
        return [list(scan)]
    groups: dict[bytes, dict[OffloadKey, None]] = {}
    group: dict[OffloadKey, None] = {}
    last = b""
    for key in scan:
        suffix = key[-GROUP_BYTES:]
        if suffix != last:
            group, last = groups.setdefault(suffix, {}), suffix
        if key in group:
            group.clear()
        group[key] = None
    return [list(group) for group in groups.values()]


class Promoter:
    """Carries out plans: leases hits, allocates slots, submits loads, and publishes the blocks that arrive."""

    def __init__(
        self,
        table: BlockTable,
        guards: Sequence[TierGuard],
        flights: Flights,
        leases: Leases,
        waiting: Waiting,
        clock: Clock,
        observer: Observer,
    ) -> None:
        """Args: table: of the primary tier; guards: of the secondary tiers."""
        self._table, self._guards = table, guards
        self._flights, self._leases, self._waiting = flights, leases, waiting
        self._clock, self._observer = clock, observer

    def plan(self, state: RequestState) -> None:
        """Plan for one request at the end of a step, if it asked tiers for anything, and start what the plan says."""
        scan = state.scan
        if not state.may_wait or not (scan.found or state.wait.since is not None):
            return
        all_on_their_way = state.awaiting and not scan.unresolved and state.awaiting.issuperset(scan.keys)
        if not all_on_their_way:
            self._promote(state)
        plans = state.plans
        certain = scan.keys and not scan.unresolved
        plans.last = (scan.keys[0], len(state.awaiting)) if certain else None
        if certain and state.awaiting:
            plans.shortest_group = min(len(list(keys)) for _, keys in groupby(map(_group_of, scan.keys)))

    def _promote(self, state: RequestState) -> None:
        num_awaited = len(state.awaiting)
        room = self._leases.room(len(self._flights.by_key))
        plan = plan_promotions(state, self._table, room, self._flights.late, self._leases.held)
        if plan.waits or state.awaiting:
            self._leases.hold(state, plan.hits)
            self._flights.join(plan.joins, state)
            for index, keys in plan.by_tier.items():
                placement = self._place(keys)
                self._submit(self._guards[index], placement, state)
                self._deny(state, keys[len(placement.keys) :])
            self._waiting.expect(state, len(state.awaiting) - num_awaited)
        self._deny(state, plan.denied)
        now = self._clock()
        if not plan.waits and not state.scan.unresolved and not state.awaiting:
            self._waiting.stop(state, now)
        if state.lease.slots and not state.awaiting and state.lease.expires is None:
            self._leases.start_timeout(state, now)

    def _deny(self, state: RequestState, keys: Sequence[OffloadKey]) -> None:
        """From now on these keys, which no plan could place, are misses for this request."""
        if keys:
            state.plans.denied.update(keys)
            self._observer.on_event(RequestGaveUp(state.context.req_id, "budget", len(keys)))

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
        self._flights.depart(placement.keys, slots, state)
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
        for state, theirs in self._flights.land(keys, slots).items():
            self._leases.hold(state, theirs)
            state.plans.sources.update(dict.fromkeys(theirs, guard.name))
            self._end_wait(state)
        if arrived:
            self._observer.on_event(BlocksStored(arrived, guard.name))
        if bad_keys:
            self._fail(guard, bad_keys, bad_slots)

    def _fail(self, guard: TierGuard, keys: Sequence[OffloadKey], slots: Sequence[int]) -> None:
        for state, theirs in self._flights.land(keys, slots).items():
            state.plans.failed.update((guard.index, key) for key in theirs)
            self._end_wait(state)
        self._table.discard(keys, slots)

    def _end_wait(self, state: RequestState) -> None:
        if not state.awaiting:
            now = self._clock()
            self._waiting.stop(state, now)
            self._leases.start_timeout(state, now)

    def take_over_abandoned(self, keys: Sequence[OffloadKey]) -> None:
        """Detach blocks that are on their way to nobody, so that they can be stored in other slots."""
        abandoned = self._flights.abandoned(keys)
        self._flights.abandon(abandoned)
        self._table.remove(abandoned)

    def let_go(self, state: RequestState) -> None:
        """The request waits for nothing and holds nothing any more."""
        if state.awaiting:
            self._flights.leave(state)
        if state.lease.slots or state.lease.expires is not None:
            self._leases.release(state)

    def begin_attempt(self, state: RequestState) -> None:
        """Forget what failed or could not be placed: the request was preempted, or the cache was reset."""
        plans = state.plans
        plans.denied.clear()
        plans.failed.clear()
        plans.last = None

    def forget_sources(self, state: RequestState) -> None:
        """Forget which tiers blocks came from: the cache was reset."""
        state.plans.sources.clear()

    def is_as_planned(self, state: RequestState, first_key: OffloadKey, shortest: int) -> bool:
        """Return whether a scan from `first_key` on would meet the last plan, and nothing of it has arrived or failed.

        Args:
            shortest: least keys that the planned scan had in each KV group; else False.
        """
        plans, awaiting = state.plans, state.awaiting
        if not awaiting or not state.may_wait or plans.shortest_group < shortest:
            return False
        return plans.last == (first_key, len(awaiting))

    def check_invariants(self, requests: Iterable[RequestState]) -> None:
        """Raise InvariantError if flights, leases and requests contradict each other."""
        self._flights.check_invariants(self._table)
        self._leases.check_invariants(requests)
