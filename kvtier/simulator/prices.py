"""What a simulated configuration costs per month, and whether it meets a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.errors import ConfigError
from kvtier.simulator.report import percent, seconds
from kvtier.simulator.results import Result

HOURS_A_MONTH = 730.0
_GIB = 1 << 30


@dataclass(frozen=True)
class Prices:
    """What things cost.

    Attributes:
        gpu_hour: an hour of the accelerators that compute `Machine.prefill_rate` together.
        dram_gib, disk_gib: a GiB, bought.
        months: over which memory and disks are written off.
        drive_writes: whole writes per day that a disk endures for so long; with twice as many it lasts half as long.
    """

    gpu_hour: float
    dram_gib: float
    disk_gib: float
    months: float = 36.0
    drive_writes: float = 1.0

    def __post_init__(self) -> None:
        """Check the prices.

        Raises:
            ConfigError: one is below 0, the months or the writes are not above 0, or one is without end.
        """
        for name in ("gpu_hour", "dram_gib", "disk_gib"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(name, getattr(self, name), "0 or more, a finite number")
        for name in ("months", "drive_writes"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(name, getattr(self, name), "above 0, a finite number")


@dataclass(frozen=True)
class Target:
    """What a configuration must reach; None where it does not matter.

    Attributes:
        hit_rate: share of the blocks, 0 to 1.
        first_token_p95: seconds.
        drive_writes_a_day: most of them, if every hour is like the busiest.
    """

    hit_rate: float | None = None
    first_token_p95: float | None = None
    drive_writes_a_day: float | None = None

    def is_met_by(self, result: Result) -> bool:
        """Return whether a result reaches it."""
        writes = result.busiest_drive_writes_a_day
        return (
            (self.hit_rate is None or result.hit_rate >= self.hit_rate)
            and (self.first_token_p95 is None or result.first_token_at(95) <= self.first_token_p95)
            and (self.drive_writes_a_day is None or writes is None or writes <= self.drive_writes_a_day)
        )

    def describe(self) -> str:
        """Return it in words."""
        wanted = []
        if self.hit_rate is not None:
            wanted.append(f"a hit rate of {percent(self.hit_rate)}")
        if self.first_token_p95 is not None:
            wanted.append(f"a first token within {seconds(self.first_token_p95)} for 95%")
        if self.drive_writes_a_day is not None:
            wanted.append(f"at most {self.drive_writes_a_day:g} drive writes a day")
        return " and ".join(wanted) or "the least cost"


@dataclass(frozen=True)
class Offer:
    """A result with its price a month, if every hour is like the busiest.

    Attributes:
        result: what was simulated.
        dram: memory.
        disk: the disk, which lasts less long if it is written more often than it is made for.
        wear: by how much less long, at least 1.
        gpu: the accelerators' time for what is not found; mean_gpu: if the trace goes on as it is.
    """

    result: Result
    dram: float
    disk: float
    wear: float
    gpu: float
    mean_gpu: float

    @property
    def buys(self) -> bool:
        """Whether it is anything at all: an offer without memory has no disk either."""
        return bool(self.result.setup.dram_blocks)

    @property
    def hardware(self) -> float:
        """What is bought: memory and disk."""
        return self.dram + self.disk

    @property
    def total(self) -> float:
        """All of it."""
        return self.hardware + self.gpu


def price(result: Result, prices: Prices) -> Offer:
    """Return what a month with this configuration costs."""
    setup, gpu_month = result.setup, HOURS_A_MONTH * prices.gpu_hour
    wear = max(1.0, (result.busiest_drive_writes_a_day or 0.0) / prices.drive_writes)
    return Offer(
        result,
        dram=setup.dram_bytes / _GIB * prices.dram_gib / prices.months,
        disk=setup.disk_bytes / _GIB * prices.disk_gib / prices.months * wear,
        wear=wear,
        gpu=result.busiest_computing * gpu_month,
        mean_gpu=result.computing * gpu_month,
    )


def price_all(results: Sequence[Result], prices: Prices) -> list[Offer]:
    """Return the prices of at least one result, and before them that of buying nothing for the same requests."""
    return [price(result, prices) for result in (results[0].without_offloading(), *results)]
