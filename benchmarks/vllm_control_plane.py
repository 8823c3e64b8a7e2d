"""What a block costs vLLM's scheduler thread: with vLLM's own manager of tiers, with kvtier, and with a disk below.

Run with the Python of an environment that has vLLM and kvtier (`make test-vllm` makes one). Prints nanoseconds of the
thread's CPU time per block, request or step, for three managers that take turns within one run: vLLM's own, kvtier's
as vLLM calls it (the adapter), and kvtier's alone. A second table has microseconds per request with a disk below:
vLLM's own filesystem tier, and kvtier's disk. Every figure is the median of several rounds.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

KEYS_PER_REQUEST = 512
NUM_LIVE = 256
TARGETS = {
    "lookup hit": (6.0, 6.0),
    "lookup miss": (6.0, 6.0),
    "store": (4.0, 2.0),
    "store evicting": (4.0, 2.0),
    "load": (3.5, 1.8),
    "touch": (1.0, 1.0),
    "new request": (1.0, 1.0),
    "end of it": (1.0, 1.0),
    "empty step": (1.0, 1.0),
    f"step beside {NUM_LIVE} live requests": (1.0, 1.0),
    "reports of a step": (1.0, 1.0),
}
"""How many times as fast as vLLM's the adapter should be, with LRU and with ARC. For lookups, at most
`MOST_OF_BARE` times kvtier's manager alone is enough, too."""
MOST_OF_BARE = 1.3

Figures = dict[str, dict[str, float]]
"""Nanoseconds by operation and manager."""


def measure_round(num_blocks: int, policy: str, hashes: Any, samples: int, turn: int) -> Figures:
    """Return the median of each operation in new managers, which take turns at each sample."""
    from vllm_managers import RIGS

    names = [*RIGS][turn % 3 :] + [*RIGS][: turn % 3]  # no manager is always the first one
    rigs = {name: RIGS[name](num_blocks, policy) for name in names}
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    size = KEYS_PER_REQUEST

    def sample(operation: str, scale: int, call: Any) -> None:
        for name, rig in rigs.items():
            times[operation][name].append(1e9 * call(rig) / scale)

    stored = [hashes.take(size) for _ in range(num_blocks // size)]
    for prompt in stored:
        sample("store", size, lambda rig, prompt=prompt: rig.store(prompt))
    for index in range(samples):
        prompt = stored[index * len(stored) // samples]
        sample("lookup hit", size, lambda rig, prompt=prompt: rig.lookup(prompt, "HIT"))
        unknown = hashes.take(size)
        sample("lookup miss", size, lambda rig, unknown=unknown: rig.lookup(unknown, "MISS"))
        sample("load", size, lambda rig, prompt=prompt: rig.load(prompt))
        recent = stored[-1 - index % len(stored)]
        sample("touch", size, lambda rig, recent=recent: rig.touch(recent))
    for _ in range(samples):
        new = hashes.take(size)
        sample("store evicting", size, lambda rig, new=new: rig.store(new))
        for name, rig in rigs.items():
            for operation, seconds in zip(("new request", "end of it"), rig.new_requests(64), strict=True):
                times[operation][name].append(1e9 * seconds / 64)
        sample("empty step", 64, lambda rig: rig.steps(64, rig.step))
    prompts = [hashes.take(8) for _ in range(NUM_LIVE)]
    contexts = {name: rig.run_requests(prompts) for name, rig in rigs.items()}
    for _ in range(samples):
        sample(f"step beside {NUM_LIVE} live requests", 64, lambda rig: rig.steps(64, rig.step))
        sample("reports of a step", 64, lambda rig: rig.steps(64, rig.report))
    for name, rig in rigs.items():
        for context in contexts[name]:
            rig.end(context)
        rig.manager.shutdown()
    return {operation: {name: statistics.median(ns) for name, ns in by.items()} for operation, by in times.items()}


def measure(sizes: tuple[int, ...], rounds: int, samples: int) -> list[dict[str, Any]]:
    """Return one row per size, policy and operation."""
    from vllm_managers import HashSource

    hashes = HashSource()
    collected: dict[tuple[int, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for turn in range(rounds):
        for num_blocks in sizes:
            for policy in ("lru", "arc"):
                for operation, by in measure_round(num_blocks, policy, hashes, samples, turn).items():
                    for name, ns in by.items():
                        collected[num_blocks, policy, operation][name].append(ns)
                gc.collect()
    return [
        {"blocks": num_blocks, "policy": policy, "operation": operation}
        | {name: statistics.median(ns) for name, ns in by.items()}
        for (num_blocks, policy, operation), by in collected.items()
    ]


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table, and mark ratios that miss their target."""
    print("nanoseconds of CPU per block, request or step\n")
    print("| blocks | policy | operation | vLLM | adapter | bare | vLLM / adapter | target | adapter / bare |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        target = TARGETS[row["operation"]][row["policy"] == "arc"]
        faster, over_bare = row["vLLM"] / row["adapter"], row["adapter"] / row["bare"]
        is_met = faster >= target or (row["operation"].startswith("lookup") and over_bare <= MOST_OF_BARE)
        print(
            f"| {row['blocks']:,} | {row['policy']} | {row['operation']} | {row['vLLM']:,.0f} | {row['adapter']:,.0f}"
            f" | {row['bare']:,.0f} | {faster:.1f}{'' if is_met else ' !'} | {target:g} | {over_bare:.2f} |"
        )


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of 10,000 blocks, and 512 keys on disk, only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("memory", "disk"), help="one of the two tables")
    parser.add_argument("--json", type=Path, default=None, help="write the figures there")
    options = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        print("VLLM IS NOT INSTALLED: nothing was measured; run this with an environment's Python that has it")
        sys.exit(0)
    gc.disable()  # vLLM freezes its heap, so that the collector's pauses are short; they are no part of an operation
    sizes, rounds, samples = ((10_000,), 1, 8) if options.quick else ((10_000, 200_000), options.rounds, 32)
    figures: dict[str, list[dict[str, Any]]] = {}
    if options.only != "disk":
        figures["memory"] = measure(sizes, rounds, samples)
        report(figures["memory"])
    if options.only != "memory":
        from vllm_with_disk import measure_disks, report_disks

        figures["disk"] = measure_disks((512,) if options.quick else (512, 8192), rounds)
        report_disks(figures["disk"])
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
