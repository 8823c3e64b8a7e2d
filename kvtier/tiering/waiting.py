"""Limits how long requests wait for tiers. No other module decides a load deadline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvtier.clock import Clock
from kvtier.events import Observer, RequestGaveUp, RequestWaited, WaitOutcome
from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable
from kvtier.tiering.flights import Flights
from kvtier.tiering.guarded_tier import TierGuard
from kvtier.tiering.leases import Leases
from kvtier.tiering.pace import Pace
from kvtier.tiering.requests import RequestState
from kvtier.tiering.settings import TieringSettings

MAX_ENDED = 2048
"""Most keys that one step releases because deadlines have passed, plus at most those of one request."""
UNKNOWN_SECONDS = 2.0
"""Longest wait of a request without a `load_deadline` while the time to compute its blocks is not known."""


class Waiting:
    """Starts, stops and ends the waits of requests.

    The clock of an attempt runs only while a tier causes the wait: from the first deferred answer until the request
    awaits nothing more. A preemption begins a new attempt.
    """

    def __init__(
        self,
        table: BlockTable,
        guards: Sequence[TierGuard],
        flights: Flights,
        leases: Leases,
        pace: Pace,
        settings: TieringSettings,
        clock: Clock,
        observer: Observer,
    ) -> None:
        """Args: table: of the primary tier; guards: of the secondary tiers."""
        self._table, self._guards, self._flights, self._leases = table, guards, flights, leases
        self._pace = pace
        self._settings, self._clock, self._observer = settings, clock, observer

    def longest_wait(self, computing: float) -> float:
        """Return the load deadline: the most seconds that an attempt may wait.

        It is the predicted time to compute the blocks, or `load_deadline` if that is shorter. While the time is not
        known, it is `load_deadline` or, without one, `UNKNOWN_SECONDS`. No other place decides a load deadline.

        Args:
            computing: predicted seconds; 0 if not known yet.
        """
        bound = self._settings.load_deadline
        longest = computing or UNKNOWN_SECONDS
        return longest if bound is None else min(bound, longest) if computing else bound

    # -- in a lookup --------------------------------------------------------------------------------------

    def defer(self, state: RequestState) -> bool:
        """Let the request wait, from now on if it did not yet; return False if its deadline has passed."""
        wait, now = state.wait, self._clock()
        if wait.since is None:
            wait.since, wait.deadline = now, self.longest_wait(wait.computing)
        return not (wait.is_over(now) and self._end_if_late(state, now))

    def may_probe(self, state: RequestState, index: int, key: OffloadKey) -> bool:
        """Return whether the request waits for a tier's answer about `key`; after False it waits for it no more."""
        wait, now, patience = state.wait, self._clock(), self._guards[index].patience
        wait.probing.add(index)
        waited = now - wait.probing_since.setdefault(index, now)
        num_unresolved = max(wait.num_unresolved, len(state.scan.unresolved) + 1)
        if waited <= patience.seconds and not self._is_computed_in(waited, num_unresolved):
            patience.ask(key, state.context)
            return True
        wait.silent.add(index)
        if waited > patience.seconds:
            patience.give_up()
        self._observer.on_event(RequestGaveUp(state.context.req_id, "probe", 0))
        return False

    def _is_computed_in(self, seconds: float, num_blocks: int) -> bool:
        """Return whether `num_blocks` are computed in less than `seconds`; False if the engine's rate is a guess."""
        return self._pace.has_rate and self._pace.seconds(num_blocks) < seconds

    # -- in a step ----------------------------------------------------------------------------------------

    def end_scan(self, state: RequestState) -> None:
        """Forget unanswered tiers that this step's scan did not have to ask again."""
        wait = state.wait
        if wait.probing_since:
            for index in wait.probing_since.keys() - wait.probing:
                del wait.probing_since[index]
            num_unresolved = max(wait.num_unresolved, len(state.scan.unresolved))
            wait.num_unresolved = num_unresolved if wait.probing_since else 0
        wait.probing.clear()

    def expect(self, state: RequestState, computing: float, idle_in: float) -> None:
        """Set the deadline of a request that waits for more blocks.

        Args:
            computing: seconds that these take to compute. All blocks that the attempt has awaited count.
            idle_in: as in `Outlook`.
        """
        wait = state.wait
        if wait.since is None:  # it was looked up some steps ago, and nothing was planned then
            wait.since = self._clock()
        wait.computing += computing
        wait.deadline = self.longest_wait(wait.computing + idle_in if wait.computing else 0.0)

    def check(self, states: Iterable[RequestState], now: float) -> None:
        """End the waits and leases whose time is over, oldest request first. Those beyond `MAX_ENDED` end later."""
        left = MAX_ENDED
        for state in states:
            wait, expires = state.wait, state.lease.expires
            if wait.since is None and not wait.probing_since and expires is None:
                continue
            if state.awaiting and expires is None and not wait.is_over(now) and not wait.probing_since:
                continue  # so it is with most requests at most steps
            held = len(state.awaiting) + len(state.lease.slots)
            if self._check(state, now, left > 0):
                left -= held

    def _check(self, state: RequestState, now: float, may_end: bool) -> bool:
        """End the request's wait and lease if their time is over; return whether either was.

        Stops its clock if it awaits nothing and looked nothing up in this step.
        """
        wait = state.wait
        ended = wait.since is not None and may_end and self._end_if_late(state, now)
        if not state.scan.keys:
            wait.probing_since.clear()
            if wait.since is not None and not state.awaiting:
                self.stop(state, now)
        expires = state.lease.expires
        if expires is not None and may_end and now >= expires:
            self._leases.release(state)
            ended = True
        return ended

    def stop(self, state: RequestState, now: float) -> None:
        """Stop the clock: no tier causes the wait any more."""
        wait = state.wait
        if wait.since is not None:
            wait.waited += now - wait.since
            wait.since = None

    def settle(self, state: RequestState, outcome: WaitOutcome) -> None:
        """Stop the clock, and report how long the request has waited since the last report, if it has."""
        wait = state.wait
        if wait.since is not None:
            self.stop(state, self._clock())
        if wait.waited > wait.reported:
            self._observer.on_event(RequestWaited(state.context.req_id, outcome, wait.waited - wait.reported))
            wait.reported = wait.waited

    def _end_if_late(self, state: RequestState, now: float) -> bool:
        """Make a request whose deadline has passed give up; return whether it did. Arrived blocks stay its hits."""
        wait = state.wait
        if not wait.is_over(now):
            return False
        self._observer.on_event(RequestGaveUp(state.context.req_id, "deadline", len(state.awaiting)))
        get_slot, filling = self._table.slot_of.get, self._table.filling
        self._flights.strand(state, [key for key in state.scan.device_stores if get_slot(key) in filling])
        self.stop(state, now)
        wait.gave_up = True
        if state.lease.slots:
            self._leases.start_timeout(state, now)
        return True

    def begin_attempt(self, state: RequestState) -> None:
        """Allow the request to wait anew: it was preempted, or the cache was reset."""
        self.settle(state, WaitOutcome.CANCELLED)
        wait = state.wait
        wait.gave_up, wait.waited, wait.reported, wait.computing = False, 0.0, 0.0, 0.0
        wait.silent.clear()
        wait.probing_since.clear()
