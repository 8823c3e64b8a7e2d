"""How many block accesses a second a replay makes, beside what its least bookkeeping would cost.

A replay sends each request through the production manager. The raw limit sends the same requests through one bare
`OrderedDict` per tier, in order of recency: it looks blocks up until the first that no tier has, enters all blocks into
every tier, and drops the oldest. It has no slots, states, pins, jobs, requests or time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvtier.keys import OffloadKey
from kvtier.simulator.formats import load_trace
from kvtier.simulator.replay import Replay
from kvtier.simulator.setup import Machine, Setup
from kvtier.simulator.trace import Trace

TARGET = 200_000
"""Least block accesses per second with two tiers."""

ROUNDS = 5
TOKEN_BYTES = 128 * 1024
"""KV cache of Llama-3.1-8B per token; back-pressure and transfer times depend on it."""

MACHINE = Machine(prefill_rate=100_000.0)
"""So fast that it keeps up with the traces; else thousands of requests would wait, and the replay measures waiting."""

SHARES = ((0.05, 0.0), (0.02, 0.6))
"""Sizes of memory and disk, as shares of the trace's different blocks."""


@dataclass(frozen=True)
class Figures:
    """Figures of one configuration.

    Attributes:
        replayed, bare: block accesses per thread-CPU second, medians of the rounds.
        ratio: median of the rounds' ratios of replayed to bare.
    """

    trace: str
    dram_blocks: int
    disk_blocks: int
    replayed: float
    bare: float
    ratio: float


def replay(trace: Trace, setup: Setup) -> float:
    """Return the thread-CPU seconds of a replay."""
    engine = Replay(trace, setup, MACHINE)
    start = time.thread_time()
    engine.run()
    return time.thread_time() - start


def replay_bare(trace: Trace, setup: Setup) -> float:
    """Return the thread-CPU seconds of the same requests in bare dictionaries."""
    sizes = [size for size in (setup.dram_blocks, setup.disk_blocks) if size]
    tiers = [OrderedDict[OffloadKey, None]() for _ in sizes]
    start = time.thread_time()
    for request in trace.requests:
        for key in request.keys:
            if not any(key in tier for tier in tiers):
                break
        used = [*request.keys, *request.answer_keys]
        for tier, size in zip(tiers, sizes, strict=True):
            for key in reversed(used):
                tier[key] = None
                tier.move_to_end(key)
            while len(tier) > size:
                tier.popitem(last=False)
    return time.thread_time() - start


def measure(trace: Trace, name: str, rounds: int) -> list[Figures]:
    """Return the figures of every configuration; replay and dictionaries take turns."""
    accesses = sum(len(request.keys) + len(request.answer_keys) for request in trace.requests)
    unique = len({key for request in trace.requests for key in (*request.keys, *request.answer_keys)})
    figures = []
    for dram, disk in SHARES:
        blocks = max(64, int(unique * dram)), int(unique * disk)
        setup = Setup("lru", *blocks, TOKEN_BYTES * trace.tokens_per_block)
        seconds = [(replay(trace, setup), replay_bare(trace, setup)) for _ in track(range(rounds), f"{name}, {blocks}")]
        replayed, bare = (statistics.median(column) for column in zip(*seconds, strict=True))
        ratio = statistics.median(least / whole for whole, least in seconds)
        figures.append(Figures(name, *blocks, accesses / replayed, accesses / bare, ratio))
    return figures


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="*", type=Path, help="traces that `kvtier simulate` reads")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    console, figures = Console(), []
    if not arguments.traces:
        console.print("no trace given: nothing to measure; see docs/planning.md")
    for path in arguments.traces:
        figures += measure(load_trace(path), path.name, 1 if arguments.quick else ROUNDS)
    table = Table(title=f"block accesses a second (with two tiers at least {TARGET:,})")
    for column in ("trace", "memory", "disk", "replay", "bare", "ratio"):
        table.add_column(column, justify="right")
    for row in figures:
        missed = " !" if row.disk_blocks and row.replayed < TARGET else ""
        speeds = f"{row.replayed:,.0f}{missed}", f"{row.bare:,.0f}", f"{row.ratio:.2f}"
        table.add_row(row.trace, f"{row.dram_blocks:,}", f"{row.disk_blocks:,}", *speeds)
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in figures], indent=1))


if __name__ == "__main__":
    main()
