"""What a lookup answers when the block is not ready in the primary tier, and when waiting ends."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvtier.clock import Clock
from kvtier.events import Observer, RequestGaveUp
from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable
from kvtier.tiering.flights import Promotions
from kvtier.tiering.guarded_tier import TierGuard
from kvtier.tiering.requests import RequestState, Wait
from kvtier.tiering.settings import TieringSettings
from kvtier.types import LookupResult

_HIT, _MISS = LookupResult.HIT, LookupResult.MISS
_PENDING, _RETRY = LookupResult.HIT_PENDING, LookupResult.RETRY
_GAVE_UP = Wait.GAVE_UP


class Lookups:
    """Asks the tiers, and ends every wait."""

    def __init__(
        self,
        table: BlockTable,
        guards: Sequence[TierGuard],
        promotions: Promotions,
        settings: TieringSettings,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._table = table
        self._guards = guards
        self._promotions = promotions
        self._settings = settings
        self._clock = clock
        self._observer = observer

    def resolve(self, state: RequestState, key: OffloadKey, filling: bool) -> LookupResult:
        """Answer for a block that is not ready.

        Args:
            filling: it is on its way into the primary tier, from the device or a tier.
        """
        answer = self.find(state, key, filling)
        return answer if answer is not _MISS and self.may_wait(state) else _MISS

    def find(self, state: RequestState, key: OffloadKey, filling: bool) -> LookupResult:
        """Answer as `resolve`, were there no deadline."""
        if filling:
            answer = _MISS if key in self._promotions.late else _PENDING
            if key not in self._promotions.flights:
                state.stores.add(key)
        elif state.tiers:
            answer = self._ask_tiers(state, key)
        else:
            return _MISS
        return _MISS if state.wait is _GAVE_UP or key in state.denied else answer

    def find_prefix(self, state: RequestState, keys: Sequence[OffloadKey]) -> tuple[int, int]:
        """Return how many of `keys` are ready, and how many are not yet, up to the first miss; they join the scan."""
        get_slot, filling = self._table.slot_of.get, self._table.filling
        num_pending, num_found = 0, len(keys)
        for index, key in enumerate(keys):
            slot = get_slot(key)
            if slot is None or slot in filling:
                answer = self.find(state, key, slot is not None)
                if answer is _MISS or not (num_pending or self.may_wait(state)):
                    num_found = index
                    break
                num_pending += 1
        state.scan += keys[: num_found + 1]
        return num_found - num_pending, num_pending

    def may_wait(self, state: RequestState) -> bool:
        """The request is deferred now, if its deadline has not passed; return whether it is."""
        now = self._clock()
        if state.deferred_since is None:
            state.deferred_since = now
        return state.waited + (now - state.deferred_since) <= state.deadline or not self.expire(state, now)

    def _ask_tiers(self, state: RequestState, key: OffloadKey) -> LookupResult:
        """The first tier that has the block wins; one that does not know yet delays nobody else's hit."""
        if state.wait is _GAVE_UP:
            return _MISS
        retry = False
        for index in state.tiers:
            if state.failed and (index, key) in state.failed:
                continue
            answer = self._guards[index].lookup(key, state.context)
            if answer is _HIT:
                state.found[key] = index
                if state.unresolved:
                    state.unresolved.discard(key)
                return _PENDING
            if (answer is _RETRY or answer is _PENDING) and index not in state.silent:
                retry = self._may_probe(state, index, key) or retry
        if not retry:
            return _MISS
        state.unresolved.add(key)
        return _RETRY

    def _may_probe(self, state: RequestState, index: int, key: OffloadKey) -> bool:
        """Return whether the request waits for this tier's answer; if not, only answers count from now on."""
        now, patience = self._clock(), self._guards[index].patience
        state.probing.add(index)
        waited = now - state.probing_since.setdefault(index, now)
        num_unresolved = max(state.num_unresolved, len(state.unresolved) + 1)
        if waited <= patience.seconds and waited <= self._recomputing(num_unresolved):
            patience.ask(key, state.context)
            return True
        state.silent.add(index)
        if waited > patience.seconds:
            patience.give_up()
        self._observer.on_event(RequestGaveUp(state.context.req_id, "probe", 0))
        return False

    def _recomputing(self, num_blocks: int) -> float:
        """Return the seconds that computing so many blocks would take; without end if the engine's rate is unknown."""
        settings = self._settings
        if not settings.prefill_rate or not settings.tokens_per_block:
            return math.inf
        return num_blocks * settings.tokens_per_block / settings.prefill_rate

    def shorten_deadline(self, state: RequestState, num_blocks: int) -> None:
        """`num_blocks` more are awaited: wait no longer than recomputing all that this attempt awaited would take."""
        state.num_awaited += num_blocks
        if state.num_awaited:
            state.deadline = min(self._settings.load_deadline, self._recomputing(state.num_awaited))

    def expire(self, state: RequestState, now: float) -> bool:
        """Make a request whose time is over give up; what has arrived stays its hit. Return whether it did."""
        if state.deferred_since is None or state.time_waited(now) <= state.deadline:
            return False
        self._observer.on_event(RequestGaveUp(state.context.req_id, "deadline", len(state.awaiting)))
        filling = self._table.filling
        stuck = [key for key in state.stores if self._table.slot_of.get(key) in filling]
        self._promotions.leave(state, late=True)
        self._promotions.late.update(stuck)
        state.stop_waiting(now)
        state.wait = Wait.GAVE_UP
        if state.lease:
            state.lease_expires = now + self._settings.lease_timeout
        return True

    def deny(self, state: RequestState, keys: Sequence[OffloadKey]) -> None:
        """From now on these keys, which no plan could place, are misses for this request."""
        if keys:
            state.denied.update(keys)
            self._observer.on_event(RequestGaveUp(state.context.req_id, "budget", len(keys)))
