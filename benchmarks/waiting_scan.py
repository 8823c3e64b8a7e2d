"""What a waiting request costs each of vLLM's scheduler steps: its prefix is scanned again while a tier reads for it.

Run with the Python of an environment that has vLLM and kvtier (`make test-vllm` makes one). The blocks lie in a real
disk tier whose I/O process is stopped, so that nothing arrives: every further step asks about the whole prefix through
vLLM's own lookups, for a KV group of full attention and for one with a sliding window, and ends with
`on_schedule_end`. The raw limit is the same lookup of vLLM over a manager that answers the same with constants.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BLOCK_BYTES = 4096
WINDOW = 64
TARGET_MICROSECONDS = 20.0


class Rig:
    """kvtier's manager for vLLM, with `num_keys` blocks that are in its disk tier and no longer in host memory."""

    def __init__(self, folder: Path, num_keys: int) -> None:
        from vllm.v1.kv_offload import base

        from kvtier.adapters.vllm.manager import KVTierOffloadingManager
        from kvtier.config import KVCacheGroup, OffloadingConfig
        from kvtier.metrics.counters import Observations
        from kvtier.namespace import Namespace
        from kvtier.spec.tiering import TieringOffloadingSpec

        folder.mkdir(exist_ok=True)
        capacity = int(num_keys * 1.5) * BLOCK_BYTES
        tier = {"type": "disk", "path": str(folder / f"disk-{num_keys}"), "capacity": 4 * capacity, "job_deadline": 600}
        extra = {"cpu_bytes_to_use": capacity, "secondary_tiers": [tier], "load_deadline": 600, "tier_deadline": 600}
        extra["prefill_rate"] = 1.0  # else the request waits no longer than a fast engine would compute
        config = OffloadingConfig(
            extra_config=extra,
            groups=(KVCacheGroup(16, ("layer",)),),
            engine_block_bytes=BLOCK_BYTES,
            namespace=Namespace({"benchmark": "waiting scan"}),
        )
        self.base = base
        self.spec = TieringOffloadingSpec(config)
        self.inner = self.spec.get_manager()
        self.spec.wait_for_tiers(30)
        core = SimpleNamespace(
            manager=self.inner,
            control=self.spec.arena.control,
            shutdown=self.spec.shutdown,
            off_reason=None,
            observations=Observations(),
        )
        self.manager = KVTierOffloadingManager(core)
        self.keys = self._make_keys(num_keys, 0)
        self._store(self.keys)
        self._store(self._make_keys(num_keys, 1 << 32))
        self.context = self._request("waits", self.keys)

    def _make_keys(self, count: int, first: int) -> list[Any]:
        return [self.base.make_offload_key((first + index).to_bytes(32, "big"), 0) for index in range(count)]

    def _request(self, name: str, keys: list[Any]) -> Any:
        context = self.base.ReqContext(name)
        if hasattr(context, "set_offload_key_position"):
            for index, key in enumerate(keys):
                context.set_offload_key_position(key, (index + 1) * 16)
        self.manager.on_new_request(context)
        return context

    def _store(self, keys: list[Any]) -> None:
        context = self._request(f"stores-{keys[0].hex()}", keys)
        for start in range(0, len(keys), 256):
            part = self.manager.prepare_store(keys[start : start + 256], context).keys_to_store
            self.manager.complete_store(part, context)
            self._end_step()
            deadline = time.monotonic() + 30
            while self.manager.has_pending_work() and time.monotonic() < deadline:
                self._end_step()
        self.manager.on_request_finished(context)

    def _end_step(self) -> None:
        self.manager.on_schedule_end(self.base.ScheduleEndContext((), ()))

    def step(self, lookup: Callable[[Any, list[Any], Any], Any]) -> tuple[float, float]:
        """Scan once and end the step; return the microseconds of the scan and of the step's end."""
        start = time.perf_counter()
        answer = lookup(self.manager, self.keys, self.context)
        scanned = time.perf_counter()
        self._end_step()
        ended = time.perf_counter()
        if answer is not None:
            raise SystemExit(f"the request does not wait: vLLM's lookup returned {answer}")
        return (scanned - start) * 1e6, (ended - scanned) * 1e6

    def io_processes(self) -> list[int]:
        """Return the ids of the tiers' I/O processes."""
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def lookups() -> dict[str, Callable[[Any, list[Any], Any], Any]]:
    """Return vLLM's two lookups as functions of manager, keys and context."""
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler

    tracker = SimpleNamespace(record_lookup=lambda *_: None)
    window = OffloadingConnectorScheduler._sliding_window_lookup
    more = [WINDOW] if "initial_window_size" in inspect.signature(window).parameters else []
    prefix = OffloadingConnectorScheduler._maximal_prefix_lookup
    return {
        "full attention": lambda manager, keys, context: prefix(
            SimpleNamespace(manager=manager, _events_tracker=tracker), keys, context, None, None, 0
        ),
        f"sliding window of {WINDOW}": lambda manager, keys, context: window(
            SimpleNamespace(manager=manager), keys, WINDOW, context, *more
        ),
    }


