"""Puts the blocks of requests that the engine computes in order before a load takes the slots of some of them.

A request uses its blocks in several calls: it loads some, and stores others step by step. A policy that goes by recency
takes the blocks of the earlier calls for older, although those of the later calls need them. At the end of a request
its blocks are settled. Before that, a load for another request would cut the chain in its middle, and everything behind
the cut would be lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from kvtier.errors import InvariantError
from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable
from kvtier.tiering.requests import RequestState


class RunningRequests:
    """The requests that have loaded or stored blocks and are not over."""

    def __init__(self, table: BlockTable) -> None:
        """Args: table: of the primary tier."""
        self._table = table
        self._used_by = np.zeros(table.num_slots, np.int64)
        """By slot, the number of the request that loaded or stored its block last."""
        self._is_shared = np.zeros(table.num_slots, np.bool_)
        """By slot, whether a request may use its block that is not the last one to do so. A slot whose block was
        promoted may say so in vain."""
        self._numbers: dict[RequestState, int] = {}
        self._running: dict[int, RequestState] = {}
        self._unordered: dict[int, RequestState] = {}
        """The requests that have used blocks since their blocks were put in order, by number."""
        self._last = 0

    def note_load(self, state: RequestState, places: NDArray[np.int32]) -> None:
        """Note that a request loads the blocks in these slots, which other requests may be using, too."""
        if len(places) and self._table.lines_up:
            former, oldest = self._used_by[places], next(iter(self._running), self._last + 1)
            others: list[int] = []
            if former.max() >= oldest:  # mostly they belong to a request that is over, or nobody else runs
                others = [number for number in np.unique(former).tolist() if number in self._running]
            were_shared = self._is_shared[places]
            self._note(state, places, were_shared | np.isin(former, others) if others else were_shared)

    def note_store(self, state: RequestState, places: NDArray[np.int32]) -> None:
        """Note that a request stores blocks in these slots."""
        if len(places) and self._table.lines_up:
            self._note(state, places, False)

    def _note(self, state: RequestState, places: NDArray[np.int32], are_shared: NDArray[np.bool_] | bool) -> None:
        number = self._numbers.get(state)
        if number is None:
            self._last = number = self._numbers[state] = self._last + 1
            self._running[number] = state
        self._used_by[places] = number
        self._is_shared[places] = are_shared
        self._unordered[number] = state

    def end(self, state: RequestState) -> None:
        """Forget a request that is over."""
        number = self._numbers.pop(state, None)
        if number is not None:
            del self._running[number]
            self._unordered.pop(number, None)

    def put_in_order(self, victims: Sequence[OffloadKey]) -> bool:
        """Put the blocks of the requests to which some of `victims` belong in order.

        Returns:
            Whether there was such a request. Then the policy has other victims now, and these may belong to further
            requests: call this again with them, until it returns False.
        """
        if not (victims and self._unordered):
            return False
        slots = np.asarray(self._table.slot_of.values_of(victims))
        numbers = [number for number in np.unique(self._used_by[slots]).tolist() if number in self._unordered]
        shared = list(compress(victims, self._is_shared[slots].tolist()))
        if shared:
            numbers += [number for number, state in self._unordered.items() if not state.uses.own.isdisjoint(shared)]
        for number in dict.fromkeys(numbers):
            state = self._unordered.pop(number)
            self._table.line_up(state.uses.in_order(state.context))
        return bool(numbers)

    def check_invariants(self) -> None:
        """Raise InvariantError if a request that is over, or was never noted, waits for its order."""
        if {state: number for number, state in self._running.items()} != self._numbers:
            raise InvariantError("running requests and their numbers differ")
        if any(self._numbers.get(state) != number for number, state in self._unordered.items()):
            raise InvariantError("a request's blocks wait for their order under another request's number")
        if any(state.finished for state in self._numbers):
            raise InvariantError("a request that is over counts as running")
