"""Measures the disk tier beside its device, case after case, each in processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvtier.cli.disk_speed.processes import command
from kvtier.cli.disk_speed.session import Order, order_json
from kvtier.errors import KVTierError

Progress = Callable[[str], None]
"""Called with what is about to be measured."""

BLOCK_SIZES = (128 << 10, 512 << 10, 2 << 20, 8 << 20)
ROUND_BYTES = 1 << 30
END_SECONDS = 10.0
"""Of a measuring process that is asked to end; then it is killed."""


@dataclass(frozen=True)
class Figures:
    """What stores or loads of one block size came to; medians over the rounds.

    Attributes:
        load: True for loads, False for stores.
        raw, tier: GB/s.
        ratio: median of the rounds' own ratios, each to the raw limit just before and just after it.
        direct: whether direct I/O was possible.
    """

    block_bytes: int
    load: bool
    raw: float
    tier: float
    ratio: float
    direct: bool

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
        for line in run_session(command("kvtier.cli.disk_speed.session"), order):
            lines.append(line)
            progress(f"{block_bytes >> 10} KiB {'load' if load else 'store'}, round {len(lines)}")
        raw, tier, ratio = (statistics.median(line[name] for line in lines) for name in ("raw", "tier", "ratio"))
        yield Figures(block_bytes, load, raw, tier, ratio, lines[-1]["direct"])
    shutil.rmtree(order.tier_folder)


def run_session(start: list[str], order: Order) -> Iterator[dict[str, Any]]:
    """Yield the lines of JSON that a new process, started by the command `start`, measures for an order.

    Raises:
        KVTierError: it failed.
    """
    process = subprocess.Popen(
        start,
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
        except (
            BaseException
        ):  # the command ends early; the process ends its tier first, so that nothing is written after
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise KVTierError(f"the measuring process failed with exit code {process.returncode}")
