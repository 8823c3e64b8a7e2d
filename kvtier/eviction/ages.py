"""Parts by the age of their last use."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque

from kvtier.eviction.chains import Part
from kvtier.eviction.leaves import Leaves
from kvtier.eviction.reuse import EDGES, NUM_BINS, ReuseTable

MAX_MOVED = 512
"""Parts that one call moves to another bin: after a long pause all are due at once, and no call may take that long."""


class Ages:
    """Moves parts from bin to bin of age, and counts that they have come there without a use."""

    def __init__(self, table: ReuseTable, leaves: Leaves) -> None:
        self._table, self._leaves = table, leaves
        # By bin, oldest first, with the time of the use they age from: another use makes an entry void.
        self._queues: list[deque[tuple[Part, float]]] = [deque() for _ in EDGES]

    def enter(self, part: Part) -> None:
        """Take in a part that is in its bin of age."""
        if part.bin < NUM_BINS - 1:
            self._queues[part.bin].append((part, part.request.time))

    def advance(self, now: float) -> None:
        """Move the parts that are in another bin by now, the oldest first."""
        left = MAX_MOVED
        for index in range(NUM_BINS - 2, -1, -1):
            queue, edge = self._queues[index], EDGES[index]
            while queue and now - queue[0][1] >= edge and left:
                entry = queue.popleft()
                part, time = entry
                num_blocks = len(part.keys) + part.ghosts
                if part.request.time != time or not num_blocks:
                    continue
                left -= 1
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
