"""What a block costs the scheduler's thread, through the public TieringOffloadingManager.

Prints thread-CPU nanoseconds per block, and those of a bare `dict.get` of the same keys in the same run. Every figure
is the median of several rounds. A round measures every operation, size and policy before the next round begins.

A second table has the longest single calls while promotions are planned, arrive, expire and are loaded, for one long
prompt and for many shorter ones. Of the rounds' longest calls it has the shortest, since other work of the machine only
makes calls longer. In brackets it has the barest loops over the same blocks, with LRU's order.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from promotion_calls import PromotionBench, least_seconds
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvtier.keys import OffloadKey, make_offload_key
from kvtier.primary.manager import CPUPrimaryTierOffloadingManager
from kvtier.registry import POLICIES
from kvtier.tiering.manager import TieringOffloadingManager
from kvtier.tiering.promotion import MAX_PLANNED
from kvtier.types import LookupResult, ReqContext, ScheduleEndContext

BLOCK_BYTES = 4096
TARGETS = {
    "lookup hit": 400,
    "lookup miss": 400,
    "store": 900,
    "store evicting": 1500,
    "load": 600,
    "touch": 250,
}
WAIT_TARGETS = {
    "planning": 2.0,
    "plan": 5.0,
    "step": 5.0,
    "expiry": 5.0,
    "finish after expiry": 5.0,
    "prepare_load": 5.0,
    "complete_load": 5.0,
    "finish": 5.0,
}
"""Milliseconds per call, and for "planning" microseconds per block.

`prepare_load`, `complete_load` and `finish` take all blocks of a request in one call, by contract. The benchmark's
60,000 blocks are more than the context of any model.
"""

LEAST = "least "
"""Precedes the name of a call, for the barest loops over its blocks."""


class Keys:
    """Makes distinct keys of the usual length (32-byte hash and group)."""

    def __init__(self) -> None:
        self._next = 0

    def take(self, count: int) -> list[OffloadKey]:
        """Return `count` new keys."""
        first, self._next = self._next, self._next + count
        return [make_offload_key(hashlib.sha256(i.to_bytes(8, "big")).digest(), 0) for i in range(first, first + count)]


class Bench:
    """Drives one manager as a scheduler does, with one step per request."""

    def __init__(self, num_blocks: int, policy: str, keys: Keys) -> None:
        view = memoryview(np.zeros((num_blocks, 1), dtype=np.uint8))  # no byte of it is read
        primary = CPUPrimaryTierOffloadingManager(num_blocks, view, POLICIES.load(policy)(num_blocks))
        self.manager = TieringOffloadingManager(primary)
        self.num_blocks = num_blocks
        self.keys = keys
        self.stored: list[list[OffloadKey]] = []
        self._requests = 0

    def request(self) -> ReqContext:
        """Announce a new request."""
        self._requests += 1
        context = ReqContext(f"request-{self._requests}")
        self.manager.on_new_request(context)
        return context

    def finish(self, context: ReqContext) -> None:
        """End the request and the step."""
        self.manager.on_request_finished(context)
        self.manager.on_schedule_end(ScheduleEndContext())

    def store(self, size: int) -> float:
        """Store a request of `size` new keys; return the thread-CPU seconds of `prepare_store` and `complete_store`."""
        keys, context = self.keys.take(size), self.request()
        done = set(keys)
        start = time.thread_time()
        output = self.manager.prepare_store(keys, context)
        self.manager.complete_store(done, context)
        seconds = time.thread_time() - start
        if output is None or len(output.keys_to_store) != size:
            raise RuntimeError("the benchmark's store was not taken whole")
        self.finish(context)
        self.stored.append(keys)
        return seconds

    def fill(self, size: int) -> list[float]:
        """Store requests until the primary tier is full; return the thread-CPU seconds of each."""
        return [self.store(size) for _ in range(self.num_blocks // size)]

    def lookup(self, keys: list[OffloadKey], expected: LookupResult) -> float:
        """Look keys up, one per call; return the thread-CPU seconds of all calls."""
        context, lookup = self.request(), self.manager.lookup
        start = time.thread_time()
        for key in keys:
            answer = lookup(key, context)
        seconds = time.thread_time() - start
        if answer is not expected:
            raise RuntimeError(f"the benchmark's lookup answered {answer}")
        self.finish(context)
        return seconds

    def load(self, keys: list[OffloadKey]) -> float:
        """Load a request; return the thread-CPU seconds of `prepare_load` and `complete_load`."""
        context, done = self.request(), set(keys)
        start = time.thread_time()
        self.manager.prepare_load(keys, context)
        self.manager.complete_load(done, context)
        seconds = time.thread_time() - start
        self.finish(context)
        return seconds

    def touch(self, keys: list[OffloadKey]) -> float:
        """Touch a request's keys; return the thread-CPU seconds."""
        context = self.request()
        start = time.thread_time()
        self.manager.touch(keys, context)
        seconds = time.thread_time() - start
        self.finish(context)
        return seconds


def dict_get(stored: list[list[OffloadKey]]) -> Iterator[float]:
    """Yield, per request, the thread-CPU seconds per key of a bare `dict.get`: the raw limit."""
    slots = {key: slot for slot, key in enumerate(key for keys in stored for key in keys)}
    get = slots.get
    for keys in stored:
        start = time.thread_time()
        for key in keys:
            get(key)
        yield (time.thread_time() - start) / len(keys)


