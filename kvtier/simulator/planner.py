"""Which memory and which disk to buy: prices every simulated configuration and picks the cheapest that will do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvtier.errors import ConfigError
from kvtier.simulator.report import percent, seconds
from kvtier.simulator.results import Result
from kvtier.simulator.setup import Machine, Setup
from kvtier.simulator.trace import Trace
from kvtier.types import Admission

HOURS_A_MONTH = 730.0
_GIB = 1 << 30


@dataclass(frozen=True)
class Prices:
    """What things cost.

    Attributes:
        gpu_hour: an hour of the accelerators that compute `Machine.prefill_rate` together.
        dram_gib, disk_gib: a GiB, bought.
        months: over which memory and disks are written off.
    """

    gpu_hour: float
    dram_gib: float
    disk_gib: float
    months: float = 36.0

    def __post_init__(self) -> None:
        """Check the prices.

        Raises:
            ConfigError: one is below 0, the months are not above 0, or one is without end.
        """
        for name in ("gpu_hour", "dram_gib", "disk_gib"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(name, getattr(self, name), "0 or more, a finite number")
        if not 0 < self.months < math.inf:
            raise ConfigError("months", self.months, "above 0, a finite number")


@dataclass(frozen=True)
class Target:
    """What a configuration must reach; None where it does not matter.

    Attributes:
        hit_rate: share of the blocks, 0 to 1.
        first_token_p95: seconds.
        drive_writes_a_day: most of them.
    """

    hit_rate: float | None = None
    first_token_p95: float | None = None
    drive_writes_a_day: float | None = None

    def is_met_by(self, result: Result) -> bool:
        """Return whether a result reaches it."""
        writes = result.drive_writes_a_day
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
    """A result with its price, a month: memory, disk, and the accelerator's time for what is not found."""

    result: Result
    dram: float
    disk: float
    gpu: float

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


@dataclass(frozen=True)
class Plan:
    """What was asked, what was found, and what to do.

    Attributes:
        trace, machine, block_bytes, target: what was asked; bytes of one block.
        offers: all of them, the one that buys nothing first.
        chosen: the cheapest that meets the target, None if none does.
        option: what to add to `vllm serve`; empty if nothing is to be bought or nothing meets the target.
        edge: a line for people if the choice lies at the edge of what was tried; else empty.
    """

    trace: Trace
    machine: Machine
    block_bytes: int
    target: Target
    offers: Sequence[Offer]
    chosen: Offer | None
    option: str
    edge: str = ""

    @property
    def nothing(self) -> Offer:
        """The offer that buys nothing: the accelerator computes every prompt."""
        return self.offers[0]


def price(result: Result, machine: Machine, prices: Prices) -> Offer:
    """Return what a month with this configuration costs, if every hour is like the trace."""
    setup = result.setup
    computed = (result.input_tokens - result.saved_tokens) / machine.prefill_rate
    return Offer(
        result,
        setup.dram_bytes / _GIB * prices.dram_gib / prices.months,
        setup.disk_bytes / _GIB * prices.disk_gib / prices.months,
        computed / result.seconds * HOURS_A_MONTH * prices.gpu_hour,
    )


def price_all(results: Sequence[Result], machine: Machine, prices: Prices) -> list[Offer]:
    """Return the prices of at least one result, and before them that of buying nothing for the same requests."""
    return [price(result, machine, prices) for result in (results[0].without_offloading(), *results)]


def cheapest(offers: Sequence[Offer], target: Target) -> Offer | None:
    """Return the cheapest offer that meets the target; None if none does.

    Of equal ones the one that buys nothing, else the one with the best hit rate.
    """
    good = [offer for offer in offers if target.is_met_by(offer.result)]
    return min(good, key=lambda offer: (offer.total, offer.buys, -offer.result.hit_rate)) if good else None


def frontier(offers: Sequence[Offer], worth: Callable[[Result], float]) -> list[Offer]:
    """Return the offers that no other beats in both `hardware` and `worth` (more is better), cheapest first."""
    kept: list[Offer] = []
    for offer in sorted(offers, key=lambda offer: (offer.hardware, -worth(offer.result))):
        if not kept or worth(offer.result) > worth(kept[-1].result):
            kept.append(offer)
    return kept


def candidate_sizes(trace: Trace, block_bytes: int) -> tuple[list[int], list[int]]:
    """Return sizes of memory and of the disk to try, in bytes: shares of the power of two that holds the whole trace.

    Memory is tried from 1/128 of it to all of it, at least 4 blocks; the disk at none and from 1/8 to all.
    """
    everything = trace.num_unique * block_bytes
    largest = 1 << max(0, everything - 1).bit_length()
    least = 1 << max(0, 4 * block_bytes - 1).bit_length()
    dram = [size for size in (largest >> shift for shift in (7, 5, 4, 3, 2, 1, 0)) if size >= least] or [least]
    disk = [0, *(size for size in (largest >> shift for shift in (3, 2, 1, 0)) if size >= 2 * dram[0])]
    return dram, disk


def worth_trying(setup: Setup) -> bool:
    """Return whether the disk, if there is one, is so much larger than the memory that it can hold much more."""
    return not setup.disk_blocks or setup.disk_blocks >= 2 * setup.dram_blocks


def candidates(
    drams: Sequence[int], disks: Sequence[int], policies: Sequence[str], block_bytes: int, admission: Admission
) -> list[Setup]:
    """Return the configurations to simulate; sizes in blocks."""
    return [
        Setup(policy, dram, disk, block_bytes, admission) for policy in policies for dram in drams for disk in disks
    ]


def edge_note(offers: Sequence[Offer], chosen: Offer, trace: Trace) -> str:
    """Return a line if other sizes than those tried might be cheaper than what was chosen; else nothing."""
    setup, tried = chosen.result.setup, [offer.result.setup for offer in offers if offer.buys]
    if not chosen.buys:
        return ""
    memory = _edge(setup.dram_blocks, [other.dram_blocks for other in tried], 1, trace.num_unique)
    disk = _edge(setup.disk_blocks, [other.disk_blocks for other in tried], 0, trace.num_unique)
    edges = [("--dram", f"the {memory} memory"), ("--disk", f"the {disk} disk")]
    found = [edge for edge, name in zip(edges, (memory, disk), strict=True) if name]
    if not found:
        return ""
    options, what = (" and ".join(parts) for parts in zip(*found, strict=True))
    return f"this is {what} that was tried, other sizes may be cheaper: name more with {options}"


def _edge(chosen: int, tried: Sequence[int], least: int, most: int) -> str:
    """Return "largest" or "smallest" if the chosen size is that of all tried, and one beyond it could matter."""
    if not any(tried):
        return ""  # no disk was wanted
    if chosen == max(tried) and chosen < most:
        return "largest"
    return "smallest" if chosen == min(tried) and chosen > least else ""
