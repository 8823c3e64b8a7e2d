"""What a disk is worth, whatever the disk: traces and devices, with and without it, beside the best fixed deadline.

Replays a trace through the production manager. Prints hit rate and seconds to the first token without a disk, with one,
and with one whose blocks are all promoted and awaited for the best of several fixed times (that with the least p95).
A figure is marked where a disk makes it worse than none (by more than 0.1 points of hits or 1% of the time), or where
its p95 is over that of the best fixed time by more than 10%.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

from kvtier.simulator.formats import load_trace
from kvtier.simulator.replay import Replay
from kvtier.simulator.results import Result
from kvtier.simulator.setup import Machine, Setup
from kvtier.simulator.trace import Trace
from kvtier.tiering.settings import TieringSettings

BYTES_PER_TOKEN = 131_072
"""KV cache of Llama-3.1-8B in 16 bits."""
BANDWIDTHS, LATENCIES = "0.2,1,3,6,25", "0.1,1,5,20"
DEADLINES = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
PERCENTILES = (50, 95, 99)
WORSE_HITS, WORSE_TIME, WORSE_THAN_FIXED = 0.001, 1.01, 1.10


def run(trace: Trace, machine: Machine, memory: int, disk: int, deadline: float | None = None) -> Result:
    """Replay with LRU.

    Args:
        memory, disk: sizes in blocks.
        deadline: promote all blocks and wait at most so many seconds; None: the manager decides what to load.
    """
    setup = Setup("lru", memory, disk, BYTES_PER_TOKEN * trace.tokens_per_block)
    if deadline is not None:
        setup = replace(setup, settings=TieringSettings(load_deadline=deadline), predicts=False)
    return Replay(trace, setup, machine).run()


def times(result: Result) -> list[float]:
    """Return `PERCENTILES` of the time to the first token, in seconds."""
    return [result.first_token_at(percent) for percent in PERCENTILES]


def line(label: str, result: Result, none: Result | None = None, best: tuple[float, Result] | None = None) -> str:
    """Return one row of the table.

    Args:
        none: the result without a disk, for marks.
        best: the best fixed deadline and its result.
    """
    hits = f"{100 * result.hit_rate:.1f}"
    cells = [f"{seconds:.2f}" for seconds in times(result)]
    if none is not None:
        hits += " !" if result.hit_rate < none.hit_rate - WORSE_HITS else ""
        pairs = zip(cells, times(result), times(none), strict=True)
        cells = [cell + (" !" if seconds > WORSE_TIME * before else "") for cell, seconds, before in pairs]
    if best is not None:
        ratio = result.first_token_at(95) / best[1].first_token_at(95)
        mark = " !" if ratio > WORSE_THAN_FIXED else ""
        fixed = " / ".join(f"{seconds:.2f}" for seconds in times(best[1]))
        cells.append(f"{best[0]:g} s: {100 * best[1].hit_rate:.1f}, {fixed} | {ratio:.2f}{mark}")
    return f"| {label} | {hits} | {' | '.join(cells)} |"


def search(trace: Trace, machine: Machine, memory: int, disk: int) -> tuple[float, Result]:
    """Return the fixed deadline with the least p95 of the time to the first token, and its result."""
    found = {deadline: run(trace, machine, memory, disk, deadline) for deadline in DEADLINES}
    best = min(found, key=lambda deadline: found[deadline].first_token_at(95))
    return best, found[best]


def main() -> None:
    """Read the command line, and print the table of one trace."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--tokens-per-block", type=int)
    parser.add_argument("--requests", type=int, help="replay the first ones only")
    parser.add_argument("--memory-share", type=float, default=0.05, help="of the trace's different blocks")
    parser.add_argument("--prefill-rate", type=float, default=10_000.0)
    parser.add_argument("--bandwidths", default=BANDWIDTHS, help="GB/s read, of which half is written")
    parser.add_argument("--latencies", default=LATENCIES, help="milliseconds")
    parser.add_argument("--fixed", action="store_true", help="search the best fixed deadline, too")
    args = parser.parse_args()
    trace = load_trace(args.trace, args.tokens_per_block)
    trace = replace(trace, requests=trace.requests[: args.requests])
    memory, disk = max(1, int(trace.num_unique * args.memory_share)), trace.num_kept
    extra = " best fixed wait: hits, p50 / p95 / p99 | p95 by the fixed |" if args.fixed else ""
    print(f"| device | hits, % | TTFT p50, s | p95 | p99 |{extra}\n|---|---|---|---|---|" + "---|" * extra.count(" |"))
    none = run(trace, Machine(prefill_rate=args.prefill_rate), memory, 0)
    print(line("none", none) + (" | |" if args.fixed else ""), flush=True)
    for bandwidth, latency in itertools.product(args.bandwidths.split(","), args.latencies.split(",")):
        read = float(bandwidth) * 1e9
        machine = Machine(args.prefill_rate, disk_read=read, disk_write=read / 2, disk_latency=float(latency) / 1e3)
        best = search(trace, machine, memory, disk) if args.fixed else None
        label = f"{bandwidth} GB/s, {latency} ms"
        print(line(label, run(trace, machine, memory, disk), none, best), flush=True)


if __name__ == "__main__":
    main()
