"""Carries out plans of promotions, from a tier's queue of loads to the blocks that arrive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

from kvtier.clock import Clock
from kvtier.errors import KeyFormatError
from kvtier.events import BlocksEvicted, BlocksStored, Observer, RequestGaveUp
from kvtier.keys import OffloadKey
from kvtier.primary.retention import Retention
from kvtier.primary.table import BlockTable, Placement
from kvtier.primary.transit import Declining
from kvtier.secondary.jobs import Job
from kvtier.tiering.estimate import Outlook, Turnover
from kvtier.tiering.flights import Flights
from kvtier.tiering.guarded_tier import TierGuard
from kvtier.tiering.leases import HandedOver, Leases
from kvtier.tiering.load_queue import LoadQueue, QueuedLoad
from kvtier.tiering.outline import Outline, make_outline
from kvtier.tiering.pace import Pace
from kvtier.tiering.planning import Holdings, PromotionPlan, Prospect, plan_promotions
from kvtier.tiering.requests import PRIMARY, RequestState, Scan, arrival
from kvtier.tiering.running import RunningRequests
from kvtier.tiering.waiting import MAX_ENDED, Waiting
from kvtier.types import Admission

MAX_PLANNED = 512
"""A step plans a window of this many keys per request until it has planned so many; a request awaits about as many. So
no call takes long for long prompts."""

MAX_ASKED = 3 * MAX_PLANNED // 2
"""Most blocks that one tier is asked for per step, plus at most one part: choosing their slots takes long."""

EARLY_FREE = 0.6
"""Share of the budget of promotions that is kept free for requests whose turn comes soon."""

USUAL_BLOCKS = 64
"""Blocks for which loading and computing are compared then."""

MAX_RECONSIDERED = 64
"""Number of the oldest waiting requests that every step reconsiders, and of the others that it reconsiders in turn."""

_PLANNED_PER_LOOK = 4
"""Keys that are planned in the time in which a request is looked at whose turn is too far."""

_OUTLINED_PER_PLANNED = 8
"""Keys of a scan that are put in order in the time in which one key is planned."""


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
        retention: Retention,
        running: RunningRequests,
        block_bytes: int,
        clock: Clock,
        observer: Observer,
    ) -> None:
        """Args: table, retention: of the primary tier; guards: of the secondary tiers."""
        self._table, self._retention, self._running = table, retention, running
        self._queues = [LoadQueue(guard, block_bytes) for guard in guards]
        self._flights, self._leases, self._waiting, self._pace = flights, leases, waiting, pace
        self._clock, self._observer = clock, observer
        self._turnover = Turnover(table.num_slots)
        self._num_reconsidered = 0
        self._unfinished: set[RequestState] = set()
        """Requests whose outlines have keys left to plan."""

    # -- plans --------------------------------------------------------------------------------------------

    def plan(self, scanned: Sequence[RequestState]) -> None:
        """Plan at the end of a step, oldest request first, for requests with a new scan or an unfinished outline.

        A step plans up to about `2 * MAX_PLANNED` keys, or more if the usable prefix of a request is longer. The rest
        waits for the next step.
        """
        for state in scanned:
            asks = state.may_wait and (state.scan.found or state.wait.since is not None)
            state.plans.scan = state.scan if asks and state.scan.keys else None
            if not asks:
                state.plans.outline = None
        states = sorted({*self._unfinished, *scanned}, key=arrival)
        self._unfinished.clear()
        left = MAX_PLANNED
        for position, state in enumerate(states):
            if left <= 0:
                self._unfinished.update(states[position:])
                break
            if state.plans.scan is not None:
                left -= self._begin(state, state.plans.scan)
            outline = state.plans.outline
            if outline is None or not state.may_wait or (outline.is_done and state.awaiting):
                continue
            if len(state.awaiting) < MAX_PLANNED:
                before = outline.num_planned
                # A whole window, whatever is left: a few blocks are not worth a tier's latency, and those behind
                # them would be given up with them.
                self._promote(state, outline, MAX_PLANNED)
                left -= max(_PLANNED_PER_LOOK, outline.num_planned - before)
            if not outline.is_done:
                self._unfinished.add(state)

    def _begin(self, state: RequestState, scan: Scan) -> int:
        """Make the outline of a new scan, behind what is leased or awaited already.

        Returns:
            The cost, as the number of keys that could be planned in the same time.
        """
        plans = state.plans
        former, plans.scan = plans.outline, None
        if len(state.lease.slots) + len(state.awaiting) != plans.num_held:
            former = None  # some of the blocks held then were lost
        if former is not None and former.is_repeated_by(scan.keys):
            return 0
        outline = plans.outline = make_outline(scan.keys, scan.found, scan.unresolved, state.context)
        if former is not None and outline.continues(former):
            outline.num_planned = outline.num_secured = min(former.num_secured, len(outline.order))
        return len(scan.keys) // _OUTLINED_PER_PLANNED

    def _promote(self, state: RequestState, outline: Outline, most: int) -> None:
        flights, now = self._flights, self._clock()
        outlook = self._pace.outlook(now, state)
        room = self._leases.room(len(flights))
        prospect = self._prospect(state, outlook, now)
        if prospect is not None and self._is_too_early(state, outline, prospect, room, now):
            self._waiting.stop(state, now)  # no tier causes this wait
            return
        holdings = Holdings(self._table, room, flights.late, self._leases.held, flights.queued.keys())
        plan = plan_promotions(state, outline, holdings, prospect, most)
        outline.num_planned = plan.num_planned
        if plan.waits or state.awaiting or not outline.is_done:  # what comes later must not push these hits out
            self._leases.hold(state, plan.hits)
            flights.join(plan.joins, state)
            self._waiting.expect(state, plan.computing, outlook.idle_in)
            self._note_plan(state, plan)
            for index, keys in plan.by_tier.items():
                flights.queue(keys, state)
                self._queues[index].add(keys, state, plan.gain, now + plan.computing)
        outline.note_held(state.lease.slots, state.awaiting)
        state.plans.num_held = len(state.lease.slots) + len(state.awaiting)
        self._give_up(state, plan.denied, "budget")
        if plan.declined:
            self._give_up(state, plan.declined, "slower")
            self._probe(state, plan.declined, outline)
        if not plan.waits and outline.is_done and outline.is_certain and not state.awaiting:
            self._waiting.stop(state, now)
            if outline.found:
                # No plan loads keys that the engine looked up before it started over: it must not wait for them.
                state.plans.denied.update(outline.found.keys() - set(outline.order))
        if state.awaiting:
            state.lease.expires = None
        elif state.lease.slots and state.lease.expires is None:
            self._leases.start_timeout(state, now)

    def _is_too_early(self, state: RequestState, outline: Outline, prospect: Prospect, room: int, now: float) -> bool:
        """Return whether memory has better use for its slots until the request's turn is nearer.

        The request is planned at the latest when, as it seems now, its turn comes.
        """
        is_short = room < EARLY_FREE * self._leases.budget
        if state.awaiting or not (
            prospect.displaces_more(self._turnover.seconds) or (is_short and prospect.is_early(len(outline.order)))
        ):
            return False
        plans = state.plans
        if plans.postponed_until is None:
            plans.postponed_until = now + prospect.outlook.turn_in
        return now < plans.postponed_until

    @property
    def declining(self) -> Declining:
        """What becomes of new blocks that the policy ranks below everything that memory holds.

        Where a tier brings back sooner than computed what gives way, nothing is refused for the sake of what memory
        holds. What is refused never comes to that tier, whose room it would have had far longer than memory's.
        """
        computing = self._pace.seconds(USUAL_BLOCKS) if self._pace.is_known else 0.0
        is_quick = any(
            queue.guard.usable
            and queue.guard.admission is Admission.ALWAYS
            and queue.speed.is_measured
            and queue.speed.latency + USUAL_BLOCKS / queue.speed.bandwidth < computing
            for queue in self._queues
        )
        return Declining.IN_TRANSIT if is_quick else Declining.REFUSED

    def note_hits(self, num_blocks: int) -> None:
        """Note that a request loads blocks that memory held before it came."""
        self._turnover.note_load(num_blocks, self._pace.computed)

    def _note_plan(self, state: RequestState, plan: PromotionPlan) -> None:
        num_awaited = len(plan.joins) + sum(map(len, plan.by_tier.values()))
        if num_awaited:
            state.plans.asked.update(plan.by_tier)
            state.plans.block_seconds = plan.computing / num_awaited

    def _prospect(self, state: RequestState, outlook: Outlook, now: float) -> Prospect | None:
        """Return what is known about loading and computing; None if the number of tokens per block is not known."""
        if not self._pace.is_known:
            return None
        ready_in = {queue.guard.index: queue.speed.seconds(queue.num_queued, now) for queue in self._queues}
        per_block = {queue.guard.index: 1 / queue.speed.bandwidth for queue in self._queues}
        waits_for = self._waits_for(state, now)
        return Prospect(*self._pace.block_seconds(state), ready_in, per_block, outlook, waits_for)

    def _waits_for(self, state: RequestState, now: float) -> float:
        """Return the seconds until what the request awaits has arrived; 0 if it awaits nothing."""
        if not state.awaiting:
            return 0.0
        asked, longest = state.plans.asked, 0.0
        for queue in self._queues:
            if queue.guard.index in asked:
                longest = max(longest, queue.speed.seconds(queue.num_up_to(state), now))
        return longest

    def _give_up(self, state: RequestState, keys: Sequence[OffloadKey], reason: str) -> None:
        """Make `keys` misses for this request from now on: they do not fit, or are computed sooner than loaded."""
        if keys:
            state.plans.denied.update(keys)
            self._observer.on_event(RequestGaveUp(state.context.req_id, reason, len(keys)))

    # -- loads --------------------------------------------------------------------------------------------

    def send(self) -> None:
        """Cancel loads that no request waits for, and ask every tier for as much as keeps it busy."""
        for queue in self._queues:
            if self._flights.unwanted_slots:
                queue.guard.cancel_unwanted(self._flights.unwanted_slots)
            if queue.loads:
                now = self._clock()
                queue.arrange(self._flights.queued, now)
                most = queue.num_queued - MAX_ASKED
                for load in queue.loads:
                    while load.keys and queue.num_queued > most and queue.has_room(min(load.part, len(load.keys))):
                        self._ask(queue, load, now)
                    if load.keys:
                        break
                queue.note_sent()

    def _ask(self, queue: LoadQueue, load: QueuedLoad, now: float) -> None:
        """Ask a tier for the next part of a load."""
        table, flights = self._table, self._flights
        part = queue.take(load)
        if not all(map(flights.queued.__contains__, part)):
            part = [key for key in part if key in flights.queued]
        if not table.slot_of.isdisjoint(part):
            held = table.slot_of.held(part)  # stored by another request since: the next scan finds them
            flights.drop(held)
            part = [key for key in part if key in flights.queued]
        self._retention.serve(table, load.state.uses)
        placement = self._place(part)
        if len(placement.keys) < len(part):
            for state, keys in flights.drop([*part[len(placement.keys) :], *load.keys]).items():
                self._give_up(state, keys, "budget")
                self._end_wait(state)
            load.keys.clear()
        if not placement.keys:
            return
        slots = table.apply(placement, load.state.uses.came)
        if placement.victims:
            self._observer.on_event(BlocksEvicted(PRIMARY, placement.victims))
        flights.depart(placement.keys, slots)
        self._submit(queue, placement.keys, slots, load.state, now)

    def _probe(self, state: RequestState, declined: Sequence[OffloadKey], outline: Outline) -> None:
        """Measure a tier again that seems too slow: read a few blocks of a request that computes them anyway.

        Nobody waits for these blocks, and they do not enter the cache. If loads are queued, they measure the tier, and
        a probe would only delay them.
        """
        index = outline.found[declined[0]]
        queue, now = self._queues[index], self._clock()
        keys = [key for key in declined[: queue.least_part] if outline.found[key] == index]
        if queue.num_queued or not queue.speed.needs_probe(len(keys)):
            return
        self._retention.serve(self._table, state.uses)
        spared = frozenset(outline.order)
        num_needed = max(0, len(keys) - self._table.num_free)
        while self._running.put_in_order(self._table.pick_victims(num_needed, (), (spared,))):
            pass
        slots, victims = self._table.set_aside(len(keys), spared)
        if victims:
            self._observer.on_event(BlocksEvicted(PRIMARY, victims))
        if slots:
            self._submit(queue, keys[: len(slots)], slots, state, now)

    def _submit(
        self, queue: LoadQueue, keys: Sequence[OffloadKey], slots: list[int], state: RequestState, now: float
    ) -> None:
        queue.speed.begin(len(slots), now)
        if not queue.guard.hand_over(queue.guard.open_job(keys, slots, state.context, is_promotion=True)):
            queue.landed += len(slots)
            self._fail(queue.guard, keys, slots)

    def _place(self, keys: Sequence[OffloadKey]) -> Placement:
        table = self._table
        try:
            placement = table.plan(keys, all_new=True)
            while self._running.put_in_order(placement.victims):
                placement = table.plan(keys, all_new=True)
            return placement
        except KeyFormatError:  # a tier answered HIT for a key of a wrong length or type
            return Placement([], [], len(keys))

    def note_polled(self, now: float) -> None:
        """Measure the tiers' load speeds. The caller has polled all tiers and passed the ended loads to `land`."""
        for queue in self._queues:
            queue.note_polled(now, self._pace.looks_often)

    def reconsider(self, waiting: Sequence[RequestState], now: float) -> None:
        """Let requests go on with the blocks that have arrived, if computing the rest is faster than waiting for it.

        Args:
            waiting: requests that await blocks, oldest first. If there are more than `MAX_RECONSIDERED`, a step looks
                at the oldest ones and at some of the others.
        """
        if not self._pace.is_known:
            return
        turn = self._num_reconsidered = (self._num_reconsidered + MAX_RECONSIDERED) % max(1, len(waiting))
        others = waiting[MAX_RECONSIDERED:]
        left = MAX_ENDED
        for state in (*waiting[:MAX_RECONSIDERED], *others[turn : turn + MAX_RECONSIDERED]):
            if left > 0:
                left -= self._reconsider(state, now)

    def _reconsider(self, state: RequestState, now: float) -> int:
        """End the request's wait if computing is faster. Return how many blocks it gave up."""
        outlook = self._pace.outlook(now, state)
        saved = len(state.awaiting) * state.plans.block_seconds
        if outlook.cost(self._waits_for(state, now)) > outlook.gain(saved):
            rest = list(state.awaiting)
            self._flights.leave(state)
            self._give_up(state, rest, "slower")
            self._end_wait(state)
            return len(rest)
        return 0

    def land(self, guard: TierGuard, job: Job) -> None:
        """Take in a load job that has ended. Good blocks become ready; the others become misses for their waiters."""
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
        held_in = table.slot_of.get_all(keys)
        arrived = [key for key, slot, held in zip(keys, slots, held_in, strict=True) if slot == held]
        if not table.num_free and (unwanted := self._flights.unwanted(arrived)):
            # No request waits for them any more. A full memory has better blocks to keep.
            self._flights.abandon(unwanted)
            table.remove(unwanted)
            arrived = [key for key in arrived if key not in unwanted]
        for state, theirs in self._flights.land(keys, slots).items():
            state.plans.sources.update(dict.fromkeys(theirs, guard.name))
            self._leases.hold(state, theirs)
            self._end_wait(state)
        if arrived:
            self._observer.on_event(BlocksStored(arrived, guard.name))
        if bad_keys:
            self._fail(guard, bad_keys, bad_slots, is_final=not job.is_cancelled)

    def _fail(
        self, guard: TierGuard, keys: Sequence[OffloadKey], slots: Sequence[int], *, is_final: bool = True
    ) -> None:
        """Make blocks that did not arrive misses for their waiters.

        Args:
            is_final: False for a cancelled job. Requests that began to wait after that may ask the tier again.
        """
        for state, theirs in self._flights.land(keys, slots).items():
            self._drop_outline(state)
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
        """Detach in-flight blocks that no request waits for or may wait for, so that other slots can store them."""
        abandoned = self._flights.abandoned(keys)
        self._flights.abandon(abandoned)
        self._table.remove(abandoned)

    def hand_over(self, state: RequestState, keys: list[OffloadKey]) -> HandedOver | None:
        """End the request's lease; see `Leases.hand_over`."""
        return self._leases.hand_over(state, keys) if state.lease.slots else None

    def lose(self, states: Iterable[RequestState], keys: Set[OffloadKey]) -> None:
        """End the leases of `keys`, which the table has forgotten: whoever held them asks for them once more."""
        for state in states:
            if self._leases.lose(state, keys):
                self._drop_outline(state)

    def let_go(self, state: RequestState) -> None:
        """End all waits of the request, and its lease. If it is over, nothing is planned for it any more."""
        if state.finished:
            self._unfinished.discard(state)
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
        plans.postponed_until = None
        self._drop_outline(state)

    def _drop_outline(self, state: RequestState) -> None:
        """Drop the request's scan and outline, because its lookups would have other answers now."""
        state.plans.scan = state.plans.outline = None

    def forget_sources(self, state: RequestState) -> None:
        """Forget which tiers blocks came from: the cache was reset."""
        state.plans.sources.clear()

    def is_as_planned(self, state: RequestState, first_key: OffloadKey, shortest: int) -> bool:
        """Return whether a scan from `first_key` on would be deferred, because planned blocks are on their way.

        Args:
            shortest: the answer is False if the planned scan had fewer keys than this in any KV group.
        """
        scan, outline = state.plans.scan, state.plans.outline
        if not state.may_wait:
            return False
        if scan is not None:
            return not scan.unresolved and scan.keys[0] == first_key and shortest <= 1
        if outline is None or not outline.is_certain or outline.shortest_group < shortest:
            return False
        return bool(state.awaiting or not outline.is_done) and outline.order[0] == first_key

    def check_invariants(self, requests: Iterable[RequestState]) -> None:
        """Raise InvariantError if flights, leases and requests contradict each other."""
        self._flights.check_invariants(self._table)
        self._leases.check_invariants(requests)
