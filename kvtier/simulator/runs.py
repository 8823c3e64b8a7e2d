"""Many configurations of one trace, in parallel processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from kvtier.errors import KVTierError
from kvtier.simulator.replay import Replay
from kvtier.simulator.results import Result
from kvtier.simulator.setup import Machine, Setup
from kvtier.simulator.trace import Trace

_POLL_SECONDS = 0.2


@dataclass
class _Worker:
    """What a process keeps between its runs."""

    trace: Trace
    machine: Machine
    shares: Any


_worker: list[_Worker] = []


def _begin(trace: Trace, machine: Machine, shares: Any) -> None:
    _worker[:] = [_Worker(trace, machine, shares)]


def _replay(index: int, setup: Setup) -> Result:
    worker = _worker[0]

    def note(share: float) -> None:
        worker.shares[index] = share

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

    Args:
        processes: at the same time; None takes one a processor. With one, all runs in this process.
        progress: told which share of all the work is done, 0 to 1, a few times a second.

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
    with ProcessPoolExecutor(count, context, initializer=_begin, initargs=(trace, machine, shares)) as pool:
        futures = [pool.submit(_replay, index, setup) for index, setup in enumerate(setups)]
        waiting: set[Future[Result]] = set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
                for future in done:
                    future.result()
                progress(sum(shares) / len(setups))
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise KVTierError("a process of the simulation died; is there memory for so many at once?") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _part_of(progress: Callable[[float], None], done: int, total: int) -> Callable[[float], None]:
    return lambda share: progress((done + share) / total)
