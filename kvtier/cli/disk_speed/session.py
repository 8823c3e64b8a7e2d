"""The measuring process: it measures a tier's stores or loads of one block size, interleaved with the raw limit.

It reads an `Order` as JSON from standard input, and prints a line of JSON per round. Stores and loads are measured in
different processes, so that the loading tier has read its index from the disk.
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
"""Most bytes of loads in flight, unless two jobs have more."""
_ARENA_BYTES = 256 << 20
_START_SECONDS = 60.0
_PREPARE_SECONDS = 60.0
_STEP_SECONDS = 0.002
"""Pause between polls while waiting: as long as a scheduler's step."""


@dataclass(frozen=True)
class Order:
    """What to measure.

    Attributes:
        folder: on the filesystem to measure; holds the tier's directory and the raw limit's file.
        num_bytes: least bytes per round.
        load: True to measure loads of the blocks that the last round of stores has left.
    """

    folder: str
    block_bytes: int
    job_blocks: int
    num_bytes: int
    rounds: int
    load: bool

    @property
    def num_blocks(self) -> int:
        """Blocks per round, rounded up to whole jobs."""
        return -(-self.num_bytes // (self.block_bytes * self.job_blocks)) * self.job_blocks

    @property
    def tier_folder(self) -> Path:
        return Path(self.folder) / f"tier-{self.block_bytes}-{self.job_blocks}"

    def keys(self, round_number: int) -> list[OffloadKey]:
        name = f"{self.block_bytes}-{self.job_blocks}-{round_number}"
        return [
            make_offload_key(hashlib.sha256(f"{name}-{number}".encode()).digest(), 0)
            for number in range(self.num_blocks)
        ]


class MeasuringSpec:
    """Stands in for the engine's spec: a tier reads only its `tier_context`."""

    def __init__(self, tier_context: TierContext) -> None:
        self.tier_context = tier_context


class Session:
    """A tier, its arena, and the busy scheduler that drives it."""

    def __init__(self, order: Order) -> None:
        self.order = order
        num_slots = max(2 * order.job_blocks, _ARENA_BYTES // order.block_bytes)
        self._arena = Arena.create(num_slots, order.block_bytes)
        self._fill()
        spec = MeasuringSpec(TierContext(namespace=Namespace({"model": "speed"}), arena_fd=self._arena.fd))
        # One slot more than a round stores, plus room for headers: no round evicts its own blocks, and a round
        # writes the whole slab.
        capacity = (order.num_blocks + 1) * (order.block_bytes + 256) + (1 << 20)
        path = str(order.tier_folder)
        self.tier = DiskTierManager(spec, self._arena.view, "disk", path=path, capacity=capacity)
        self.scheduler = BusyScheduler(self.tier, num_slots, IN_FLIGHT_BYTES)

    def __enter__(self) -> Self:
        """Start the tier.

        Raises:
            KVTierError: the tier does not start.
        """
        self.tier.start()
        self._wait_up()
        return self

    def __exit__(self, *failure: object) -> None:
        """Shut down the tier and its I/O process."""
        self.tier.shutdown()
        self._arena.close()

    def prepare(self) -> None:
        """Bring the tier into the state that it has after a while: its files are written ahead, its slots used once."""
        deadline = time.monotonic() + _PREPARE_SECONDS
        while self.tier.get_stats().get("prepared_share", 1.0) < 1.0 and time.monotonic() < deadline:
            time.sleep(_STEP_SECONDS)  # a step of a scheduler that has nothing else to do
            list(self.tier.get_finished_jobs())
        if not self.order.load:
            self.scheduler.run(self.order.keys(-1), self.order.job_blocks, load=False)

    def move(self, round_number: int) -> dict[str, Any]:
        """Store or load the blocks of a round; return its speed and times."""
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

    def raw(
        self,
        limit: RawLimit,
        summed: bool = False,
        small: bool = False,
        beside: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """Measure the raw limit while this thread runs the same steps as with the tier."""
        limit.begin(not self.order.load, summed, small)
        steps = self.scheduler.idle(limit.ended, beside)
        answer = limit.take()
        return {
            "gb_per_second": limit.num_bytes / answer["seconds"] / 1e9,
            "cpu_per_gb": answer["cpu_seconds"] / (limit.num_bytes / 1e9),
            "steps": steps,
        }

    def describe_memory(self) -> str:
        """Return what memory the tier's arena lies in."""
        return self._arena.describe_memory()

    def freeze(self) -> None:
        """Keep the garbage collector out of the measurement; vLLM freezes its heap in the same way."""
        gc.collect()
        gc.freeze()
        gc.disable()

    def check(self) -> None:
        """Raise KVTierError if any job failed: its time would not be that of a transfer."""
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
        """Return the CPU seconds of the tier's I/O process so far."""
        pid = self.tier.io_pid
        if pid is None:
            raise KVTierError("the tier's I/O process is gone")
        return time.clock_gettime((~pid << 3) | 2)  # Linux numbers a process's CPU clock so, see clock_getcpuclockid(3)


def measure(order: Order) -> Iterator[dict[str, Any]]:
    """Yield per round the tier's speed and the mean of the raw limits measured just before and just after it."""
    with Session(order) as session, closing(RawLimit(Path(order.folder) / "raw", order.num_bytes)) as limit:
        session.prepare()
        session.freeze()
        before = session.raw(limit)["gb_per_second"]
        for number in range(order.rounds):
            tier = session.move(number)["gb_per_second"]
            after = session.raw(limit)["gb_per_second"]
            small = session.raw(limit, small=True)["gb_per_second"]
            raw = (before + after) / 2
            yield {
                "raw": raw,
                "raw_small": small,
                "tier": tier,
                "ratio": tier / raw,
                "direct": limit.direct,
                "memory": session.describe_memory(),
            }
            before = session.raw(limit)["gb_per_second"] if number + 1 < order.rounds else after
        session.check()


def order_json(order: Order) -> str:
    """Return an order in the form that `main` reads."""
    return json.dumps(asdict(order))


def main() -> None:
    """Run in the measuring process; SIGTERM ends it and its tier."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    order = sys.stdin.read()
    if not order:
        return  # the command was interrupted before it has said what to measure
    for figures in measure(Order(**json.loads(order))):
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
