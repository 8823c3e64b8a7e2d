"""Moves parts from bin to bin of the reuse table as they grow older."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque

from kvtier.eviction.chains import Part
from kvtier.eviction.leaves import Leaves
from kvtier.eviction.reuse import EDGES, NUM_BINS, ReuseTable

MAX_MOVED = 512
"""Most parts that one call moves to another bin. After a long pause all parts are due at once, and a call that moved
all of them would hold up the engine's scheduler."""


class Ages:
    """Queues of parts by bin of age. A part that moves on is counted in the table: it reached the bin without a use."""

    def __init__(self, table: ReuseTable, leaves: Leaves) -> None:
        self._table, self._leaves = table, leaves
        # One queue per bin, oldest entry first. An entry has the time of the part's last use; after a later use the
        # times differ, and `advance` drops the entry. To drop it at once would mean a search in the queue.
        self._queues: list[deque[tuple[Part, float]]] = [deque() for _ in EDGES]

    def enter(self, part: Part) -> None:
        """Add a part to the queue of its bin. Parts in the last bin stay there, so no queue holds them."""
        if part.bin < NUM_BINS - 1:
            self._queues[part.bin].append((part, part.request.time))

    def advance(self, now: float) -> None:
        """Move the parts that have outgrown their bin at `now`, oldest bin first, at most `MAX_MOVED` entries."""
        left = MAX_MOVED
        for index in range(NUM_BINS - 2, -1, -1):
            queue, edge = self._queues[index], EDGES[index]
            while queue and now - queue[0][1] >= edge and left:
                entry = queue.popleft()
                left -= 1
                part, time = entry
                num_blocks = len(part.keys) + part.ghosts
                if part.request.time != time or not num_blocks:  # it was used again, or forgotten
                    continue
                now_in = bisect_right(EDGES, now - time)
                self._table.note_passed(part.kind, index + 1, now_in, num_blocks)
                if part.keys and not part.children:
                    self._leaves.leave(part)
                    part.bin = now_in
                    self._leaves.enter(part)
                else:
                    part.bin = now_in
                if now_in < NUM_BINS - 1:
                    self._queues[now_in].append(entry)

    def clear(self) -> None:
        """Forget all parts."""
        for queue in self._queues:
            queue.clear()
