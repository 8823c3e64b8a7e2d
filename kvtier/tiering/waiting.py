"""How long requests wait for tiers. Nothing else knows a load deadline."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvtier.clock import Clock
from kvtier.events import Observer, RequestGaveUp
from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable
from kvtier.tiering.flights import Flights
from kvtier.tiering.guarded_tier import TierGuard
from kvtier.tiering.leases import Leases
from kvtier.tiering.requests import RequestState
from kvtier.tiering.settings import TieringSettings


class Waiting:
    """Starts, stops and ends the waits of requests.

    The clock of an attempt runs only while a tier causes the wait: from the first deferred answer until nothing is
    awaited any more. A preemption begins a new attempt.
    """

    def __init__(
        self,
        table: BlockTable,
        guards: Sequence[TierGuard],
        flights: Flights,
        leases: Leases,
        settings: TieringSettings,
        clock: Clock,
        observer: Observer,
    ) -> None:
        """Args: table: of the primary tier; guards: of the secondary tiers."""
        self._table, self._guards, self._flights, self._leases = table, guards, flights, leases
        self._settings, self._clock, self._observer = settings, clock, observer

    def longest_wait(self, num_blocks: int) -> float:
        """Return the seconds that an attempt may wait for `num_blocks` blocks, 0 if it is not known yet for how many.

        This is the only place that decides a load deadline: `load_deadline`, or the predicted time to compute the
        blocks if that is shorter.
        """
        longest = self._settings.load_deadline
        return min(longest, self._recomputing(num_blocks)) if num_blocks else longest

    def _recomputing(self, num_blocks: int) -> float:
        """Return the seconds that computing so many blocks takes; infinity if the engine's rate is unknown."""
        settings = self._settings
        if not settings.prefill_rate or not settings.tokens_per_block:
            return math.inf
        return num_blocks * settings.tokens_per_block / settings.prefill_rate

    # -- in a lookup --------------------------------------------------------------------------------------

    def defer(self, state: RequestState) -> bool:
        """Let the request wait from now on, if it does not yet and its deadline allows; return whether it waits."""
        wait, now = state.wait, self._clock()
        if wait.since is None:
            wait.since, wait.deadline = now, self.longest_wait(wait.num_awaited)
        return wait.waited + (now - wait.since) <= wait.deadline or not self._end_if_late(state, now)

    def may_probe(self, state: RequestState, index: int, key: OffloadKey) -> bool:
        """Return whether the request waits for a tier to answer about `key`; after False it waits for it no more."""
        wait, now, patience = state.wait, self._clock(), self._guards[index].patience
        wait.probing.add(index)
        waited = now - wait.probing_since.setdefault(index, now)
        num_unresolved = max(wait.num_unresolved, len(state.scan.unresolved) + 1)
        if waited <= patience.seconds and waited <= self._recomputing(num_unresolved):
            patience.ask(key, state.context)
            return True
        wait.silent.add(index)
        if waited > patience.seconds:
            patience.give_up()
        self._observer.on_event(RequestGaveUp(state.context.req_id, "probe", 0))
        return False

    # -- in a step ----------------------------------------------------------------------------------------

    def end_scan(self, state: RequestState) -> None:
        """Forget the probes that this step's scan did not ask again."""
        wait = state.wait
        if wait.probing_since:
            for index in wait.probing_since.keys() - wait.probing:
                del wait.probing_since[index]
            num_unresolved = max(wait.num_unresolved, len(state.scan.unresolved))
            wait.num_unresolved = num_unresolved if wait.probing_since else 0
        wait.probing.clear()

    def expect(self, state: RequestState, num_blocks: int) -> None:
        """The request waits for `num_blocks` more; the deadline follows from all that this attempt has awaited."""
        wait = state.wait
        wait.num_awaited += num_blocks
        wait.deadline = self.longest_wait(wait.num_awaited)

    def check(self, state: RequestState, now: float) -> None:
        """End the wait and the lease if their time is over; stop the clock if nothing was asked in this step."""
        wait = state.wait
        if wait.since is not None:
            self._end_if_late(state, now)
        if not state.scan.keys:
            wait.probing_since.clear()
            if wait.since is not None and not state.awaiting:
                self.stop(state, now)
        expires = state.lease.expires
        if expires is not None and now >= expires:
            self._leases.release(state)

    def stop(self, state: RequestState, now: float) -> None:
        """Stop the clock: no tier causes the wait any more."""
        wait = state.wait
        if wait.since is not None:
            wait.waited += now - wait.since
            wait.since = None

    def _end_if_late(self, state: RequestState, now: float) -> bool:
        """Make a request whose deadline has passed give up; what has arrived stays its hit. Return whether it did."""
        wait = state.wait
        if wait.since is None or wait.waited + (now - wait.since) <= wait.deadline:
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
        wait = state.wait
        wait.gave_up, wait.since, wait.waited, wait.num_awaited = False, None, 0.0, 0
        wait.silent.clear()
        wait.probing_since.clear()
