"""Measures one size of blocks and jobs, in its own process.

It measures more than `kvtier bench disk`: in addition to the speed and the raw limit, CPU time, the raw limit with
checksums, the time of the scheduler's thread for jobs and steps, and the rate of lookups. Run as a script, this file is
that process. It reads an `Order` as JSON, and prints a line of JSON per round, then one with the figures that are
measured only once.
"""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from least_job import LeastJob

from kvtier.cli.disk_speed.measure import Progress, run_session
from kvtier.cli.disk_speed.raw import RawLimit
from kvtier.cli.disk_speed.scheduler import Steps
from kvtier.cli.disk_speed.session import Order, Session
from kvtier.errors import KVTierError
from kvtier.keys import OffloadKey
from kvtier.types import LookupResult, ReqContext

JOB_SIZES = (1, 16, 256)
IDLE_STEPS = 300
LOOKUPS = 20_000

TARGETS = {128 << 10: (0.80, 0.85), 512 << 10: (0.90, 0.95), 2 << 20: (0.95, 0.95), 8 << 20: (0.95, 0.95)}
"""Least ratios to the raw limit of (stores, loads), by bytes per block."""
CPU_TARGET = 0.25
"""Most CPU seconds per GB, with checksums, for blocks of at least `CPU_BLOCK_BYTES`."""
CPU_BLOCK_BYTES = 512 << 10
STEP_TARGET_MS = 0.3
"""Most milliseconds by which the tier may lengthen the 99th percentile of a scheduler's step."""


@dataclass(frozen=True)
class CaseFigures:
    """Figures of one case, medians over the rounds.

    Attributes:
        load: True for loads, False for stores.
        raw, tier: GB/s of the raw limit, from huge pages, and of the tier.
        raw_small: GB/s of the raw limit from pages of 4 KiB.
        ratio: median of `ratios`.
        ratios: per round, the tier's speed divided by the mean of the raw limits just before and just after it.
        summed, summed_ratio: GB/s of the raw limit with checksums, and the tier's ratio to it.
        cpu, raw_cpu, summed_cpu: CPU seconds per GB, of the tier's I/O process and of the raw limit's process.
        job_us: microseconds of the scheduler's thread per job, submission and poll together.
        idle_poll_us: microseconds of a poll without results.
        least_us: microseconds of `LeastJob`, the raw limit of `job_us`; measured during the raw limit with checksums.
        steps_ms: p50, p99 and max of a step with the tier idle, during the raw limit, and with the tier at work.
        lookups: lookups per second, of present and of absent blocks.
        direct: whether direct I/O was possible.
        memory: what memory the tier's arena lies in.
    """

    block_bytes: int
    job_blocks: int
    load: bool
    raw: float
    raw_small: float
    tier: float
    ratio: float
    ratios: list[float]
    summed: float
    summed_ratio: float
    cpu: float
    raw_cpu: float
    summed_cpu: float
    job_us: float
    idle_poll_us: float
    least_us: float
    steps_ms: dict[str, dict[str, float]]
    lookups: dict[str, float]
    direct: bool
    memory: str

    @property
    def target(self) -> float | None:
        """Least ratio for this size; None if there is no target."""
        targets = TARGETS.get(self.block_bytes)
        return None if targets is None else targets[self.load]

    @property
    def job_target_us(self) -> float:
        """Most microseconds of the scheduler's thread per job."""
        return 20 + 0.6 * self.job_blocks

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def measure_cases(
    folder: Path, block_bytes: int, job_blocks: int, num_bytes: int, rounds: int, progress: Progress
) -> Iterator[CaseFigures]:
    """Yield the figures of one size's stores, then those of its loads, which run in a new process.

    Raises:
        KVTierError: the tier or the raw limit failed.
    """
    for load in (False, True):
        order = Order(str(folder), block_bytes, job_blocks, num_bytes, rounds, load)
        lines = []
        for line in run_session([sys.executable, __file__], order):
            lines.append(line)
            progress(f"{block_bytes >> 10} KiB x {job_blocks} {'load' if load else 'store'}, round {len(lines)}")
        yield _summary(order, lines)
    shutil.rmtree(order.tier_folder)


