"""Many configurations of one trace, in parallel processes.

Whoever interrupts the command interrupts the parent only; it raises a flag that every replay looks at. A parent that
is killed cannot: each process waits for its parent's end in a thread, and ends with it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvtier.errors import KVTierError
from kvtier.simulator.replay import Replay
from kvtier.simulator.results import Result
from kvtier.simulator.setup import Machine, Setup
from kvtier.simulator.trace import Trace

_POLL_SECONDS = 0.2


class _Stopped(Exception):
    """A replay that ended because the parent gave up."""


@dataclass
class _Worker:
    """What a process keeps between its runs.

    Attributes:
        shares: which part of each setup is done, written here and read by the parent.
        stop: not 0 once the parent wants no results any more.
    """

    trace: Trace
    machine: Machine
    shares: Any
    stop: Any


_worker: list[_Worker] = []


def _begin(trace: Trace, machine: Machine, shares: Any, stop: Any) -> None:
    _worker[:] = [_Worker(trace, machine, shares, stop)]
    threading.Thread(target=_end_with_parent, name="kvtier-parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # whoever would read a result, or a message, is gone


def _replay(index: int, setup: Setup) -> Result:
    worker = _worker[0]

    def note(share: float) -> None:
        if worker.stop.value:
            raise _Stopped
        worker.shares[index] = share

    note(0.0)
    return Replay(worker.trace, setup, worker.machine).run(note)


def replay_all(
    trace: Trace,
    setups: Sequence[Setup],
    machine: Machine,
    *,
    processes: int | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Result]:
    """Replay a trace through every setup; return the results in their order.

    Whatever is raised, KeyboardInterrupt included, no process is left.

    Args:
        processes: at the same time; None takes one a processor. With one, all runs in this process.
        progress: told which share of all the work is done, 0 to 1, a few times per second.

    Raises:
        ConfigError: a setup that cannot be simulated.
        KVTierError: a process died.
    """
    count = min(len(setups), processes or len(os.sched_getaffinity(0)))
    if count <= 1:
        return [
            Replay(trace, setup, machine).run(_part_of(progress, done, len(setups)))
            for done, setup in enumerate(setups)
        ]
    context = multiprocessing.get_context("spawn")
    shares = context.Array("d", len(setups), lock=False)
    stop = context.Value("b", 0, lock=False)
    with ProcessPoolExecutor(count, context, initializer=_begin, initargs=(trace, machine, shares, stop)) as pool:
        try:
            futures = [_submit(pool, index, setup) for index, setup in enumerate(setups)]
            waiting: set[Future[Result]] = set(futures)
            while waiting:
                done, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
                for future in done:
                    future.result()
                progress(sum(shares) / len(setups))
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise KVTierError("a process of the simulation died; is there memory for so many at once?") from None
        except BaseException:
            stop.value = 1
            pool.shutdown(cancel_futures=True)
            raise


def _submit(pool: ProcessPoolExecutor, index: int, setup: Setup) -> Future[Result]:
    with _interrupts_held():  # a submit may start a process, and processes inherit what is held
        return pool.submit(_replay, index, setup)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold SIGINT back from this thread; one that came raises KeyboardInterrupt at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _part_of(progress: Callable[[float], None], done: int, total: int) -> Callable[[float], None]:
    return lambda share: progress((done + share) / total)
