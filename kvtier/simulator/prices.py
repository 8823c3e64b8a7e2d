"""Computes the monthly price of a simulated configuration, and whether it meets a target."""

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
    """Prices, in dollars.

    Attributes:
        gpu_hour: price per hour of the accelerators that reach `Machine.prefill_rate` together.
        dram_gib, disk_gib: purchase price per GiB.
        months: months over which memory and disks are written off.
        drive_writes: whole writes per day that a disk endures for `months`; with twice as many it lasts half as long.
    """

    gpu_hour: float
    dram_gib: float
    disk_gib: float
    months: float = 36.0
    drive_writes: float = 1.0

    def __post_init__(self) -> None:
        """Check the prices.

        Raises:
            ConfigError: a price is negative, `months` or `drive_writes` is not above 0, or a value is not finite.
        """
        for name in ("gpu_hour", "dram_gib", "disk_gib"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(name, getattr(self, name), "0 or more, a finite number")
        for name in ("months", "drive_writes"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(name, getattr(self, name), "above 0, a finite number")


@dataclass(frozen=True)
class Target:
    """What a configuration must reach; None stands for any value.

    Attributes:
        hit_rate: least share of the blocks that are found, 0 to 1.
        first_token_p95: longest time to the first token, 95th percentile, in seconds.
        drive_writes_a_day: most whole writes of the disk per day, if every hour is like the busiest.
    """

    hit_rate: float | None = None
    first_token_p95: float | None = None
    drive_writes_a_day: float | None = None

    def is_met_by(self, result: Result) -> bool:
        """Return whether a result reaches the target."""
        writes = result.busiest_drive_writes_a_day
        return (
            (self.hit_rate is None or result.hit_rate >= self.hit_rate)
            and (self.first_token_p95 is None or result.first_token_at(95) <= self.first_token_p95)
            and (self.drive_writes_a_day is None or writes is None or writes <= self.drive_writes_a_day)
        )

    def describe(self) -> str:
        """Return the target as text for people."""
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
    """A result with its prices in dollars per month, if every hour is like the busiest.

    Attributes:
        result: the simulated configuration and its figures.
        dram: price of the memory.
        disk: price of the disk, multiplied by `wear`.
        wear: factor by which the disk's life is shorter since it is written more often than it endures; at least 1.
        gpu: price of the accelerators' time for blocks that are not found.
        mean_gpu: the same if every hour is like the mean.
    """

    result: Result
    dram: float
    disk: float
    wear: float
    gpu: float
    mean_gpu: float

    @property
    def buys(self) -> bool:
        """Whether anything is bought; an offer without memory has no disk either."""
        return bool(self.result.setup.dram_blocks)

    @property
    def hardware(self) -> float:
        """Price of memory and disk."""
        return self.dram + self.disk

    @property
    def total(self) -> float:
        """Price of hardware and of the accelerators' time."""
        return self.hardware + self.gpu


def price(result: Result, prices: Prices) -> Offer:
    """Return the monthly prices of a simulated configuration."""
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
    """Return the offers of at least one result; the first offer buys nothing and serves the same requests."""
    return [price(result, prices) for result in (results[0].without_offloading(), *results)]
