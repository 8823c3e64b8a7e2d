"""What a disk is worth, whatever the disk: traces and devices, with and without it, beside the best fixed deadline.

Replays a trace through the production manager. Prints hit rate and seconds to the first token without a disk, with one,
and with one whose blocks are all promoted and awaited for the best of several fixed times (that with the least p95).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from kvtier.simulator.formats import load_trace
from kvtier.simulator.replay import Replay
from kvtier.simulator.results import Result
from kvtier.simulator.setup import Machine, Setup
from kvtier.simulator.trace import Trace
from kvtier.tiering.settings import TieringSettings

BYTES_PER_TOKEN = 131_072
"""Of Llama-3.1-8B."""
DEVICES = ((0.2, 20.0), (1.0, 1.0), (3.0, 0.1), (6.0, 0.1), (25.0, 0.1))
"""GB/s read, of which half is written, and milliseconds."""
DEADLINES = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


def run(trace: Trace, machine: Machine, memory: int, disk: int, deadline: float | None = None) -> Result:
    """Replay with LRU; a `deadline` promotes everything and waits so many seconds."""
    setup = Setup("lru", memory, disk, BYTES_PER_TOKEN * trace.tokens_per_block)
    if deadline is not None:
        setup = replace(setup, settings=TieringSettings(load_deadline=deadline), predicts=False)
    return Replay(trace, setup, machine).run()


def line(label: str, result: Result) -> str:
    """Return one row of the table."""
    times = " | ".join(f"{result.first_token_at(percent):.2f}" for percent in (50, 95, 99))
    return f"| {label} | {100 * result.hit_rate:.1f} | {times} |"


def main() -> None:
    """Print the table of one trace."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--tokens-per-block", type=int)
    parser.add_argument("--requests", type=int, help="replay the first ones only")
    parser.add_argument("--memory-share", type=float, default=0.05, help="of the trace's different blocks")
    parser.add_argument("--prefill-rate", type=float, default=10_000.0)
    parser.add_argument("--fixed", action="store_true", help="search the best fixed deadline, too")
    args = parser.parse_args()
    trace = load_trace(args.trace, args.tokens_per_block)
    trace = replace(trace, requests=trace.requests[: args.requests])
    memory, disk = max(1, int(trace.num_unique * args.memory_share)), trace.num_kept
    print("| device | hits, % | TTFT p50, s | p95 | p99 |\n|---|---|---|---|---|")
    print(line("none", run(trace, Machine(prefill_rate=args.prefill_rate), memory, 0)))
    for bandwidth, milliseconds in DEVICES:
        read = bandwidth * 1e9
        machine = Machine(args.prefill_rate, disk_read=read, disk_write=read / 2, disk_latency=milliseconds / 1e3)
        print(line(f"{bandwidth:g} GB/s, {milliseconds:g} ms", run(trace, machine, memory, disk)), flush=True)
        if args.fixed:
            found = {deadline: run(trace, machine, memory, disk, deadline) for deadline in DEADLINES}
            best = min(found, key=lambda deadline: found[deadline].first_token_at(95))
            print(line(f"the same, everything, {best:g} s", found[best]), flush=True)


if __name__ == "__main__":
    main()
