"""Which memory and which disk to buy: prices every simulated configuration and picks the cheapest that will do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvtier.errors import ConfigError
from kvtier.simulator.charts import Axis, Series, line_chart
from kvtier.simulator.page import code, figures, page, section, table
from kvtier.simulator.report import facts, percent, seconds
from kvtier.simulator.results import Result
from kvtier.simulator.setup import Machine, Setup
from kvtier.simulator.trace import Trace
from kvtier.sizes import format_size
from kvtier.types import Admission

HOURS_A_MONTH = 730.0
_GIB = 1 << 30

HEADER = (
    "policy",
    "DRAM",
    "disk",
    "hit rate",
    "TTFT p95",
    "DRAM a month",
    "disk a month",
    "accelerator a month",
    "all a month",
    "writes a day",
    "",
)


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
            ConfigError: one is below 0, or the months are not above 0.
        """
        for name in ("gpu_hour", "dram_gib", "disk_gib"):
            if not getattr(self, name) >= 0:
                raise ConfigError(name, getattr(self, name), "0 or more")
        if not self.months > 0:
            raise ConfigError("months", self.months, "above 0")


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
    def hardware(self) -> float:
        """What is bought: memory and disk."""
        return self.dram + self.disk

    @property
    def total(self) -> float:
        """All of it."""
        return self.hardware + self.gpu


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


def price_of_nothing(result: Result, machine: Machine, prices: Prices) -> float:
    """Return what a month costs without any offloading: the accelerator computes every prompt."""
    return result.input_tokens / machine.prefill_rate / result.seconds * HOURS_A_MONTH * prices.gpu_hour


def cheapest(offers: Sequence[Offer], target: Target) -> Offer | None:
    """Return the cheapest offer that meets the target, of equal ones the one with the best hit rate; None if none."""
    good = [offer for offer in offers if target.is_met_by(offer.result)]
    return min(good, key=lambda offer: (offer.total, -offer.result.hit_rate)) if good else None


def frontier(offers: Sequence[Offer], worth: Callable[[Result], float]) -> list[Offer]:
    """Return the offers that no other beats in both `hardware` and `worth` (more is better), cheapest first."""
    kept: list[Offer] = []
    for offer in sorted(offers, key=lambda offer: (offer.hardware, -worth(offer.result))):
        if not kept or worth(offer.result) > worth(kept[-1].result):
            kept.append(offer)
    return kept


def candidate_sizes(trace: Trace, block_bytes: int) -> tuple[list[int], list[int]]:
    """Return sizes of memory and of the disk to try, in bytes: powers of two up to all that the trace asks for."""
    everything = trace.num_unique * block_bytes
    largest = 1 << max(0, everything - 1).bit_length()
    least = 1 << max(0, 4 * block_bytes - 1).bit_length()
    dram = [size for size in (largest >> shift for shift in (7, 6, 5, 4, 3)) if size >= least] or [least]
    disk = [0, *(size for size in (largest >> shift for shift in (3, 2, 1, 0)) if size >= 2 * dram[0])]
    return dram, disk


def candidates(
    drams: Sequence[int], disks: Sequence[int], policies: Sequence[str], block_bytes: int, admission: Admission
) -> list[Setup]:
    """Return the configurations to simulate; sizes in blocks."""
    return [
        Setup(policy, dram, disk, block_bytes, admission) for policy in policies for dram in drams for disk in disks
    ]


def offer_row(offer: Offer, chosen: Offer | None) -> list[str]:
    """Return an offer's cells, as `HEADER` names them."""
    result, setup = offer.result, offer.result.setup
    writes = result.drive_writes_a_day
    return [
        setup.policy,
        format_size(setup.dram_bytes),
        format_size(setup.disk_bytes) if setup.disk_blocks else "-",
        percent(result.hit_rate),
        seconds(result.first_token_at(95)),
        *(f"${amount:,.0f}" for amount in (offer.dram, offer.disk, offer.gpu, offer.total)),
        "-" if writes is None else f"{writes:.1f}x",
        "<- buy" if offer is chosen else "",
    ]


def plan_json(offers: Sequence[Offer], chosen: Offer | None, nothing: float) -> dict[str, Any]:
    """Return the plan as JSON values."""

    def values(offer: Offer) -> dict[str, Any]:
        costs = {"dram": offer.dram, "disk": offer.disk, "gpu": offer.gpu, "total": offer.total}
        return {"cost_a_month": costs, **offer.result.to_json()}

    return {
        "cost_a_month_without": nothing,
        "chosen": None if chosen is None else values(chosen),
        "offers": [values(offer) for offer in offers],
    }


def plan_page(
    trace: Trace,
    machine: Machine,
    block_bytes: int,
    offers: Sequence[Offer],
    chosen: Offer | None,
    target: Target,
    option: str,
) -> str:
    """Return the plan as one HTML document."""
    notes = facts(trace, block_bytes, machine)
    by_rate, by_time = (
        frontier(offers, lambda result: result.hit_rate),
        frontier(offers, lambda result: -result.first_token_at(95)),
    )
    rows = [offer_row(offer, chosen) for offer in by_rate]
    best = next((index for index, offer in enumerate(by_rate) if offer is chosen), None)
    return page(
        f"kvtier plan for {trace.name}",
        notes[0],
        [
            f'<p class="faint">{notes[1]}.<br>{notes[2]}.</p>',
            section(
                "What to buy",
                f"Target: {target.describe()}."
                + ("" if chosen is not None else " No configuration that was tried reaches it."),
                [code(option)] if option else [],
            ),
            section(
                "What money buys",
                "Every point is a configuration, replayed; the line joins those that no other beats.",
                [
                    figures(
                        [
                            _cost_chart("Hit rate", offers, by_rate, lambda r: r.hit_rate, percent, "blocks found"),
                            _cost_chart("First token", offers, by_time, lambda r: r.first_token_at(95), seconds, "p95"),
                        ]
                    )
                ],
            ),
            section(
                "The frontier",
                "Configurations that no other beats in hit rate for the money; dollars a month.",
                [table(HEADER, rows, best)],
            ),
        ],
    )


def _cost_chart(
    title: str,
    offers: Sequence[Offer],
    best: Sequence[Offer],
    worth: Callable[[Result], float],
    write: Callable[[float], str],
    what: str,
) -> str:
    costs, values = [offer.hardware for offer in offers], [worth(offer.result) for offer in offers]
    x = Axis("memory and disk, dollars a month", lambda value: f"${value:,.0f}", 0.0, max(costs) * 1.02 or 1.0)
    y = Axis(what, write, 0.0, max(values) * 1.08 or 1.0)
    frontier_points = [(offer.hardware, worth(offer.result)) for offer in best]
    return line_chart(
        title,
        x,
        y,
        [
            Series("tried", list(zip(costs, values, strict=True)), line=False),
            Series("not beaten", frontier_points),
        ],
    )
