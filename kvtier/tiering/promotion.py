"""Promotions: how plans are carried out, from the queue of a tier to the blocks that arrive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from kvtier.clock import Clock
from kvtier.errors import KeyFormatError
from kvtier.events import BlocksEvicted, BlocksStored, Observer, RequestGaveUp
from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable, Placement
from kvtier.secondary.jobs import Job
from kvtier.tiering.estimate import Outlook
from kvtier.tiering.flights import Flights
from kvtier.tiering.guarded_tier import TierGuard
from kvtier.tiering.leases import Leases
from kvtier.tiering.load_queue import LoadQueue, QueuedLoad
from kvtier.tiering.pace import Pace
from kvtier.tiering.planning import PromotionPlan, Prospect, group_of, plan_promotions
from kvtier.tiering.requests import RequestState
from kvtier.tiering.waiting import Waiting

PRIMARY = "primary"
MAX_PLANNED = 2048
"""Keys that one step considers, a request at least: planning them takes about as long as looking them up."""


class Promoter:
    """Carries out plans: leases hits, allocates slots, submits loads, and publishes the blocks that arrive."""

    def __init__(
        self,
        table: BlockTable,
        guards: Sequence[TierGuard],
        flights: Flights,
        leases: Leases,
        waiting: Waiting,
        pace: Pace,
        block_bytes: int,
        clock: Clock,
        observer: Observer,
    ) -> None:
        """Args: table: of the primary tier; guards: of the secondary tiers."""
        self._table = table
        self._queues = [LoadQueue(guard, block_bytes) for guard in guards]
        self._flights, self._leases, self._waiting, self._pace = flights, leases, waiting, pace
        self._clock, self._observer = clock, observer
        self._num_planned = 0

    # -- plans --------------------------------------------------------------------------------------------

    def plan(self, state: RequestState) -> None:
        """Plan for one request at the end of a step, if it asked tiers for anything."""
        scan = state.scan
        if not state.may_wait or not (scan.found or state.wait.since is not None):
            return
        is_whole = True
        all_on_their_way = state.awaiting and not scan.unresolved and state.awaiting.issuperset(scan.keys)
        if not all_on_their_way:
            if self._num_planned >= MAX_PLANNED:
                state.plans.last = None
                return
            self._num_planned += len(scan.keys)
            is_whole = self._promote(state)
        plans = state.plans
        certain = scan.keys and not scan.unresolved and is_whole
        plans.last = (scan.keys[0], len(state.awaiting)) if certain else None
        if certain and state.awaiting:
            plans.shortest_group = min(len(list(keys)) for _, keys in groupby(map(group_of, scan.keys)))

    def _promote(self, state: RequestState) -> bool:
        flights, now = self._flights, self._clock()
        outlook = self._pace.outlook(now, state)
        plan = plan_promotions(
            state,
            self._table,
            self._leases.room(len(flights)),
            self._prospect(state, outlook, now),
            MAX_PLANNED,
            late=flights.late,
            held=self._leases.held,
            queued=flights.queued,
        )
        if plan.waits or state.awaiting:
            self._leases.hold(state, plan.hits)
            flights.join(plan.joins, state)
            self._waiting.expect(state, plan.computing, outlook.idle_in)
            self._note_plan(state, plan)
            for index, keys in plan.by_tier.items():
                flights.queue(keys, state)
                self._queues[index].add(keys, state, plan.gain, now + plan.computing)
        self._give_up(state, plan.denied, "budget")
        self._give_up(state, plan.declined, "slower")
        if not plan.waits and plan.is_whole and not state.scan.unresolved and not state.awaiting:
            self._waiting.stop(state, now)
        if state.lease.slots and not state.awaiting and state.lease.expires is None:
            self._leases.start_timeout(state, now)
        return plan.is_whole

    def _note_plan(self, state: RequestState, plan: PromotionPlan) -> None:
        num_awaited = len(plan.joins) + sum(map(len, plan.by_tier.values()))
        if num_awaited:
            state.plans.asked.update(plan.by_tier)
            state.plans.block_seconds = plan.computing / num_awaited

    def _prospect(self, state: RequestState, outlook: Outlook, now: float) -> Prospect | None:
        """Return what can be said of loading and computing; None if the engine does not say what a block is."""
        if not self._pace.is_known:
            return None
        ready_in = {queue.guard.index: queue.speed.seconds(queue.num_queued, now) for queue in self._queues}
        per_block = {queue.guard.index: 1 / queue.speed.bandwidth for queue in self._queues}
        return Prospect(*self._pace.block_seconds(state), ready_in, per_block, outlook)

    def _give_up(self, state: RequestState, keys: Sequence[OffloadKey], reason: str) -> None:
        """From now on these keys, for which there is no room or which are computed sooner, are misses for this one."""
        if keys:
            state.plans.denied.update(keys)
            self._observer.on_event(RequestGaveUp(state.context.req_id, reason, len(keys)))

    # -- loads --------------------------------------------------------------------------------------------

    def send(self) -> None:
        """Cancel what nobody waits for, and ask every tier for as much as keeps it busy, at the end of a step."""
        self._num_planned = 0
        for queue in self._queues:
            if self._flights.unwanted_slots:
                queue.guard.cancel_unwanted(self._flights.unwanted_slots)
            if queue.loads:
                now = self._clock()
                queue.arrange(self._flights.queued, now)
                for load in list(queue.loads):
                    while load.keys and queue.has_room(min(load.part, len(load.keys))):
                        self._ask(queue, load, now)

    def _ask(self, queue: LoadQueue, load: QueuedLoad, now: float) -> None:
        """Ask a tier for the next part of a load."""
        table, flights = self._table, self._flights
        part = [key for key in queue.take(load) if key in flights.queued]
        held = [key for key in part if key in table]  # somebody has stored it meanwhile: the next scan finds it there
        if held:
            flights.drop(held)
            part = [key for key in part if key in flights.queued]
        placement = self._place(part)
        if len(placement.keys) < len(part):
            for state, keys in flights.drop([*part[len(placement.keys) :], *load.keys]).items():
                self._give_up(state, keys, "budget")
                self._end_wait(state)
            load.keys.clear()
        if not placement.keys:
            return
        slots = list(table.apply(placement, load.state.uses.came).values())
        if placement.victims:
            self._observer.on_event(BlocksEvicted(PRIMARY, placement.victims))
        flights.depart(placement.keys, slots)
        queue.speed.begin(len(slots), now)
        if not queue.guard.load(placement.keys, slots, load.state.context):
            queue.landed += len(slots)
            self._fail(queue.guard, placement.keys, slots)

    def _place(self, keys: Sequence[OffloadKey]) -> Placement:
        try:
            return self._table.plan(keys)
        except KeyFormatError:  # a tier claims to hold what cannot be a key here
            return Placement([], [], len(keys))

    def note_polled(self, now: float) -> None:
        """All tiers were asked for results, and `land` has taken them in."""
        for queue in self._queues:
            queue.note_polled(now, self._pace.looks_often)

    def reconsider(self, state: RequestState, now: float) -> None:
        """Let a request go on with what has arrived if computing the rest takes less than waiting for it still does."""
        if not state.awaiting or not self._pace.is_known:
            return
        ready_in = [
            queue.speed.seconds(queue.num_up_to(state), now)
            for queue in self._queues
            if queue.guard.index in state.plans.asked
        ]
        outlook = self._pace.outlook(now, state)
        saved = len(state.awaiting) * state.plans.block_seconds
        if ready_in and outlook.cost(max(ready_in)) > outlook.gain(saved):
            rest = list(state.awaiting)
            self._flights.leave(state)
            self._give_up(state, rest, "slower")
            self._end_wait(state)

    def land(self, guard: TierGuard, job: Job) -> None:
        """Take in the end of a promotion job: good blocks become ready, the rest misses for those who waited."""
        table, queue = self._table, self._queues[guard.index]
        successful = job.successful
        queue.landed += len(job.slots)
        queue.arrived += len(successful)
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
        if not table.num_free and (unwanted := self._flights.unwanted(arrived)):
            # Nobody waits for them any more. A full memory has better blocks to keep.
            self._flights.abandon(unwanted)
            table.remove(unwanted)
            arrived = [key for key in arrived if key not in unwanted]
        for state, theirs in self._flights.land(keys, slots).items():
            self._leases.hold(state, theirs)
            state.plans.sources.update(dict.fromkeys(theirs, guard.name))
            self._end_wait(state)
        if arrived:
            self._observer.on_event(BlocksStored(arrived, guard.name))
        if bad_keys:
            self._fail(guard, bad_keys, bad_slots, is_final=not job.is_cancelled)

    def _fail(
        self, guard: TierGuard, keys: Sequence[OffloadKey], slots: Sequence[int], *, is_final: bool = True
    ) -> None:
        """Make blocks that did not arrive misses; not final: who has come to wait since may ask for them again."""
        for state, theirs in self._flights.land(keys, slots).items():
            if is_final:
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
        plans.asked.clear()
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
