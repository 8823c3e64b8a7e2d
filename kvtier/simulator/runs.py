"""Replays one trace with many configurations, in parallel processes.

The processes start with SIGINT blocked, so that only the parent reacts to an interrupt. It then sets a flag that every
replay checks. A parent that is killed cannot set the flag: so each process has a thread that waits for the parent's
end, and ends the process then.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from kvtier.errors import KVTierError
from kvtier.interrupts import interrupts_noted
from kvtier.simulator.replay import Replay
from kvtier.simulator.results import Result
from kvtier.simulator.setup import Machine, Setup
from kvtier.simulator.trace import Trace

_POLL_SECONDS = 0.2


class _Stopped(Exception):
    """Ends a replay when the parent has set the stop flag."""


@dataclass
class _Worker:
    """State of a worker process.

    Attributes:
        shares: per setup, the share that is done; shared memory that the workers write and the parent reads.
        stop: shared memory; the parent sets it to 1 to stop all replays.
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
        os._exit(1)  # nobody is left to read a result or a message


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
    """Replay a trace with every setup; return the results in the order of `setups`.

    No process is left after an exception, KeyboardInterrupt included.

    Args:
        processes: most processes at the same time; None: one per processor. With one, all replays run in this process.
        progress: called with the share of all work that is done, 0 to 1, a few times per second.

    Raises:
        ConfigError: a setup cannot be simulated.
        KVTierError: a process died.
    """
    count = min(len(setups), processes or len(os.sched_getaffinity(0)))
    if count <= 1:
        return [
            Replay(trace, setup, machine).run(_part_of(progress, done, len(setups)))
            for done, setup in enumerate(setups)
        ]
    context = multiprocessing.get_context("spawn")
    # No lock: each entry has one writer, and processors write an aligned double as a whole.
    shares = context.Array("d", len(setups), lock=False)
    stop = context.Value("b", 0, lock=False)
    with (
        interrupts_noted() as check,
        ProcessPoolExecutor(count, context, initializer=_begin, initargs=(trace, machine, shares, stop)) as pool,
    ):
        try:
            futures = [_submit(pool, index, setup) for index, setup in enumerate(setups)]
            waiting: set[Future[Result]] = set(futures)
            while waiting:
                done, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
                check()
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
    # `submit` may start a process, which inherits the mask of blocked signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return pool.submit(_replay, index, setup)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _part_of(progress: Callable[[float], None], done: int, total: int) -> Callable[[float], None]:
    return lambda share: progress((done + share) / total)
