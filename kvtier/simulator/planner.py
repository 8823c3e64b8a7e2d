"""Chooses the cheapest memory and disk that reach a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvtier.simulator.long_prompts import long_prompts_note
from kvtier.simulator.prices import Offer, Prices, Target
from kvtier.simulator.results import Result
from kvtier.simulator.setup import Machine, Setup
from kvtier.simulator.trace import Trace

LEAST_GAIN = 0.001
"""Least gain in hit rate that justifies more hardware; a replay is not more exact than this."""
MAX_EXTRA_COST = 0.01
"""Largest share of the least total that a saving of hardware may cost. If nearly all is found, even `LEAST_GAIN` is a
large part of what the accelerators still compute.
"""


@dataclass(frozen=True)
class Plan:
    """The question, all offers, and the choice.

    Attributes:
        trace, machine, block_bytes, target: the question; bytes of one block.
        offers: all offers; the first one buys nothing.
        chosen: the cheapest offer that meets the target, None if none does.
        option: what to add to `vllm serve`; "" if the choice buys nothing or no offer meets the target.
        edge: a line for people if the choice has the largest or smallest size that was tried; else "".
        warnings: further lines about the choice.
    """

    trace: Trace
    machine: Machine
    block_bytes: int
    target: Target
    offers: Sequence[Offer]
    chosen: Offer | None
    option: str = ""
    edge: str = ""
    warnings: Sequence[str] = ()

    @property
    def nothing(self) -> Offer:
        """The offer that buys nothing: the accelerator computes every prompt."""
        return self.offers[0]


def decide(trace: Trace, machine: Machine, offers: Sequence[Offer], prices: Prices, target: Target) -> Plan:
    """Return the choice and its warnings; the caller adds the option for vLLM."""
    chosen, block_bytes = cheapest(offers, target), offers[0].result.setup.block_bytes
    if chosen is None:
        return Plan(trace, machine, block_bytes, target, offers, None)
    warnings = [wear_note(chosen, prices), long_prompts_note(trace, [chosen.result.setup])]
    told, edge = [warning for warning in warnings if warning], edge_note(offers, chosen, trace)
    return Plan(trace, machine, block_bytes, target, offers, chosen, edge=edge, warnings=told)


def cheapest(offers: Sequence[Offer], target: Target) -> Offer | None:
    """Return the cheapest offer that meets the target; None if none does.

    An offer with cheaper memory and disk is preferred if its hit rate is at most `LEAST_GAIN` lower and its total at
    most `MAX_EXTRA_COST` above the least. Of equal offers the one that buys nothing is preferred, then the one with
    the best hit rate.
    """
    good = [offer for offer in offers if target.is_met_by(offer.result)]
    if not good:
        return None
    best = min(good, key=lambda offer: (offer.total, offer.buys, -offer.result.hit_rate))
    least_rate, most_total = best.result.hit_rate - LEAST_GAIN, best.total * (1 + MAX_EXTRA_COST)
    alike = [offer for offer in good if offer.result.hit_rate >= least_rate and offer.total <= most_total]
    return min(alike, key=lambda offer: (offer.hardware, offer.total, offer.buys, -offer.result.hit_rate))


def frontier(offers: Sequence[Offer], worth: Callable[[Result], float], least_gain: float = 0.0) -> list[Offer]:
    """Return the Pareto frontier of `hardware` (less is better) and `worth` (more is better), cheapest first.

    Args:
        least_gain: an offer must exceed the worth of all cheaper ones on the frontier by more than this.
    """
    kept: list[Offer] = []
    for offer in sorted(offers, key=lambda offer: (offer.hardware, -worth(offer.result))):
        if not kept or worth(offer.result) > worth(kept[-1].result) + least_gain:
            kept.append(offer)
    return kept


def wear_note(chosen: Offer, prices: Prices) -> str:
    """Return a line if the disk is written more often than it endures; else ""."""
    writes = chosen.result.busiest_drive_writes_a_day
    if writes is None or chosen.wear <= 1:
        return ""
    return (
        f"in hours like the busiest the disk is written {writes:.1f} times a day: one made for {prices.drive_writes:g}"
        f" a day lasts {prices.months / chosen.wear:.1f} months instead of {prices.months:g}, and the price of a month"
        f" counts that; --drive-writes says what the drive is made for, --max-drive-writes what you allow"
    )


def candidate_sizes(trace: Trace, block_bytes: int) -> tuple[list[int], list[int]]:
    """Return the sizes of memory and of the disk to try, in bytes.

    They are fractions of the least power of two that holds the whole trace: memory from 1/128 to 1, but at least 4
    blocks; the disk 0 and from 1/8 to 1, but at least twice the least memory.
    """
    everything = trace.num_unique * block_bytes
    largest = 1 << max(0, everything - 1).bit_length()
    least = 1 << max(0, 4 * block_bytes - 1).bit_length()
    dram = [size for size in (largest >> shift for shift in (7, 5, 4, 3, 2, 1, 0)) if size >= least] or [least]
    disk = [0, *(size for size in (largest >> shift for shift in (3, 2, 1, 0)) if size >= 2 * dram[0])]
    return dram, disk


def worth_trying(setup: Setup) -> bool:
    """Return whether the setup has no disk, or a disk of at least twice the memory."""
    return not setup.disk_blocks or setup.disk_blocks >= 2 * setup.dram_blocks


def edge_note(offers: Sequence[Offer], chosen: Offer, trace: Trace) -> str:
    """Return a line if a size beyond those that were tried may be cheaper; else ""."""
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
    """Return "largest" or "smallest" if the chosen size is that of all tried sizes; "" if a further size is useless.

    A size above `most` holds nothing more, and no size is below `least`.
    """
    if not any(tried):
        return ""  # only setups without a disk were tried
    if chosen == max(tried) and chosen < most:
        return "largest"
    return "smallest" if chosen == min(tried) and chosen > least else ""
