"""What shadow caches cost the scheduler's thread, beside what the same requests cost the manager.

Requests of which a third has been there before go through a `TieringOffloadingManager` with LRU, through a bare LRU
policy, and through one with shadows, request by request. What the shadows add is the difference of the last two, as a
share of the first. They follow the requests until their credit is spent and rest until it is earned; "in the long run"
weighs both. A step's growth is what the slowest requests had more than LRU took for them.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from control_plane import Bench, Keys
from rich.console import Console
from rich.table import Table

from kvtier.abc import EvictionPolicy
from kvtier.eviction import shadows
from kvtier.eviction.auto import FOLLOWED, ShadowedPolicy
from kvtier.eviction.lru import LRUPolicy
from kvtier.eviction.shadows import EARNED_PER_USE, SampledUses
from kvtier.keys import OffloadKey
from kvtier.types import LookupResult

TARGET = 3.0
"""Percent of the control plane's cost, in the long run."""

REUSED = 1 / 3


def make_requests(count: int, size: int, keys: Keys, rng: random.Random) -> list[list[OffloadKey]]:
    """Return requests of `size` keys; REUSED of all keys are those of requests shortly before."""
    made: list[list[OffloadKey]] = []
    for _ in range(count):
        again = int(size * REUSED) if made else 0
        found = rng.choice(made[-100:])[:again] if again else []
        made.append([*found, *keys.take(size - again)])
    return made


def serve(bench: Bench, keys: list[OffloadKey]) -> float:
    """Give the manager one request; return thread-CPU seconds."""
    manager, context = bench.manager, bench.request()
    start = time.thread_time()
    hits = 0
    for key in keys:
        if manager.lookup(key, context) is not LookupResult.HIT:
            break
        hits += 1
    if hits:
        manager.prepare_load(keys[:hits], context)
        manager.complete_load(set(keys[:hits]), context)
    output = manager.prepare_store(keys[hits:], context)
    if output is not None:
        manager.complete_store(set(output.keys_to_store), context)
    bench.finish(context)
    return time.thread_time() - start


def use(policy: EvictionPolicy, keys: list[OffloadKey]) -> float:
    """Give a policy one request, as a table of slots does; return thread-CPU seconds."""
    hits = next((index for index, key in enumerate(keys) if key not in policy), len(keys))
    found, missing = keys[:hits], [key for key in keys[hits:] if key not in policy]
    start = time.thread_time()
    policy.touch(found)
    wanted = len(policy) + len(missing) - policy.capacity
    if wanted > 0:
        policy.evict(list(islice(policy.candidates(missing), wanted)))
    policy.insert(missing)
    return time.thread_time() - start


def time_all(policies: Sequence[EvictionPolicy], requests: list[list[OffloadKey]]) -> list[list[float]]:
    """Give every policy each request, in turn; return seconds by policy and request."""
    times: list[list[float]] = [[] for _ in policies]
    for keys in requests:
        for policy, mine in zip(policies, times, strict=True):
            mine.append(use(policy, keys))
    return times


def measure(num_blocks: int, size: int, count: int) -> dict[str, float]:
    """Return the figures of one size of cache and of request."""
    keys, rng = Keys(), random.Random(1)
    requests = make_requests(num_blocks // size + 2 * count, size, keys, rng)
    fill, timed = requests[: -2 * count], requests[-2 * count :]
    bench = Bench(num_blocks, "lru", keys)
    plain, following, resting = LRUPolicy(num_blocks), make_shadowed(num_blocks, 1 << 40), make_shadowed(num_blocks, 0)
    resting_uses = resting._shadows.uses  # its credit is taken away: a rest that does not end
    resting_uses.resting, resting_uses._credit = True, -1e12
    policies = (plain, following, resting)
    for request in fill:
        serve(bench, request)
    time_all(policies, fill)
    control = sum(serve(bench, request) for request in timed)
    plain_times, following_times, resting_times = time_all(policies, timed)
    grown = sorted(theirs - mine for theirs, mine in zip(following_times, plain_times, strict=True))
    rate = SampledUses(num_blocks).sampler.capacity / num_blocks
    share_following = min(1.0, EARNED_PER_USE / rate)
    while_following = 100 * (sum(following_times) - sum(plain_times)) / control
    while_resting = 100 * (sum(resting_times) - sum(plain_times)) / control
    return {
        "blocks": num_blocks,
        "keys": size,
        "control plane ns": control * 1e9 / (len(timed) * size),
        "1 sampled of": 1 / rate,
        "following %": while_following,
        "resting %": while_resting,
        "time following %": 100 * share_following,
        "in the long run %": share_following * while_following + (1 - share_following) * while_resting,
        "median growth us": statistics.median(grown) * 1e6,
        "p99 growth us": grown[int(len(grown) * 0.99)] * 1e6,
    }


def make_shadowed(num_blocks: int, credit: int) -> ShadowedPolicy:
    """Return LRU with shadows that have so much credit."""
    former, shadows.FIRST_CREDIT = shadows.FIRST_CREDIT, credit
    try:
        return ShadowedPolicy(num_blocks, "lru", FOLLOWED)
    finally:
        shadows.FIRST_CREDIT = former


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10,000 blocks only")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    gc.disable()
    sizes = [(10_000, 64), (10_000, 512), (200_000, 64), (200_000, 512)]
    cases = [(10_000, 64, 400)] if options.quick else [(*size, 80_000 // size[1]) for size in sizes]
    rows = [measure(*case) for case in cases]
    table = Table(title="shadow caches: thread-CPU time added to the control plane")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        late = " !" if row["in the long run %"] > TARGET else ""
        table.add_row(*(f"{v:,.1f}{late if k.startswith('in the') else ''}" for k, v in row.items()))
    Console(width=150).print(table)
    if options.json:
        options.json.write_text(json.dumps({"target": TARGET, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
