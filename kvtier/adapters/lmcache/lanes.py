"""Runs LMCache's tasks on threads, and tells it of their ends through event descriptors."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from kvtier import forks
from kvtier.log import logger

R = TypeVar("R")


class Lane(Generic[R]):
    """Runs tasks of one kind, begun in order, on threads of its own. Several threads may call it at once."""

    def __init__(self, name: str, num_threads: int, notifier: Any, task_ids: Iterator[int]) -> None:
        """Args:
        name: of the threads.
        notifier: LMCache's `EventNotifier`, which the lane owns. It is signalled when a task has a result.
        task_ids: yields numbers that no task of the adapter has had.
        """
        self._notifier, self._task_ids = notifier, task_ids
        self._lock = threading.Lock()
        self._results: dict[int, R] = {}
        self._waiting: queue.SimpleQueue[tuple[int, Callable[[], R], R] | None] = queue.SimpleQueue()
        self._closed = self._is_left = False
        self._threads = [
            threading.Thread(target=self._run, name=f"kvtier-lmcache-{name}-{number}", daemon=True)
            for number in range(num_threads)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    @property
    def descriptor(self) -> int:
        """The event descriptor that becomes readable when a task has a result."""
        return int(self._notifier.fileno())

    def submit(self, work: Callable[[], R], failed: R) -> int:
        """Queue a task; return its number.

        Args:
            work: called on a thread of the lane.
            failed: the result if `work` raises, or if the lane is closed before it begins.
        """
        if self._is_left or not forks.mark[0]:
            forks.advise()
        task_id = next(self._task_ids)
        if self._closed:
            self._results[task_id] = failed
        else:
            self._waiting.put((task_id, work, failed))
        return task_id

    def take(self, task_id: int) -> R | None:
        """Return the result of a task, once; None if it has none yet."""
        with self._lock:
            return self._results.pop(task_id, None)

    def take_all(self) -> dict[int, R]:
        """Return all results that were not taken, by number of the task."""
        with self._lock:
            results, self._results = self._results, {}
        return results

    def stop(self) -> None:
        """Begin no further task. Tasks that wait fail."""
        self._closed = True
        for _ in self._threads:
            self._waiting.put(None)

    def join(self) -> None:
        """Wait until the threads have ended, and close the event descriptor. `stop` was called before."""
        for thread in self._threads:
            thread.join()
        self._notifier.close()

    def leave_to_parent(self) -> None:
        """In a forked child, fail every further task at once; the descriptor is the parent's."""
        self._closed = self._is_left = True
        self._lock = threading.Lock()

    def _run(self) -> None:
        while (task := self._waiting.get()) is not None:
            task_id, work, result = task
            try:
                if not self._closed:
                    result = work()
            except Exception:  # whatever a task meets must not end the thread: LMCache would wait for ever
                logger.exception("kvtier: a task of LMCache failed")
            with self._lock:
                self._results[task_id] = result
            self._notifier.notify()
