"""What share of a trace's blocks each eviction policy hits in kvtier's manager, over the size of the cache.

A hit is a block before the first missing block of a request: an engine can load it instead of computing it. Every
figure comes from the simulator, which drives the production manager. An independent replay drives the bare policy with
the manager's two rules: a request evicts none of its own blocks, and at its end its blocks are settled tail-first. Its
number of hits must be the same; if not, the table has a further row with its hits. The table also has a textbook LRU,
without these rules, and Belady's bound.

With `--disk` a disk is below the memory, and a hit may come from either: the table has all hits of each policy, and
those from memory.
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from heapq import heappop, heappush
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvtier.abc import EvictionPolicy
from kvtier.keys import OffloadKey
from kvtier.registry import POLICIES
from kvtier.simulator.formats import load_trace
from kvtier.simulator.replay import Replay
from kvtier.simulator.setup import Machine, Setup
from kvtier.simulator.trace import Trace

SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
NEVER = 1 << 60
TEXTBOOK = "textbook lru"
BELADY = "belady"
TOKEN_BYTES = 128 * 1024
"""KV cache of Llama-3.1-8B per token. It decides how long a disk takes."""

Requests = Sequence[Sequence[OffloadKey]]


def leading(held: Iterable[bool]) -> int:
    """Return the number of true values before the first false one."""
    count = 0
    for is_held in held:
        if not is_held:
            break
        count += 1
    return count


def replay(trace: Trace, policy: str, capacity: int) -> int:
    """Return the hits of the production manager with a primary tier of `capacity` blocks."""
    return Replay(trace, Setup(policy, capacity, 0, 1 << 20), Machine()).run().num_hits


def measure_with_disk(
    trace: Trace, names: Sequence[str], shares: Sequence[float], disk: float, machine: Machine
) -> dict[str, dict[str, float]]:
    """Return hits in percent of all blocks, all and from memory, by policy and size of the memory.

    Args:
        disk: size of the disk, as a share of the different blocks.
    """
    rows: dict[str, dict[str, float]] = {}
    for name in track(names, "replaying"):
        for share in shares:
            sizes = (max(1, int(trace.num_unique * part)) for part in (share, disk))
            result = Replay(trace, Setup(name, *sizes, TOKEN_BYTES * trace.tokens_per_block), machine).run()
            for row, hits in ((name, result.num_hits), (f"{name}, from memory", result.hits.get("primary", 0))):
                rows.setdefault(row, {})[f"{share:.1%}"] = 100 * hits / trace.num_accesses
    return rows


def replay_bare(policy: EvictionPolicy, trace: Trace) -> int:
    """Return the hits of a policy without the manager, driven by the manager's rules."""
    total = 0
    for request in trace.requests:
        keys, own = request.keys, set(request.keys)
        hits = leading(key in policy for key in keys)
        total += hits
        policy.touch(keys[:hits], request.time)
        policy.touch([key for key in keys[hits:] if key in policy], request.time)
        missing = [key for key in keys[hits:] if key not in policy]
        wanted = max(0, len(policy) + len(missing) - policy.capacity)
        policy.evict(list(islice((key for key in policy.candidates(missing) if key not in own), wanted)))
        policy.insert(missing[: policy.capacity - len(policy)], request.time)
        policy.settle(keys)
    return total


def replay_textbook_lru(capacity: int, requests: Requests) -> int:
    """Return the hits of a plain LRU cache; it takes a request's blocks one by one, from the last to the first."""
    held: OrderedDict[OffloadKey, None] = OrderedDict()
    total = 0
    for keys in requests:
        total += leading(key in held for key in keys)
        for key in reversed(keys):
            held[key] = None
            held.move_to_end(key)
            if len(held) > capacity:
                held.popitem(last=False)
    return total


