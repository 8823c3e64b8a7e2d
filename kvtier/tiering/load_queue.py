"""The loads that one tier has not been asked for yet, and which of them goes next.

A tier is asked for as much as keeps it busy, in parts; the rest waits here, without slots, where the order can change
and where what nobody waits for any more costs nothing.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from kvtier.keys import OffloadKey
from kvtier.tiering.estimate import TierSpeed
from kvtier.tiering.guarded_tier import TierGuard
from kvtier.tiering.requests import RequestState

_MIN_PART_BYTES = 1 << 20
"""Smaller parts cost more than they bring."""
_MAX_PART_BLOCKS = 64
_PARTS = 8
"""A plan is cut into so many parts, if they are not too small or too large: then little is lost if it is given up."""
_PART_SECONDS = 0.02
"""A part that takes less costs more than it brings."""
_EXPECTED_BANDWIDTH = 1e10
"""Bytes per second of a tier that has not loaded anything yet. Rather too many: a tier that is never asked is never
measured, and the first part shows what it can do."""


@dataclass(slots=True, eq=False)
class QueuedLoad:
    """The blocks that one plan wants of one tier.

    Attributes:
        keys: those that the tier has not been asked for yet, head first.
        state: the request whose plan it is; others may wait for the keys, too.
        part: blocks of one job.
        gain: seconds that a block makes the first token earlier.
        due: when the load must be overtaken no more, in seconds of the clock.
    """

    keys: list[OffloadKey]
    state: RequestState
    part: int
    gain: float
    due: float


class LoadQueue:
    """Queued loads of one tier, and its measured speed, in blocks."""

    def __init__(self, guard: TierGuard, block_bytes: int) -> None:
        self.guard = guard
        self.speed = TierSpeed(bandwidth=_EXPECTED_BANDWIDTH / block_bytes)
        self._least_part = max(1, _MIN_PART_BYTES // block_bytes)
        self.loads: list[QueuedLoad] = []
        self._num_up_to: dict[RequestState, int] = {}
        self.num_queued = 0
        """Blocks that the tier has not been asked for yet."""
        self.landed = self.arrived = 0
        """Blocks of the jobs that have ended since the last `note_polled`; and those of them that arrived."""

    def num_up_to(self, state: RequestState) -> int:
        """Return how many queued blocks there are up to the last one of a request's plans."""
        return self._num_up_to.get(state, 0)

    def add(self, keys: list[OffloadKey], state: RequestState, gain: float, due: float) -> None:
        """Queue what a plan wants."""
        quick = int(self.speed.bandwidth * _PART_SECONDS) if self.speed.is_measured else 0
        part = min(_MAX_PART_BLOCKS, max(self._least_part, len(keys) // _PARTS, quick))
        self.num_queued += len(keys)
        self.loads.append(QueuedLoad(keys, state, part, gain / len(keys), due))

    def arrange(self, wanted: Container[OffloadKey], now: float) -> None:
        """Drop what nobody wants, and order the rest: what has been overtaken long enough, then by gain."""
        for load in self.loads:
            if not load.state.awaiting:  # it waits no more; others may wait for some of these
                load.keys = [key for key in load.keys if key in wanted]
        self.loads.sort(key=lambda load: (0, load.due) if load.due <= now else (1, -load.gain))

    def note_sent(self) -> None:
        """The tier was asked for what it has room for: count what is before whom in the rest."""
        self.loads = [load for load in self.loads if load.keys]
        self._num_up_to.clear()
        self.num_queued = 0
        for load in self.loads:
            self.num_queued += len(load.keys)
            self._num_up_to[load.state] = self.num_queued

    def has_room(self, num_blocks: int) -> bool:
        """Return whether the tier may be asked for so many blocks now."""
        in_flight, speed = self.speed.in_flight, self.speed
        window = max(self._least_part, speed.window() if speed.is_measured else 0)
        return not in_flight or in_flight + num_blocks <= window

    def take(self, load: QueuedLoad) -> list[OffloadKey]:
        """Take the next part of a load."""
        part = load.keys[: load.part]
        del load.keys[: load.part]
        self.num_queued -= len(part)
        return part

    def note_polled(self, now: float, seen_at_once: bool) -> None:
        """The tier was asked for results: `landed` and `arrived` say what came."""
        if self.landed:
            self.speed.end(self.landed, self.arrived, now, seen_at_once=seen_at_once)
            self.landed = self.arrived = 0
        self.speed.poll(now)
