"""An executor on threads of this process, for arenas that no other process can map.

A thread cannot be killed. So a store never gets arena memory: it reads and writes private buffers. A thread copies
between arena and buffer under one lock, and only after a check that the executor was not ended. After `retire` or
`kill` has returned, no thread touches the arena again, even one that hangs in the store.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from itertools import compress

from kvtier import forks
from kvtier.errors import StoreUnavailableError
from kvtier.executors.base import IOExecutor, Report, StoreDescription
from kvtier.executors.loop import StoreLoop, cancelled
from kvtier.executors.pieces import Piece, arena_slots
from kvtier.executors.protocol import Chore, IndexEnd, Part, PartResult, Probe, Ready, Unavailable
from kvtier.executors.runner import StoreRunner
from kvtier.keys import OffloadKey
from kvtier.log import logger
from kvtier.primary.arena import Rows
from kvtier.stores.integrity.scratch import copy_bytes


class ThreadExecutor(IOExecutor):
    """Runs the store on daemon threads with private buffers. The first thread opens the store, and closes it last."""

    def __init__(self, description: StoreDescription, rows: Rows) -> None:
        self._description = description
        self._rows = rows
        self._loop = StoreLoop(description, description.threads)
        self._arena_lock = threading.Lock()
        self._wanted = True
        self._killed = False
        self._opener: threading.Thread | None = None
        self._reports: deque[Report] = deque()  # needs no lock: CPython's `append` and `popleft` are atomic
        self._news = threading.Event()
        forks.register(self)

    def leave_to_parent(self) -> None:
        """In a forked child, be an executor that has ended.

        The child has none of the threads. They may have held any of the locks at the fork, so it needs new locks.
        """
        self._loop, self._arena_lock = StoreLoop(self._description), threading.Lock()
        self._news = threading.Event()
        self._wanted, self._killed = False, True
        self._reports.clear()

    def start(self) -> None:
        try:
            self._opener = threading.Thread(target=self._open_and_work, name="kvtier-io", daemon=True)
            self._opener.start()
        except RuntimeError as error:
            raise StoreUnavailableError(f"no thread: {error}") from error

    def submit(self, part: Part) -> None:
        self._loop.put(part)

    def probe(self, probe_id: int, keys: Sequence[OffloadKey]) -> None:
        self._loop.put(Probe.of(probe_id, keys))

    def do(self, chore: Chore) -> None:
        self._loop.put(chore)

    def poll(self) -> list[Report]:
        self._news.clear()  # before the reports are read, so that a report after this sets it again
        reports: list[Report] = []
        while self._reports:
            reports.append(self._reports.popleft())
        return reports

    def cancel(self, serials: Collection[int]) -> None:
        self._report(self._loop.cancel(serials))

    def retire(self) -> None:
        """Stop touching the arena now. The threads end after their current call, and close the store.

        Waits at most for the copy of one block.
        """
        with self._arena_lock:
            self._wanted = False
        self._loop.close()

    def kill(self) -> None:
        """Do as `retire`, but count as ended at once. Threads that hang may keep the store, but not the arena."""
        self.retire()
        self._killed = True

    def has_ended(self) -> bool:
        """Return whether no thread touches the arena again and, unless this was killed, the store is closed."""
        return not self._wanted and (self._killed or self._opener is None or not self._opener.is_alive())

    def wait(self, seconds: float) -> None:
        """Wait for a report or, after `retire`, for the end of the threads."""
        if self._wanted or self._opener is None:
            self._news.wait(seconds)
        else:
            self._opener.join(seconds)

    def _report(self, reports: Iterable[Report]) -> None:
        self._reports.extend(reports)
        self._news.set()

    def _open_and_work(self) -> None:
        runner = None
        try:
            runner = StoreRunner(self._description)
            self._report((Ready(runner.num_slots),))
            for batch in runner.index():
                self._report((batch,))
        except StoreUnavailableError as error:
            if runner is not None:
                runner.close()  # an open store may hold a lock that keeps the next executor from opening it
            self._report((Unavailable.because(error),))
            return
        self._report((IndexEnd(), *runner.usage_news()))
        workers: list[threading.Thread] = []
        for _ in range(self._description.threads - 1):
            worker = threading.Thread(target=self._work, args=(runner,), name="kvtier-io", daemon=True)
            try:
                worker.start()
            except RuntimeError as error:  # the system gives no more threads: this one, at least, does the work
                logger.warning("kvtier: a store works with %d threads: %s", len(workers) + 1, error)
                break
            workers.append(worker)
        self._work(runner)
        for worker in workers:
            worker.join()
        runner.close()

    def _work(self, runner: StoreRunner) -> None:
        block_bytes = self._description.block_bytes
        memory = memoryview(bytearray(self._loop.blocks_per_call * block_bytes))
        buffers = [memory[at : at + block_bytes] for at in range(0, len(memory), block_bytes)]

        def move(runner: StoreRunner, pieces: Sequence[Piece]) -> list[PartResult]:
            return self._move(runner, pieces, buffers)

        self._loop.run(runner, move, self._report)

    def _move(self, runner: StoreRunner, pieces: Sequence[Piece], buffers: list[memoryview]) -> list[PartResult]:
        slots, is_load = arena_slots(pieces), pieces[0].is_load
        if not is_load and not self._copy(slots, buffers, to_arena=False):
            return list(map(cancelled, pieces))
        results = runner.run(pieces, buffers[: len(slots)])
        if is_load:
            successes = [success for result in results for success in result.successes]
            if not self._copy(compress(slots, successes), compress(buffers, successes), to_arena=True):
                return list(map(cancelled, pieces))
        return results

    def _copy(self, slots: Iterable[int], buffers: Iterable[memoryview], *, to_arena: bool) -> bool:
        """Copy blocks between arena and buffers; return False as soon as the executor was ended."""
        for slot, buffer in zip(slots, buffers, strict=False):
            # The lock is held for one block at a time, so that `retire` waits for one copy at most.
            with self._arena_lock:
                if not self._wanted:
                    return False
                row = self._rows[slot]
                copy_bytes(*((row, buffer) if to_arena else (buffer, row)))
        return True