def measure_round(num_blocks: int, size: int, policy: str, keys: Keys, samples: int) -> dict[str, float]:
    """Return the median seconds per block of every operation, in one new manager."""
    bench = Bench(num_blocks, policy, keys)
    per_block = lambda times: statistics.median(times) / size  # noqa: E731 - one expression, used below
    result = {"store": per_block(bench.fill(size))}
    picks = [bench.stored[i * len(bench.stored) // samples] for i in range(min(samples, len(bench.stored)))]
    missing = [keys.take(size) for _ in range(len(picks))]
    result["dict.get"] = statistics.median(dict_get(picks if num_blocks <= size else bench.stored))
    result["lookup hit"] = per_block([bench.lookup(k, LookupResult.HIT) for k in picks])
    result["lookup miss"] = per_block([bench.lookup(k, LookupResult.MISS) for k in missing])
    result["load"] = per_block([bench.load(k) for k in picks])
    result["touch"] = per_block([bench.touch(k) for k in picks])
    result["store evicting"] = per_block([bench.store(size) for _ in range(samples)])
    bench.manager.shutdown()
    return result


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of 10k blocks only")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--policies", default="lru,arc", help="names with commas, or all that are registered")
    options = parser.parse_args()
    policies = list(POLICIES.names()) if options.policies == "all" else options.policies.split(",")
    capacities = [10_000] if options.quick else [10_000, 200_000]
    rounds = 1 if options.quick else options.rounds
    cases = [(n, size, policy) for n in capacities for size in (64, 512, 8192) for policy in policies]
    collected: dict[tuple[int, int, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    keys = Keys()
    gc.disable()  # vLLM freezes its heap, so that the collector's pauses are short; they are no part of an operation
    for case in track([case for _ in range(rounds) for case in cases], description="measuring", transient=True):
        samples = max(2, 16384 // case[1])
        for operation, seconds in measure_round(*case, keys, samples).items():
            collected[case][operation].append(seconds)
        gc.collect()
    waits = measure_waits(10_000 if options.quick else 200_000, policies, keys, rounds)
    report(collected, waits, options.json)


def measure_waits(num_blocks: int, policies: list[str], keys: Keys, rounds: int) -> list[dict[str, float | str]]:
    """Return per policy and kind of request: microseconds per planned block, and the longest calls in milliseconds."""
    rows: list[dict[str, float | str]] = []
    share = num_blocks / 200_000
    for policy, (count, size) in [
        (p, c) for p in policies for c in ((1, int(60_000 * share)), (int(500 * share), 100))
    ]:
        longest: dict[str, float] = {}
        planning = math.inf
        for _ in range(rounds):
            calls: dict[str, list[float]] = {}
            for answers in (True, False):
                prompts = [keys.take(size) for _ in range(count)]
                bench = PromotionBench(num_blocks, policy, prompts, answers)
                filling = [keys.take(500) for _ in range(num_blocks // 500)]
                bench.fill(filling)
                num_steps = 20 + count * size // 250
                calls |= bench.run(num_steps) if answers else bench.run_silent(20)
                bench.manager.shutdown()
            if count > 1:  # a single prompt waits for its first blocks, and plans more as they arrive
                planning = min(planning, sum(calls["plan"]) / min(count * size, 20 * MAX_PLANNED))
            others = [key for prompt in [*filling, *prompts[1:]] for key in prompt][: num_blocks - size]
            calls |= {LEAST + name: seconds for name, seconds in least_seconds(prompts[0], others).items()}
            for name, seconds in calls.items():
                longest[name] = min(longest.get(name, math.inf), max(seconds))
            gc.collect()
        figures = {name: 1e3 * seconds for name, seconds in longest.items()}
        planned = {"planning": 1e6 * planning} if count > 1 else {}
        rows.append({"policy": policy, "requests": count, "keys": size, **planned, **figures})
    return rows


def report(
    collected: dict[tuple[int, int, str], dict[str, list[float]]],
    waits: list[dict[str, float | str]],
    path: Path | None,
) -> None:
    """Print the tables, and mark figures over their targets."""
    table = Table(title="thread-CPU nanoseconds a block (median of rounds)")
    table.add_column("blocks", justify="right")
    table.add_column("keys a request", justify="right")
    table.add_column("policy")
    table.add_column("dict.get", justify="right")
    for operation, target in TARGETS.items():
        table.add_column(f"{operation}\n< {target}", justify="right")
    rows = []
    for (num_blocks, size, policy), operations in collected.items():
        figures = {name: statistics.median(times) * 1e9 for name, times in operations.items()}
        rows.append({"blocks": num_blocks, "keys": size, "policy": policy, **figures})
        cells = [f"{figures[name]:.0f}{'' if figures[name] < goal else ' !'}" for name, goal in TARGETS.items()]
        table.add_row(f"{num_blocks:,}", str(size), policy, f"{figures['dict.get']:.0f}", *cells)
    console = Console(width=140)
    console.print(table)
    table = Table(title="longest calls in milliseconds, and planning in microseconds a block (least of rounds)")
    columns = {"policy": 0.0, "requests": 0.0, "keys": 0.0, **WAIT_TARGETS}
    for name, target in columns.items():
        table.add_column(f"{name}\n< {target:g}" if target else name, justify="right")
    for row in waits:
        cells = []
        for name, target in columns.items():
            value = row.get(name, "")
            over = target and not isinstance(value, str) and value > target
            cell = f"{value:.2f}{' !' if over else ''}" if isinstance(value, float) else f"{value}"
            cells.append(f"{cell} ({row[LEAST + name]:.2f})" if LEAST + name in row else cell)
        table.add_row(*cells)
    console.print(table)
    if path is not None:
        path.write_text(json.dumps({"targets": TARGETS, "rows": rows, "waits": waits}, indent=1))


if __name__ == "__main__":
    main()
