"""What share of a trace's blocks each eviction policy hits, over the size of the cache, beside Belady's bound.

A hit is a block of a request's leading run of held blocks: what an engine can load instead of computing. The trace is
a file of JSON lines with `hash_ids`, one id a block of the prompt, in prefix order, equal ids being equal prefixes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvtier.abc import EvictionPolicy
from kvtier.eviction.arc import ARCPolicy
from kvtier.eviction.auto import AutoPolicy
from kvtier.eviction.lru import LRUPolicy
from kvtier.eviction.prefix import PrefixPolicy
from kvtier.eviction.s3fifo import S3FIFOPolicy
from kvtier.eviction.tinylfu import TinyLFUPolicy
from kvtier.keys import OffloadKey, make_offload_key

POLICIES: dict[str, type[EvictionPolicy]] = {
    "lru": LRUPolicy,
    "arc": ARCPolicy,
    "s3fifo": S3FIFOPolicy,
    "tinylfu": TinyLFUPolicy,
    "prefix": PrefixPolicy,
    "auto": AutoPolicy,
}
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
NEVER = 1 << 60

Requests = Sequence[Sequence[OffloadKey]]


def read_trace(path: Path, most: int | None) -> Requests:
    """Return the keys of the first `most` requests, all of them if None."""
    keys: dict[int, OffloadKey] = {}
    with path.open() as lines:
        numbers = [json.loads(line)["hash_ids"] for line in islice(lines, most)]
    return [[keys.setdefault(n, make_offload_key(n.to_bytes(32, "big"), 0)) for n in request] for request in numbers]


def leading(held: Iterable[bool]) -> int:
    """Return how many values are true before the first that is not."""
    count = 0
    for is_held in held:
        if not is_held:
            break
        count += 1
    return count


def replay(policy: EvictionPolicy, requests: Requests) -> int:
    """Serve `requests` as a tier does; return the number of hits."""
    total = 0
    for keys in requests:
        hits = leading(key in policy for key in keys)
        total += hits
        policy.touch(keys[:hits])
        policy.touch([key for key in keys[hits:] if key in policy])
        missing = [key for key in keys[hits:] if key not in policy]
        wanted = len(policy) + len(missing) - policy.capacity
        if wanted > 0:
            own = set(keys)
            victims = list(islice((key for key in policy.candidates(missing) if key not in own), wanted))
            policy.evict(victims)
        policy.insert(missing[: policy.capacity - len(policy)])
    return total


def replay_belady(capacity: int, requests: Requests) -> int:
    """Return the hits of a cache that knows the future: last needed goes first, tail before head; it may refuse."""
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


def measure(requests: Requests, names: Sequence[str], shares: Sequence[float]) -> dict[str, dict[str, float]]:
    """Return hits in percent of all blocks, by policy and share; beside them the microseconds a block."""
    blocks, unique = sum(map(len, requests)), len({key for keys in requests for key in keys})
    rows: dict[str, dict[str, float]] = {}
    for name in track([*names, "belady"], "replaying"):
        row = rows[name] = {}
        start = time.thread_time()
        for share in shares:
            capacity = max(1, int(unique * share))
            policy = POLICIES.get(name)
            hits = replay_belady(capacity, requests) if policy is None else replay(policy(capacity), requests)
            row[f"{share:.1%}"] = 100 * hits / blocks
        row["us/block"] = (time.thread_time() - start) * 1e6 / (blocks * len(shares))
    return rows


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="*", type=Path, help="files of JSON lines with hash_ids")
    parser.add_argument("--quick", action="store_true", help="the first 1,000 requests, three sizes")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--policies", default=",".join(POLICIES), help="names, with commas")
    arguments = parser.parse_args()
    console, figures = Console(), {}
    if not arguments.traces:
        console.print("no trace given: nothing to measure; see docs/policies.md")
    shares = (0.01, 0.05, 0.2) if arguments.quick else SHARES
    for path in arguments.traces:
        requests = read_trace(path, 1000 if arguments.quick else None)
        rows = figures[path.name] = measure(requests, arguments.policies.split(","), shares)
        table = Table(title=f"{path.name}: blocks hit, %; cache as a share of unique blocks")
        for column in ("policy", *next(iter(rows.values()))):
            table.add_column(column, justify="right")
        for name, row in rows.items():
            table.add_row(name, *(f"{value:.1f}" for value in row.values()))
        console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
