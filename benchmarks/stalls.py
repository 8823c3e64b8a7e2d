"""The longest calls of the scheduler's thread while a cache grows to a million blocks, and while blocks come and go.

Drives the public TieringOffloadingManager as a scheduler does: a request stores its blocks and ends; while the cache is
full, every request first uses the blocks of an earlier one, and its stores evict others. At last the cache is reset.
Prints, per policy and phase, the longest call, and how many calls were longer than some limits. Beside them stand a
plain dict and an OrderedDict with the same keys, the least that a table and an order of eviction need.

Python's garbage collector runs as it would in an engine: by default after `gc.freeze()`, as vLLM calls it when it has
started; `--gc on` without it, `--gc off` without collections. The time of full collections is printed, too: they visit
every object that can be part of a cycle, so they grow with blocks if there is such an object per block.

Times are thread-CPU time, which other work of the machine does not stretch as much as a clock's.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from control_plane import Keys
from rich.console import Console
from rich.table import Table

from kvtier.keys import OffloadKey
from kvtier.primary.manager import CPUPrimaryTierOffloadingManager
from kvtier.registry import POLICIES
from kvtier.tiering.manager import TieringOffloadingManager
from kvtier.types import ReqContext, ScheduleEndContext

TARGET_MS = 20.0
"""No call may take longer."""

LIMITS_MS = (1.0, 5.0, TARGET_MS)


class Timed:
    """Milliseconds of every call of a phase, by the name of the call."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, str]] = []

    def __call__(self, name: str, call: Callable[..., Any], *arguments: object) -> Any:
        """Call, and note how long it took."""
        start = time.thread_time()
        result = call(*arguments)
        self.calls.append((1e3 * (time.thread_time() - start), name))
        return result

    def row(self) -> list[str]:
        """Return the longest call, the 99.9th percentile, and how many calls were over each limit."""
        longest, name = max(self.calls)
        times = sorted(seconds for seconds, _ in self.calls)
        over = [str(sum(seconds > limit for seconds in times)) for limit in LIMITS_MS]
        mark = " !" if longest > TARGET_MS else ""
        return [f"{longest:.1f}{mark}", name, f"{times[len(times) * 999 // 1000]:.2f}", f"{len(times):,}", *over]


class Engine:
    """Stores and uses blocks through a manager."""

    def __init__(self, num_blocks: int, policy: str, keys: Keys) -> None:
        view = memoryview(np.zeros((num_blocks, 1), dtype=np.uint8))  # no byte of it is read
        primary = CPUPrimaryTierOffloadingManager(num_blocks, view, POLICIES.load(policy)(num_blocks))
        self.manager, self.keys, self._requests = TieringOffloadingManager(primary), keys, 0
        self.stored: list[tuple[OffloadKey, ...]] = []
        """Tuples of bytes, which the garbage collector does not visit: they are no part of what is measured."""

    def serve(self, size: int, timed: Timed, used: Sequence[OffloadKey] = ()) -> None:
        """Serve a request that uses the blocks `used`, and stores `size` new ones."""
        manager, keys = self.manager, self.keys.take(size)
        self._requests += 1
        context = ReqContext(f"request-{self._requests}")
        timed("on_new_request", manager.on_new_request, context)
        if used:
            timed("touch", manager.touch, used, context)
        if timed("prepare_store", manager.prepare_store, keys, context) is not None:
            timed("complete_store", manager.complete_store, keys, context)
        timed("on_request_finished", manager.on_request_finished, context)
        timed("on_schedule_end", manager.on_schedule_end, ScheduleEndContext())
        self.stored.append(tuple(keys))


def measure(policy: str, num_blocks: int, size: int, keys: Keys) -> Iterator[tuple[str, Timed, float]]:
    """Yield the phases: their names, their calls, and the milliseconds of a full collection after them."""
    engine = Engine(num_blocks, policy, keys)
    timed = Timed()
    for _ in range(num_blocks // size):
        engine.serve(size, timed)
    yield "grow", timed, _collect()
    timed, chance = Timed(), np.random.default_rng(1)
    for _ in range(num_blocks // size):
        recent = engine.stored[-num_blocks // size :]
        engine.serve(size, timed, recent[int(chance.integers(len(recent)))])
    yield "churn", timed, _collect()
    timed = Timed()
    timed("reset_cache", engine.manager.reset_cache)
    yield "reset", timed, _collect()
    engine.manager.shutdown()


def measure_plain(
    kind: type[dict[OffloadKey, None]], num_blocks: int, size: int, keys: Keys
) -> Iterator[tuple[str, Timed, float]]:
    """Yield the phases of a dict, from which the oldest keys are deleted when it is full."""
    table = kind()

    def enter(new: Sequence[OffloadKey]) -> None:
        for key in new:
            table[key] = None

    def leave(old: Sequence[OffloadKey]) -> None:
        for key in old:
            del table[key]

    batches = []
    timed = Timed()
    for _ in range(num_blocks // size):
        batches.append(tuple(keys.take(size)))
        timed("insert", enter, batches[-1])
    yield "grow", timed, _collect()
    timed = Timed()
    for old in islice(batches, num_blocks // size):
        timed("delete", leave, old)
        timed("insert", enter, keys.take(size))
    yield "churn", timed, _collect()


def _collect() -> float:
    start = time.thread_time()
    gc.collect()
    return 1e3 * (time.thread_time() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--keys", type=int, default=256, help="blocks per request")
    parser.add_argument("--policies", default="lru,arc,s3fifo,prefix")
    parser.add_argument("--gc", choices=("freeze", "on", "off"), default="freeze")
    options = parser.parse_args()
    keys = Keys()
    table = Table(title=f"calls in milliseconds, {options.blocks:,} blocks, {options.keys} per request")
    for column in (
        "",
        "phase",
        f"longest\n< {TARGET_MS:g}",
        "call",
        "99.9%",
        "calls",
        *(f"> {ms:g}" for ms in LIMITS_MS),
    ):
        table.add_column(column, justify="right")
    table.add_column("full gc", justify="right")
    plain = options.blocks, options.keys, keys
    cases: dict[str, Callable[[], Iterator[tuple[str, Timed, float]]]] = {"dict": lambda: measure_plain(dict, *plain)}
    cases["OrderedDict"] = lambda: measure_plain(OrderedDict, *plain)
    for policy in options.policies.split(","):
        cases[policy] = partial(measure, policy, *plain)
    for name, case in cases.items():
        gc.collect()
        if options.gc == "freeze":
            gc.freeze()
        elif options.gc == "off":
            gc.disable()
        for phase, timed, collection in case():
            table.add_row(name, phase, *timed.row(), f"{collection:.0f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
