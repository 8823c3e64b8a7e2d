"""A queue of tasks for an executor: questions and chores come first, then loads, then stores."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Container, Sequence
from typing import Generic, TypeVar

from kvtier.executors.protocol import Part

_MAX_LOADS_IN_A_ROW = 16
"""After this many loads one waiting store goes first, so that a tier busy with loads still stores new blocks."""

Urgent = TypeVar("Urgent")
"""Tasks that are not parts. They go first."""


class TaskQueue(Generic[Urgent]):
    """A queue with three priorities, safe between threads."""

    def __init__(self, max_storing: int | None = None) -> None:
        """Args: max_storing: most stores that `take` gives out before an `end_store`; None for any number."""
        self._max_storing, self._num_storing = max_storing, 0
        self._changed = threading.Condition()
        self._urgent: deque[Urgent] = deque()
        self._loads: deque[Part] = deque()
        self._stores: deque[Part] = deque()
        self._loads_in_a_row = 0
        self._closed = False

    def __bool__(self) -> bool:
        return bool(self._urgent or self._loads or self._stores)

    def put(self, *tasks: Part | Urgent) -> None:
        """Add tasks; after `close` they are dropped."""
        with self._changed:
            for task in () if self._closed else tasks:
                if not isinstance(task, Part):
                    self._urgent.append(task)
                else:
                    (self._loads if task.is_load else self._stores).append(task)
            self._changed.notify()  # one thread, which wakes the next one if there is more to do

    def take(self, max_blocks: int, *, wait: bool = True) -> Sequence[Part | Urgent]:
        """Take the next task, and with it parts of the same kind that wait behind it.

        Only parts with slots of a store are taken together, up to `max_blocks` blocks, so that one call into the store
        serves them all.

        Args:
            wait: whether to wait until there is a task.

        Returns:
            The tasks; none if the queue is closed or, without `wait`, if no task may run now.
        """
        with self._changed:
            while (task := self._pop()) is None and wait and not self._closed:
                self._changed.wait()
            if task is None:
                return ()
            if not isinstance(task, Part):
                return (task,)
            self._num_storing += not task.is_load
            tasks = self._with_those_behind(task, max_blocks)
            if self._has_next():
                self._changed.notify()
            return tasks

    def end_store(self) -> None:
        """Note that the stores of one `take` have ended. The caller takes again at once, so no other thread wakes."""
        with self._changed:
            self._num_storing -= 1

    def take_any(self, count: int) -> list[Part | Urgent]:
        """Take up to `count` tasks of any kind, without waiting."""
        with self._changed:
            tasks: list[Part | Urgent] = []
            while len(tasks) < count and (task := self._pop()) is not None:
                tasks.append(task)
            return tasks

    def cancel(self, serials: Container[int]) -> list[Part]:
        """Remove and return the waiting parts of these jobs."""
        cancelled: list[Part] = []
        with self._changed:
            for queue in (self._loads, self._stores):
                parts = list(queue)
                queue.clear()
                for part in parts:
                    (cancelled if part.serial in serials else queue).append(part)
        return cancelled

    def close(self) -> None:
        """Drop all waiting tasks, and let every waiting `take` return."""
        with self._changed:
            self._closed = True
            for queue in (self._urgent, self._loads, self._stores):
                queue.clear()
            self._changed.notify_all()

    def _pop(self) -> Part | Urgent | None:
        if self._urgent:
            return self._urgent.popleft()
        may_store = self._may_store()
        if self._loads and (self._loads_in_a_row < _MAX_LOADS_IN_A_ROW or not may_store):
            self._loads_in_a_row += 1
            return self._loads.popleft()
        if may_store:
            self._loads_in_a_row = 0
            return self._stores.popleft()
        return None

    def _may_store(self) -> bool:
        return bool(self._stores) and (self._max_storing is None or self._num_storing < self._max_storing)

    def _has_next(self) -> bool:
        return bool(self._urgent or self._loads) or self._may_store()

    def _with_those_behind(self, first: Part, max_blocks: int) -> list[Part | Urgent]:
        tasks: list[Part | Urgent] = [first]
        if first.packed_store_slots is None:
            return tasks
        left = max_blocks - first.num_blocks
        queue = self._loads if first.is_load else self._stores
        while queue and (part := queue[0]).packed_store_slots is not None and part.num_blocks <= left:
            left -= part.num_blocks
            tasks.append(queue.popleft())
        return tasks