def constant_manager() -> Any:
    """Return a manager whose second answer is MISS and whose other answers are HIT_PENDING, at almost no cost."""
    from vllm.v1.kv_offload.base import LookupResult

    class Constant:
        def __init__(self) -> None:
            self.calls = 0

        def lookup(self, key: Any, context: Any) -> Any:
            self.calls += 1
            return LookupResult.MISS if self.calls == 2 else LookupResult.HIT_PENDING

    return Constant()


def raw_limit(lookup: Callable[[Any, list[Any], Any], Any], keys: list[Any], rounds: int) -> float:
    """Return the median microseconds of vLLM's lookup over a manager with constant answers."""
    times = []
    for _ in range(rounds):
        manager = constant_manager()
        start = time.perf_counter()
        lookup(manager, keys, None)
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def measure(folder: Path, num_keys: int, rounds: int) -> list[dict[str, Any]]:
    """Return one row per kind of attention."""
    rows = []
    for kind, lookup in lookups().items():
        rig = Rig(folder / kind.replace(" ", "-"), num_keys)
        try:
            stopped = rig.io_processes()
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            first, plan = rig.step(lookup)
            rig.step(lookup)
            steps = [rig.step(lookup) for _ in range(rounds)]
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        finally:
            rig.manager.shutdown()
        scans = sorted(scan for scan, _ in steps)
        rows.append(
            {
                "lookup": kind,
                "keys": num_keys,
                "first_scan_us": first,
                "first_plan_us": plan,
                "raw_us": raw_limit(lookup, rig.keys, rounds),
                "scan_us": statistics.median(scans),
                "scan_p99_us": scans[int(len(scans) * 0.99)],
                "end_of_step_us": statistics.median(end for _, end in steps),
            }
        )
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table, and mark medians over the target."""
    print(f"microseconds; the target of a repeated scan is {TARGET_MICROSECONDS:.0f}\n")
    print("| lookup | keys | first scan | its plan | repeated scan | p99 | raw limit | end of step |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        mark = " !" if row["scan_us"] > TARGET_MICROSECONDS else ""
        print(
            f"| {row['lookup']} | {row['keys']:,} | {row['first_scan_us']:,.0f} | {row['first_plan_us']:,.0f} |"
            f" {row['scan_us']:.1f}{mark} | {row['scan_p99_us']:.1f} | {row['raw_us']:.1f} |"
            f" {row['end_of_step_us']:.1f} |"
        )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes")
    parser.add_argument("--json", type=Path, default=None, help="write the figures there")
    options = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        print("VLLM IS NOT INSTALLED: nothing was measured; run this with an environment's Python that has it")
        sys.exit(0)
    sizes, rounds = ((512,), 200) if options.quick else ((512, 2048, 8192), 2000)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for size in sizes for row in measure(Path(folder), size, rounds)]
    report(rows)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
