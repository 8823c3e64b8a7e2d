"""Measures the disk tier beside its device, case after case, each in processes of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvtier.cli.disk_speed.processes import command
from kvtier.cli.disk_speed.session import Order, order_json
from kvtier.errors import KVTierError

Progress = Callable[[str], None]
"""Called with what is about to be measured."""

BLOCK_SIZES = (128 << 10, 512 << 10, 2 << 20, 8 << 20)
JOB_SIZES = (1, 16, 256)
ROUND_BYTES = 1 << 30

TARGETS = {128 << 10: (0.80, 0.85), 512 << 10: (0.90, 0.95), 2 << 20: (0.95, 0.95), 8 << 20: (0.95, 0.95)}
"""Ratio to the raw limit that stores and loads should reach, by bytes of a block."""
CPU_TARGET = 0.25
"""CPU seconds a GB, checksums included, from `CPU_BLOCK_BYTES` a block on."""
CPU_BLOCK_BYTES = 512 << 10
STEP_TARGET_MS = 0.3
"""What the tier may add to the 99th percentile of a scheduler's step."""


@dataclass(frozen=True)
class Figures:
    """What one case came to; medians over the rounds.

    Attributes:
        load: True for loads, False for stores.
        raw, tier: GB/s.
        ratio: median of the rounds' own ratios, each to the raw limit just before and just after it.
        ratios: of every round.
        summed, summed_ratio: the raw limit with checksums, GB/s, and the tier's ratio to it.
        cpu, raw_cpu, summed_cpu: CPU seconds a GB, of the tier's I/O process and of the raw limit's process.
        job_us: what a job costs the scheduler's thread, submission and poll, in microseconds.
        idle_poll_us: what a poll costs that brings nothing.
        least_us: what `LeastJob` costs: the raw limit of `job_us`, taken beside the raw limit with checksums.
        steps_ms: p50, p99 and max of a step with the tier idle, beside the raw limit, and with the tier at work.
        lookups: a second, of present and of absent blocks.
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


def measure_case(
    folder: Path, block_bytes: int, job_blocks: int, num_bytes: int, rounds: int, progress: Progress
) -> Iterator[Figures]:
    """Yield the figures of one size's stores, then of its loads in a new process.

    Args:
        folder: on the filesystem in question; what is written there is removed, except the raw limit's file.
        num_bytes: what a round moves, at least.

    Raises:
        KVTierError: the tier or the raw limit failed.
    """
    for load in (False, True):
        order = Order(str(folder), block_bytes, job_blocks, num_bytes, rounds, load)
        lines = []
        for line in _session(order):
            lines.append(line)
            progress(f"{block_bytes >> 10} KiB x {job_blocks} {'load' if load else 'store'}, round {len(lines)}")
        yield _summary(order, lines)
    shutil.rmtree(order.tier_folder)


def _session(order: Order) -> Iterator[dict[str, Any]]:
    """Yield what a new process measures."""
    process = subprocess.Popen(
        command("kvtier.cli.disk_speed.session"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the command, which ends this process and those that it started
    )
    if process.stdin is None or process.stdout is None:
        raise KVTierError("the measuring process has no pipes")
    with process:
        try:
            process.stdin.write(order_json(order))
            process.stdin.close()
            for line in process.stdout:
                yield json.loads(line)
        except BaseException:  # the command ends early
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise KVTierError(f"the measuring process failed with exit code {process.returncode}")


def _summary(order: Order, lines: Sequence[dict[str, Any]]) -> Figures:
    rounds, once = lines[:-1], lines[-1]

    def median(name: str) -> float:
        return float(statistics.median(line[name] for line in rounds))

    return Figures(
        block_bytes=order.block_bytes,
        job_blocks=order.job_blocks,
        load=order.load,
        raw=median("raw"),
        tier=median("tier"),
        ratio=median("ratio"),
        ratios=[line["ratio"] for line in rounds],
        summed=median("summed"),
        summed_ratio=median("summed_ratio"),
        cpu=median("cpu"),
        raw_cpu=median("raw_cpu"),
        summed_cpu=median("summed_cpu"),
        job_us=median("job_us"),
        idle_poll_us=once["idle_poll_us"],
        least_us=once["least_us"],
        steps_ms=once["steps_ms"],
        lookups=once["lookups"],
        direct=once["direct"],
    )
