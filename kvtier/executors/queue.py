"""What waits for an executor's threads: questions first, then loads, then stores."""

from __future__ import annotations

import threading
from collections import deque

from kvtier.executors.protocol import Part, Probe

_LOADS_IN_A_ROW = 16
"""After so many loads one waiting store goes first, so that a busy tier still learns."""

Task = Part | Probe


class PartQueue:
    """A queue with three priorities, safe between threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._questions: deque[Probe] = deque()
        self._loads: deque[Part] = deque()
        self._stores: deque[Part] = deque()
        self._loads_in_a_row = 0
        self._closed = False

    def put(self, task: Task) -> None:
        """Add a task; after `close` it is dropped."""
        with self._changed:
            if self._closed:
                return
            if isinstance(task, Probe):
                self._questions.append(task)
            elif task.is_load:
                self._loads.append(task)
            else:
                self._stores.append(task)
            self._changed.notify()

    def take(self) -> Task | None:
        """Wait for the next task; None when the queue is closed."""
        with self._changed:
            while not self._closed:
                task = self._pop()
                if task is not None:
                    return task
                self._changed.wait()
            return None

    def take_many(self, most_blocks: int) -> list[Task]:
        """Wait for the next task, and take with it parts of the same kind that wait behind it; none when closed.

        Only parts with slots of a store are taken together, up to `most_blocks` blocks: one call into the store
        then serves them all.
        """
        first = self.take()
        if not isinstance(first, Part) or first.packed_store_slots is None:
            return [] if first is None else [first]
        tasks: list[Task] = [first]
        left = most_blocks - first.num_blocks
        with self._changed:
            queue = self._loads if first.is_load else self._stores
            while queue and (part := queue[0]).packed_store_slots is not None:
                left -= part.num_blocks
                if left < 0:
                    break
                tasks.append(queue.popleft())
        return tasks

    def take_now(self) -> Task | None:
        """Return the next task, or None if there is none."""
        with self._changed:
            return self._pop()

    def _pop(self) -> Task | None:
        if self._questions:
            return self._questions.popleft()
        if self._loads and (self._loads_in_a_row < _LOADS_IN_A_ROW or not self._stores):
            self._loads_in_a_row += 1
            return self._loads.popleft()
        if self._stores:
            self._loads_in_a_row = 0
            return self._stores.popleft()
        return None

    def cancel(self) -> list[Part]:
        """Remove and return the parts that wait."""
        with self._changed:
            parts = [*self._loads, *self._stores]
            self._loads.clear()
            self._stores.clear()
        return parts

    def close(self) -> None:
        """Drop what waits and send every taker home."""
        with self._changed:
            self._closed = True
            self._questions.clear()
            self._loads.clear()
            self._stores.clear()
            self._changed.notify_all()
