"""Measures the disk tier beside its device, one case after the other, each in new processes."""

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
"""Time that a measuring process has to end after SIGTERM, before it is killed."""


@dataclass(frozen=True)
class Figures:
    """The speed of stores or loads with one block size: medians over the rounds.

    Attributes:
        load: True for loads, False for stores.
        raw, tier: GB/s of the device, from huge pages, and of the tier.
        raw_small: GB/s of the device from pages of 4 KiB.
        ratio: median of the rounds' ratios; a round's tier speed is divided by the mean of the raw limits measured just
            before and just after it.
        direct: whether the filesystem has direct I/O.
        memory: what memory the tier's arena lies in.
    """

    block_bytes: int
    load: bool
    raw: float
    raw_small: float
    tier: float
    ratio: float
    direct: bool
    memory: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_case(
    folder: Path, block_bytes: int, job_blocks: int, num_bytes: int, rounds: int, progress: Progress
) -> Iterator[Figures]:
    """Yield the figures of stores with one block size, then of loads in a new process.

    Args:
        folder: on the filesystem to measure; the tier's files are removed at the end, the raw limit's file stays.
        num_bytes: least bytes per round.

    Raises:
        KVTierError: the tier or the raw limit failed.
    """
    for load in (False, True):
        order = Order(str(folder), block_bytes, job_blocks, num_bytes, rounds, load)
        lines = []
        for line in run_session(command("kvtier.cli.disk_speed.session"), order):
            lines.append(line)
            progress(f"{block_bytes >> 10} KiB {'load' if load else 'store'}, round {len(lines)}")
        names = ("raw", "raw_small", "tier", "ratio")
        medians = {name: float(statistics.median(line[name] for line in lines)) for name in names}
        yield Figures(block_bytes, load, **medians, direct=lines[-1]["direct"], memory=lines[-1]["memory"])
    shutil.rmtree(order.tier_folder)


def run_session(start: list[str], order: Order) -> Iterator[dict[str, Any]]:
    """Start a measuring process and yield its answers, one per round.

    Args:
        start: the command that starts it.
        order: what it measures.

    Raises:
        KVTierError: the process failed.
    """
    process = subprocess.Popen(
        start,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # the terminal's Ctrl-C reaches only the command, which then ends this whole session
    )
    if process.stdin is None or process.stdout is None:
        raise KVTierError("the measuring process has no pipes")
    with process:
        try:
            process.stdin.write(order_json(order))
            process.stdin.close()
            for line in process.stdout:
                yield json.loads(line)
        except BaseException:
            process.terminate()  # it ends its tier first, so that nothing is written to the folder afterwards
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise KVTierError(f"the measuring process failed with exit code {process.returncode}")