def replay_belady(capacity: int, requests: Requests) -> int:
    """Return the hits of Belady's algorithm, which knows the future.

    It evicts the block with the latest next use, of equal ones the one nearer to the prompt's end. It does not take
    blocks without a next use.
    """
    next_use: dict[OffloadKey, int] = {}
    coming: list[list[int]] = []
    for index in range(len(requests) - 1, -1, -1):
        coming.append([next_use.get(key, NEVER) for key in requests[index]])
        next_use.update(dict.fromkeys(requests[index], index))
    held: dict[OffloadKey, int] = {}
    queue: list[tuple[int, int, OffloadKey]] = []
    total = 0
    for keys, uses in zip(requests, reversed(coming), strict=True):
        total += leading(key in held for key in keys)
        for position, (key, use) in enumerate(zip(keys, uses, strict=True)):
            if use < NEVER or key in held:
                held[key] = use
                heappush(queue, (-use, -position, key))
        while len(held) > capacity:
            use, _, key = heappop(queue)
            if held.get(key) == -use:
                del held[key]
    return total


def measure(trace: Trace, names: Sequence[str], shares: Sequence[float]) -> dict[str, dict[str, float]]:
    """Return hits in percent of all blocks, by policy and cache size (a share of the different blocks).

    If the independent replay differs, its hits are under "NAME, bare".
    """
    requests = [request.keys for request in trace.requests]
    rows: dict[str, dict[str, float]] = {}
    for name in track([*names, TEXTBOOK, BELADY], "replaying"):
        for share in shares:
            capacity = max(1, int(trace.num_unique * share))
            if name == BELADY:
                hits = replay_belady(capacity, requests)
            elif name == TEXTBOOK:
                hits = replay_textbook_lru(capacity, requests)
            else:
                hits = replay(trace, name, capacity)
                bare = replay_bare(POLICIES.load(name)(capacity), trace)
                if bare != hits:
                    rows.setdefault(f"{name}, bare", {})[f"{share:.1%}"] = 100 * bare / trace.num_accesses
            rows.setdefault(name, {})[f"{share:.1%}"] = 100 * hits / trace.num_accesses
    return rows


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "traces", nargs="*", type=Path, help="traces that `kvtier simulate` reads; FILE:64 has blocks of 64 tokens"
    )
    parser.add_argument("--quick", action="store_true", help="the first 1,000 requests, three sizes")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--shares", help="sizes of the cache as shares of the different blocks, with commas: 0.01,0.05")
    parser.add_argument("--disk", type=float, default=0.0, help="size of a disk below, as such a share: 1")
    parser.add_argument("--prefill-rate", type=float, default=Machine().prefill_rate, help="tokens/s, beside a disk")
    parser.add_argument("--policies", default=",".join(POLICIES.names()), help="names, with commas")
    arguments = parser.parse_args()
    console, figures = Console(), {}
    if not arguments.traces:
        console.print("no trace given: nothing to measure; see docs/policies.md")
    shares = (0.01, 0.05, 0.2) if arguments.quick else SHARES
    if arguments.shares:
        shares = tuple(map(float, arguments.shares.split(",")))
    for path in arguments.traces:
        trace = read(path, 1000 if arguments.quick else None)
        names = arguments.policies.split(",")
        if arguments.disk:
            machine = Machine(prefill_rate=arguments.prefill_rate)
            rows = measure_with_disk(trace, names, shares, arguments.disk, machine)
        else:
            rows = measure(trace, names, shares)
        figures[trace.name] = rows
        table = Table(title=f"{trace.name}: blocks hit, %; cache as a share of unique blocks")
        columns = [f"{share:.1%}" for share in shares]
        for column in ("policy", *columns):
            table.add_column(column, justify="right")
        for name, row in rows.items():
            table.add_row(name, *(f"{row[column]:.1f}" if column in row else "" for column in columns))
        console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


def read(path: Path, most: int | None) -> Trace:
    """Return a trace with its first `most` requests, or all if None; the path may end with ":" and a block size."""
    name, _, tokens = str(path).partition(":")
    trace = load_trace(Path(name), int(tokens) if tokens else None)
    return replace(trace, requests=trace.requests[:most])


if __name__ == "__main__":
    main()
