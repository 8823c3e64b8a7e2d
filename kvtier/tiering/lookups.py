"""Answers lookups of blocks that are not ready in the primary tier."""

from __future__ import annotations

from collections.abc import Sequence

from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable
from kvtier.tiering.flights import Flights
from kvtier.tiering.guarded_tier import TierGuard
from kvtier.tiering.requests import RequestState, Scan
from kvtier.tiering.waiting import Waiting
from kvtier.types import LookupResult

_HIT, _MISS = LookupResult.HIT, LookupResult.MISS
_PENDING, _RETRY = LookupResult.HIT_PENDING, LookupResult.RETRY


class Lookups:
    """Asks the secondary tiers, and keeps their answers for the plan at the end of the step."""

    def __init__(self, table: BlockTable, guards: Sequence[TierGuard], flights: Flights, waiting: Waiting) -> None:
        """Args: table: of the primary tier; guards: of the secondary tiers."""
        self._table, self._guards, self._flights, self._waiting = table, guards, flights, waiting

    def resolve(self, state: RequestState, key: OffloadKey, filling: bool) -> LookupResult:
        """Answer for a block that is not ready.

        Args:
            filling: whether it is on its way into the primary tier, from the device or from another tier.
        """
        answer = self._find(state, key, filling)
        return answer if answer is not _MISS and self._waiting.defer(state) else _MISS

    def _find(self, state: RequestState, key: OffloadKey, filling: bool) -> LookupResult:
        """Answer as `resolve` does, but ignore the deadline."""
        if filling:
            answer = _MISS if key in self._flights.late else _PENDING
            if key not in self._flights.by_key:
                state.scan.device_stores.add(key)
        elif state.tiers and not state.wait.gave_up:
            answer = self._ask_tiers(state, key)
        else:
            return _MISS
        return _MISS if state.wait.gave_up or key in state.plans.denied else answer

    def find_prefix(self, state: RequestState, keys: Sequence[OffloadKey]) -> tuple[int, int]:
        """Return how many of `keys` are ready and how many are not yet, up to the first miss.

        Adds the keys to the scan, up to and including the first miss.
        """
        get_slot, filling = self._table.slot_of.get, self._table.filling
        num_pending, num_found = 0, len(keys)
        for index, key in enumerate(keys):
            slot = get_slot(key)
            if slot is None or slot in filling:
                answer = self._find(state, key, slot is not None)
                if answer is _MISS or not (num_pending or self._waiting.defer(state)):
                    num_found = index
                    break
                num_pending += 1
        state.scan.keys += keys[: num_found + 1]
        return num_found - num_pending, num_pending

    def _ask_tiers(self, state: RequestState, key: OffloadKey) -> LookupResult:
        """Ask the tiers in order; the first HIT counts, even if a tier before it has not answered yet."""
        retry, failed = False, state.plans.failed
        for index in state.tiers:
            if failed and (index, key) in failed:
                continue
            answer = self._guards[index].lookup(key, state.context)
            if answer is _HIT:
                scan = state.scan
                scan.found[key] = index
                if scan.unresolved:
                    scan.unresolved.discard(key)
                return _PENDING
            if (answer is _RETRY or answer is _PENDING) and index not in state.wait.silent:
                retry = self._waiting.may_probe(state, index, key) or retry
        if not retry:
            return _MISS
        state.scan.unresolved.add(key)
        return _RETRY

    def end_scan(self, state: RequestState) -> None:
        """End the request's scan at the end of a step."""
        self._waiting.end_scan(state)
        state.scan = Scan()  # a new object, because plans may still read the old one
