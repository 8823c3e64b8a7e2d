"""The planned loads that one tier has not been asked for yet, and their order.

A tier is asked for as much as keeps it busy, in parts. The rest waits here and holds no slots. Its order can still
change, and blocks that no request waits for any more are dropped at no cost.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from kvtier.keys import OffloadKey
from kvtier.tiering.estimate import TierSpeed
from kvtier.tiering.guarded_tier import TierGuard
from kvtier.tiering.requests import RequestState

_MIN_PART_BYTES = 1 << 20
"""Size below which the cost of a further job exceeds the benefit."""
_MAX_PART_BLOCKS = 64
_PARTS = 8
"""Parts per plan, unless these would be too small or too large. A plan that is given up wastes only parts in flight."""
_PART_SECONDS = 0.02
"""Duration below which the cost of a further job exceeds the benefit."""
_EXPECTED_BANDWIDTH = 1e10
"""Assumed bytes per second of a tier that has not loaded anything yet. The value is high, because a tier that is never
asked is never measured. The first part shows its real bandwidth."""


@dataclass(slots=True, eq=False)
class QueuedLoad:
    """The blocks that one plan wants from one tier.

    Attributes:
        keys: those that the tier has not been asked for yet, in prefix order.
        state: the request of the plan. Other requests may wait for the keys, too.
        part: blocks per job.
        gain: seconds per block by which first tokens come earlier.
        due: time after which loads with more gain no longer overtake this one, in seconds of the clock.
    """

    keys: list[OffloadKey]
    state: RequestState
    part: int
    gain: float
    due: float


class LoadQueue:
    """Queued loads of one tier, and the measured speed of its loads."""

    def __init__(self, guard: TierGuard, block_bytes: int) -> None:
        self.guard = guard
        self.speed = TierSpeed(bandwidth=_EXPECTED_BANDWIDTH / block_bytes)
        self.least_part = max(1, _MIN_PART_BYTES // block_bytes)
        self.loads: list[QueuedLoad] = []
        self._num_up_to: dict[RequestState, int] = {}
        self.num_queued = 0
        """Blocks that the tier has not been asked for yet."""
        self.landed = self.arrived = 0
        """Blocks of the jobs that have ended since the last `note_polled`, and how many of them arrived."""

    def num_up_to(self, state: RequestState) -> int:
        """Return how many blocks are queued up to and including the last one that a request planned."""
        return self._num_up_to.get(state, 0)

    def add(self, keys: list[OffloadKey], state: RequestState, gain: float, due: float) -> None:
        """Queue the blocks that a plan of `state` wants. `gain` is that of all `keys` together."""
        quick = int(self.speed.bandwidth * _PART_SECONDS) if self.speed.is_measured else 0
        part = min(_MAX_PART_BLOCKS, max(self.least_part, len(keys) // _PARTS, quick))
        self.num_queued += len(keys)
        self.loads.append(QueuedLoad(keys, state, part, gain / len(keys), due))

    def arrange(self, wanted: Container[OffloadKey], now: float) -> None:
        """Drop blocks that are not `wanted`, and sort the loads: first those that are due, then by gain.

        The loads of one request stay in the order of its prompt, because its blocks are of no use without those before.
        """
        former: dict[RequestState, QueuedLoad] = {}
        for load in self.loads:
            if before := former.get(load.state):
                load.gain, load.due = min(load.gain, before.gain), max(load.due, before.due)
            former[load.state] = load
            if not load.state.awaiting:  # it has given up; other requests may wait for some of these
                load.keys = [key for key in load.keys if key in wanted]
        self.loads.sort(key=lambda load: (0, load.due) if load.due <= now else (1, -load.gain))

    def note_sent(self) -> None:
        """Count what is left and up to where each request's blocks reach. The tier has no room for more now."""
        self.loads = [load for load in self.loads if load.keys]
        self._num_up_to.clear()
        self.num_queued = 0
        for load in self.loads:
            self.num_queued += len(load.keys)
            self._num_up_to[load.state] = self.num_queued

    def has_room(self, num_blocks: int) -> bool:
        """Return whether the tier may be asked for `num_blocks` more now. An idle tier may be asked for any number."""
        in_flight, speed = self.speed.in_flight, self.speed
        window = max(self.least_part, speed.window() if speed.is_measured else 0)
        return not in_flight or in_flight + num_blocks <= window

    def take(self, load: QueuedLoad) -> list[OffloadKey]:
        """Remove and return the next part of a load."""
        part = load.keys[: load.part]
        del load.keys[: load.part]
        self.num_queued -= len(part)
        return part

    def note_polled(self, now: float, seen_at_once: bool) -> None:
        """Learn from `landed` and `arrived` after a poll of the tier; `seen_at_once` is as in `TierSpeed.end`."""
        if self.landed:
            self.speed.end(self.landed, self.arrived, now, seen_at_once=seen_at_once)
            self.landed = self.arrived = 0
        self.speed.poll(now)
