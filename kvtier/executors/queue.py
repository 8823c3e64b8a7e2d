"""A queue of tasks for an executor: questions and chores come first, then loads, then stores."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Container, Iterator, Sequence
from queue import SimpleQueue
from typing import Generic, TypeVar

from kvtier.executors.pieces import Piece
from kvtier.executors.protocol import Part

_MAX_LOADS_IN_A_ROW = 16
"""After this many loads one waiting store goes first, so that a tier busy with loads still stores new blocks."""

Blocks = TypeVar("Blocks", bound=Part | Piece)
"""Tasks that move blocks: whole parts where they are sent, pieces where they are moved."""

Urgent = TypeVar("Urgent")
"""All other tasks. They go first."""

_BLOCKS = (Part, Piece)
"""For `isinstance`: mypy narrows no type variable, and `typing.cast` would be one more call per task."""


class TaskQueue(Generic[Blocks, Urgent]):
    """A queue with three priorities, safe between threads."""

    def __init__(self, max_storing: int | None = None) -> None:
        """Args: max_storing: most stores that `take` gives out before an `end_store`; None for any number."""
        self._max_storing, self._num_storing = max_storing, 0
        # A lock and a queue in C: a `threading.Condition` runs a dozen functions of Python per task.
        self._lock = threading.Lock()
        self._wakers: SimpleQueue[None] = SimpleQueue()
        self._num_waiting = 0
        """Threads that wait for something in `_wakers`, less those for which something is there."""
        self._urgent: deque[Urgent] = deque()
        self._loads: deque[Blocks] = deque()
        self._stores: deque[Blocks] = deque()
        self._loads_in_a_row = 0
        self._closed = False

    def __bool__(self) -> bool:
        return bool(self._urgent or self._loads or self._stores)

    def put(self, *tasks: Blocks | Urgent) -> None:
        """Add tasks; after `close` they are dropped."""
        with self._lock:
            for task in () if self._closed else tasks:
                if not isinstance(task, _BLOCKS):
                    self._urgent.append(task)
                else:
                    (self._loads if task.is_load else self._stores).append(task)  # type: ignore[arg-type]
            self._wake()  # one thread, which wakes the next one if there is more to do

    def take(self, max_blocks: int, *, wait: bool = True) -> Sequence[Blocks | Urgent]:
        """Take the next task, and with it those of the same kind that wait behind it.

        Only blocks with slots of a store are taken together, up to `max_blocks` blocks, so that one call into the store
        serves them all.

        Args:
            wait: whether to wait until there is a task.

        Returns:
            The tasks; none if the queue is closed or, without `wait`, if no task may run now.
        """
        while True:
            with self._lock:
                task = self._pop()
                if task is not None:
                    tasks = [task]
                    if isinstance(task, _BLOCKS):
                        tasks += self._those_behind(task, max_blocks)  # type: ignore[arg-type]
                    self._wake()
                    return tasks
                if self._closed or not wait:
                    return ()
                self._num_waiting += 1
            self._wakers.get()

    def end_store(self) -> None:
        """Note that the stores of one `take` have ended. The caller takes again at once, so no other thread wakes."""
        with self._lock:
            self._num_storing -= 1

    def take_any(self, count: int) -> list[Blocks | Urgent]:
        """Take up to `count` tasks of any kind, without waiting."""
        with self._lock:
            tasks: list[Blocks | Urgent] = []
            while len(tasks) < count and (task := self._pop()) is not None:
                tasks.append(task)
            return tasks

    def cancel(self, serials: Container[int]) -> list[Blocks]:
        """Remove and return the waiting blocks of these jobs."""
        cancelled: list[Blocks] = []
        with self._lock:
            for queue in (self._loads, self._stores):
                parts = list(queue)
                queue.clear()
                for part in parts:
                    (cancelled if part.serial in serials else queue).append(part)
        return cancelled

    def close(self) -> None:
        """Drop all waiting tasks, and let every waiting `take` return."""
        with self._lock:
            self._closed = True
            for queue in (self._urgent, self._loads, self._stores):
                queue.clear()
            for _ in range(self._num_waiting):
                self._wakers.put(None)
            self._num_waiting = 0

    def _wake(self) -> None:
        """Let one waiting thread take what is there."""
        if self._num_waiting and (self._urgent or self._loads or self._may_store()):
            self._num_waiting -= 1
            self._wakers.put(None)

    def _pop(self) -> Blocks | Urgent | None:
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

    def _those_behind(self, first: Blocks, max_blocks: int) -> Iterator[Blocks]:
        """Take the tasks of the same kind that one call moves together with `first`, which was taken."""
        self._num_storing += not first.is_load
        queue, left = self._loads if first.is_load else self._stores, max_blocks - first.num_blocks
        if first.has_store_slots:
            while left > 0 and queue and (task := queue[0]).has_store_slots and task.num_blocks <= left:
                left -= task.num_blocks
                yield queue.popleft()
