"""Everything that is measured of one size of blocks and jobs, in a process of its own.

More than `kvtier bench disk` asks for: beside speed and the raw limit, CPU, the raw limit with checksums, what the
scheduler's thread spends on jobs and steps, and the rate of lookups. Run as a script it is the process: an `Order` as
JSON in, a line of JSON per round out, then one with what was measured once.
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
"""Ratio to the raw limit that stores and loads should reach, by bytes of a block."""
CPU_TARGET = 0.25
"""CPU seconds per GB, checksums included, from `CPU_BLOCK_BYTES` per block on."""
CPU_BLOCK_BYTES = 512 << 10
STEP_TARGET_MS = 0.3
"""What the tier may add to the 99th percentile of a scheduler's step."""


@dataclass(frozen=True)
class CaseFigures:
    """What one case came to; medians over the rounds.

    Attributes:
        load: True for loads, False for stores.
        raw, tier: GB/s.
        ratio: median of the rounds' own ratios, each to the raw limit just before and just after it.
        ratios: of every round.
        summed, summed_ratio: the raw limit with checksums, GB/s, and the tier's ratio to it.
        cpu, raw_cpu, summed_cpu: CPU seconds per GB, of the tier's I/O process and of the raw limit's process.
        job_us: what a job costs the scheduler's thread, submission and poll, in microseconds.
        idle_poll_us: what a poll costs that brings nothing.
        least_us: what `LeastJob` costs: the raw limit of `job_us`, taken beside the raw limit with checksums.
        steps_ms: p50, p99 and max of a step with the tier idle, beside the raw limit, and with the tier at work.
        lookups: per second, of present and of absent blocks.
        direct: whether direct I/O was possible.
    """

    block_bytes: int
    job_blocks: int
    load: bool
    raw: float
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

    @property
    def target(self) -> float | None:
        """The ratio that should be reached, if there is one for this size."""
        targets = TARGETS.get(self.block_bytes)
        return None if targets is None else targets[self.load]

    @property
    def job_target_us(self) -> float:
        """What a job may cost the scheduler's thread."""
        return 20 + 0.6 * self.job_blocks

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def measure_cases(
    folder: Path, block_bytes: int, job_blocks: int, num_bytes: int, rounds: int, progress: Progress
) -> Iterator[CaseFigures]:
    """Yield the figures of one size's stores, then of its loads in a new process.

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
    names = ("raw", "tier", "ratio", "summed", "summed_ratio", "cpu", "raw_cpu", "summed_cpu", "job_us")
    medians = {name: float(statistics.median(line[name] for line in rounds)) for name in names}
    ratios = [line["ratio"] for line in rounds]
    return CaseFigures(order.block_bytes, order.job_blocks, order.load, ratios=ratios, **medians, **once)


class FullSession(Session):
    """A session that also measures steps without jobs, and lookups."""

    def idle(self) -> Steps:
        """Step with a tier that has nothing to do."""
        left = iter(range(IDLE_STEPS))
        return self.scheduler.idle(lambda: next(left, None) is None)

    def lookups(self) -> dict[str, float]:
        """Return lookups a second, of present and of absent blocks."""
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
    """Yield what each round measured, raw beside tier, then what was measured once."""
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
            raw = (before["gb_per_second"] + after["gb_per_second"]) / 2
            raw_steps += after["steps"].steps
            tier_steps += tier["steps"].steps
            yield {
                "raw": raw,
                "tier": tier["gb_per_second"],
                "ratio": tier["gb_per_second"] / raw,
                "summed": summed["gb_per_second"],
                "summed_ratio": tier["gb_per_second"] / summed["gb_per_second"],
                "summed_cpu": summed["cpu_per_gb"],
                "cpu": tier["cpu_per_gb"],
                "raw_cpu": after["cpu_per_gb"],
                "job_us": tier["steps"].job_seconds() * 1e6,
            }
            before = after
        idle.steps += session.idle().steps
        session.check()
        steps = {"idle": idle.steps, "raw": raw_steps, "tier": tier_steps}
        yield {
            "direct": limit.direct,
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
    """Be the process; SIGTERM ends it with its tier."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    for figures in measure(Order(**json.load(sys.stdin))):
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
