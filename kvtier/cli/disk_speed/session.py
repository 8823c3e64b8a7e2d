"""One process that measures: a tier's stores or loads of one size, interleaved with the raw limit.

It reads an `Order` as JSON and answers with a line of JSON per round. Loads are ordered from a new process, whose tier
has read its index from the disk.
"""

from __future__ import annotations

import gc
import hashlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from kvtier.abc import TierContext
from kvtier.cli.disk_speed.raw import RawLimit
from kvtier.cli.disk_speed.scheduler import BusyScheduler
from kvtier.errors import KVTierError
from kvtier.events import TierState
from kvtier.keys import OffloadKey, make_offload_key
from kvtier.namespace import Namespace
from kvtier.primary.arena import Arena
from kvtier.secondary.disk import DiskTierManager

IN_FLIGHT_BYTES = 64 << 20
"""What is in flight at most, unless two jobs are more."""
_ARENA_BYTES = 256 << 20
_START_SECONDS = 60.0
_PREPARE_SECONDS = 60.0
_STEP_SECONDS = 0.002
"""As a scheduler's step."""


@dataclass(frozen=True)
class Order:
    """What to measure.

    Attributes:
        folder: on the filesystem in question; holds the tier's directory and the raw limit's file.
        num_bytes: what a round moves, at least.
        load: True loads what the last round of stores left.
    """

    folder: str
    block_bytes: int
    job_blocks: int
    num_bytes: int
    rounds: int
    load: bool

    @property
    def num_blocks(self) -> int:
        """Blocks of a round: whole jobs."""
        return -(-self.num_bytes // (self.block_bytes * self.job_blocks)) * self.job_blocks

    @property
    def tier_folder(self) -> Path:
        """The directory of the tier."""
        return Path(self.folder) / f"tier-{self.block_bytes}-{self.job_blocks}"

    def keys(self, round_number: int) -> list[OffloadKey]:
        """Return the keys of a round."""
        name = f"{self.block_bytes}-{self.job_blocks}-{round_number}"
        return [
            make_offload_key(hashlib.sha256(f"{name}-{number}".encode()).digest(), 0)
            for number in range(self.num_blocks)
        ]


class MeasuringSpec:
    """The engine's spec, as far as a tier needs one."""

    def __init__(self, tier_context: TierContext) -> None:
        self.tier_context = tier_context


class Session:
    """The tier, its arena, and the scheduler's thread."""

    def __init__(self, order: Order) -> None:
        self.order = order
        num_slots = max(2 * order.job_blocks, _ARENA_BYTES // order.block_bytes)
        self._arena = Arena.create(num_slots, order.block_bytes)
        self._fill()
        spec = MeasuringSpec(TierContext(namespace=Namespace({"model": "speed"}), arena_fd=self._arena.fd))
        # A slot more than a round stores: what a round needs is always there, and the slab is written whole.
        capacity = (order.num_blocks + 1) * (order.block_bytes + 256) + (1 << 20)
        path = str(order.tier_folder)
        self.tier = DiskTierManager(spec, self._arena.view, "disk", path=path, capacity=capacity)
        self.scheduler = BusyScheduler(self.tier, num_slots, IN_FLIGHT_BYTES)

    def __enter__(self) -> Self:
        """Start the tier.

        Raises:
            KVTierError: it does not start.
        """
        self.tier.start()
        self._wait_up()
        return self

    def __exit__(self, *failure: object) -> None:
        """End the tier, and its I/O process with it."""
        self.tier.shutdown()
        self._arena.close()

    def prepare(self) -> None:
        """Wait until the slab is written ahead, and store once: as a tier is after a while."""
        deadline = time.monotonic() + _PREPARE_SECONDS
        while self.tier.get_stats().get("prepared_share", 1.0) < 1.0 and time.monotonic() < deadline:
            time.sleep(_STEP_SECONDS)  # a step of a scheduler that has nothing else to do
            list(self.tier.get_finished_jobs())
        if not self.order.load:
            self.scheduler.run(self.order.keys(-1), self.order.job_blocks, load=False)

    def move(self, round_number: int) -> dict[str, Any]:
        """Move a round's blocks; return what that took."""
        order = self.order
        keys = order.keys(order.rounds - 1 if order.load else round_number)
        cpu = self._io_cpu_seconds()
        seconds, steps = self.scheduler.run(keys, order.job_blocks, order.load)
        num_bytes = len(keys) * order.block_bytes
        return {
            "gb_per_second": num_bytes / seconds / 1e9,
            "cpu_per_gb": (self._io_cpu_seconds() - cpu) / (num_bytes / 1e9),
            "steps": steps,
        }

    def raw(self, limit: RawLimit, summed: bool = False, beside: Callable[[], None] | None = None) -> dict[str, Any]:
        """Let the raw limit move its bytes while this thread is as busy as it is with the tier."""
        limit.begin(not self.order.load, summed)
        steps = self.scheduler.idle(limit.ended, beside)
        answer = limit.take()
        return {
            "gb_per_second": limit.num_bytes / answer["seconds"] / 1e9,
            "cpu_per_gb": answer["cpu_seconds"] / (limit.num_bytes / 1e9),
            "steps": steps,
        }

    def freeze(self) -> None:
        """Keep the collector out of what is measured: an engine freezes its heap, too."""
        gc.collect()
        gc.freeze()
        gc.disable()

    def check(self) -> None:
        """Raise KVTierError if any job failed: the figures would mean nothing."""
        if self.scheduler.num_failed:
            raise KVTierError(f"{self.scheduler.num_failed} jobs failed: the figures mean nothing")

    def _fill(self) -> None:
        view = np.frombuffer(self._arena.view.cast("B"), np.uint64)
        pattern = np.random.default_rng(1).integers(0, 1 << 63, 1 << 17, dtype=np.uint64)
        for index, start in enumerate(range(0, len(view), len(pattern))):
            piece = view[start : start + len(pattern)]
            piece[:] = pattern[: len(piece)] + np.uint64(index)

    def _wait_up(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while self.tier.state is not TierState.UP:
            if time.monotonic() > deadline or self.tier.state is TierState.DOWN:
                raise KVTierError(f"the tier did not start: {self.tier.state.value} {self.tier.state_reason}")
            time.sleep(_STEP_SECONDS)  # a step of a scheduler that has nothing else to do
            list(self.tier.get_finished_jobs())

    def _io_cpu_seconds(self) -> float:
        """Return the CPU seconds of the tier's I/O process so far (its CPU clock: clock_getcpuclockid(3))."""
        pid = self.tier.io_pid
        if pid is None:
            raise KVTierError("the tier's I/O process is gone")
        return time.clock_gettime((~pid << 3) | 2)


def measure(order: Order) -> Iterator[dict[str, Any]]:
    """Yield what each round measured: the tier's speed, and the raw limit's just before and just after it."""
    with Session(order) as session, closing(RawLimit(Path(order.folder) / "raw", order.num_bytes)) as limit:
        session.prepare()
        session.freeze()
        before = session.raw(limit)["gb_per_second"]
        for number in range(order.rounds):
            tier = session.move(number)["gb_per_second"]
            after = session.raw(limit)["gb_per_second"]
            raw = (before + after) / 2
            yield {"raw": raw, "tier": tier, "ratio": tier / raw, "direct": limit.direct}
            before = after
        session.check()


def order_json(order: Order) -> str:
    """Return the JSON that `main` reads."""
    return json.dumps(asdict(order))


def main() -> None:
    """Be the process; SIGTERM ends it with its tier."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    for figures in measure(Order(**json.load(sys.stdin))):
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