def _summary(order: Order, lines: Sequence[dict[str, Any]]) -> CaseFigures:
    rounds, once = lines[:-1], lines[-1]
    names = ("raw", "raw_small", "tier", "ratio", "summed", "summed_ratio", "cpu", "raw_cpu", "summed_cpu", "job_us")
    medians = {name: float(statistics.median(line[name] for line in rounds)) for name in names}
    ratios = [line["ratio"] for line in rounds]
    return CaseFigures(order.block_bytes, order.job_blocks, order.load, ratios=ratios, **medians, **once)


class FullSession(Session):
    """A session that also measures steps without jobs, and lookups."""

    def idle(self) -> Steps:
        """Run `IDLE_STEPS` steps while the tier has no job."""
        left = iter(range(IDLE_STEPS))
        return self.scheduler.idle(lambda: next(left, None) is None)

    def lookups(self) -> dict[str, float]:
        """Return lookups per second, of present and of absent blocks."""
        present = self.order.keys(self.order.rounds - 1)[:LOOKUPS]
        absent = self.order.keys(self.order.rounds)[:LOOKUPS]
        return {
            "present": self._lookups(present, LookupResult.HIT),
            "absent": self._lookups(absent, LookupResult.MISS),
        }

    def _lookups(self, keys: list[OffloadKey], expected: LookupResult) -> float:
        context, lookup = ReqContext("speed"), self.tier.lookup
        times = []
        for _ in range(max(3, LOOKUPS // len(keys))):
            start = time.perf_counter()
            for key in keys:
                answer = lookup(key, context)
            times.append(time.perf_counter() - start)
            if answer is not expected:
                raise KVTierError(f"a lookup answered {answer}, not {expected}")
        return len(keys) / float(np.median(times))


def measure(order: Order) -> Iterator[dict[str, Any]]:
    """Yield the figures of each round, then those that are measured only once."""
    least = LeastJob(order.job_blocks, order.keys(-2), order.keys(-3))
    raw_limit = RawLimit(Path(order.folder) / "raw", order.num_bytes)
    with FullSession(order) as session, closing(raw_limit) as limit, closing(least):
        session.prepare()
        session.freeze()
        idle = session.idle()
        idle_poll = float(np.median(idle.polls))
        before = session.raw(limit)
        raw_steps, tier_steps = before["steps"].steps, []
        for number in range(order.rounds):
            tier = session.move(number)
            after = session.raw(limit)
            summed = session.raw(limit, summed=True, beside=least.run)
            small = session.raw(limit, small=True)
            raw = (before["gb_per_second"] + after["gb_per_second"]) / 2
            raw_steps += after["steps"].steps
            tier_steps += tier["steps"].steps
            yield {
                "raw": raw,
                "raw_small": small["gb_per_second"],
                "tier": tier["gb_per_second"],
                "ratio": tier["gb_per_second"] / raw,
                "summed": summed["gb_per_second"],
                "summed_ratio": tier["gb_per_second"] / summed["gb_per_second"],
                "summed_cpu": summed["cpu_per_gb"],
                "cpu": tier["cpu_per_gb"],
                "raw_cpu": after["cpu_per_gb"],
                "job_us": tier["steps"].job_seconds() * 1e6,
            }
            before = session.raw(limit)
        idle.steps += session.idle().steps
        session.check()
        steps = {"idle": idle.steps, "raw": raw_steps, "tier": tier_steps}
        yield {
            "direct": limit.direct,
            "memory": session.describe_memory(),
            "idle_poll_us": idle_poll * 1e6,
            "least_us": float(np.median(least.seconds or [0.0])) * 1e6,
            "lookups": session.lookups(),
            "steps_ms": {name: _percentiles(times) for name, times in steps.items()},
        }


def _percentiles(times: list[float]) -> dict[str, float]:
    """Return p50, p99 and the maximum, in milliseconds."""
    p50, p99, most = np.percentile(np.asarray(times) * 1e3, [50, 99, 100]).tolist()
    return {"p50": p50, "p99": p99, "max": most}


def main() -> None:
    """Measure as a process of its own; SIGTERM ends it and its tier."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    for figures in measure(Order(**json.load(sys.stdin))):
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
