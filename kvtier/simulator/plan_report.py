"""The report of a plan: rows for a terminal, values for JSON, figures for a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvtier.simulator.axes import Axis
from kvtier.simulator.charts import Series, line_chart
from kvtier.simulator.page import code, figures, page, paragraph, remarks, section
from kvtier.simulator.planner import LEAST_GAIN, Plan, frontier
from kvtier.simulator.prices import Offer
from kvtier.simulator.report import NO_OFFLOADING, drive_writes, facts, percent, seconds, trace_json
from kvtier.simulator.results import Result
from kvtier.simulator.tables import table
from kvtier.sizes import format_size

HEADER = (
    "policy",
    "DRAM",
    "disk",
    "hit rate",
    "TTFT p95",
    "DRAM a month",
    "disk a month",
    "accelerator, busiest / mean",
    "all a month",
    "writes a day",
    "",
)


def best_offers(plan: Plan) -> list[Offer]:
    """Return the frontier of hit rate over the price of hardware, and the chosen offer; cheapest hardware first."""
    best, chosen = frontier(plan.offers, lambda result: result.hit_rate, LEAST_GAIN), plan.chosen
    if chosen is None or any(offer is chosen for offer in best):
        return best
    return sorted([*best, chosen], key=lambda offer: offer.hardware)


def offer_row(offer: Offer, chosen: Offer | None) -> list[str]:
    """Return an offer's cells, in the order of `HEADER`."""
    result, setup = offer.result, offer.result.setup
    mark = "<- buy" if offer.buys else "<- buy nothing"
    return [
        setup.policy if offer.buys else NO_OFFLOADING,
        format_size(setup.dram_bytes) if offer.buys else "-",
        format_size(setup.disk_bytes) if setup.disk_blocks else "-",
        percent(result.hit_rate),
        seconds(result.first_token_at(95)),
        *(f"${amount:,.0f}" for amount in (offer.dram, offer.disk)),
        f"${offer.gpu:,.0f} / ${offer.mean_gpu:,.0f}",
        f"${offer.total:,.0f}",
        drive_writes(result),
        mark if offer is chosen else "",
    ]


def remarks_on(plan: Plan) -> list[str]:
    """Return the warnings about the choice, one line each."""
    return [*plan.warnings, *([plan.edge] if plan.edge else [])]


def advice(plan: Plan) -> str:
    """Return the advice in one line. If it ends with a colon, the option for vLLM must follow."""
    target = plan.target.describe()
    if plan.chosen is None:
        return f"none of them reaches {target}"
    if plan.chosen.buys:
        return f"for {target}, add to vllm serve:"
    cost = f"${plan.chosen.total:,.0f} a month"
    return f"for {target}, buy nothing: no memory and no disk that was tried is cheaper than to compute all, {cost}"


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON values; costs are dollars per month."""

    def values(offer: Offer) -> dict[str, Any]:
        costs = {"dram": offer.dram, "disk": offer.disk, "gpu": offer.gpu, "total": offer.total}
        costs |= {"mean_gpu": offer.mean_gpu, "wear": offer.wear}
        return {"cost_a_month": costs, **offer.result.to_json()}

    return {
        "trace": trace_json(plan.trace),
        "cost_a_month_without": plan.nothing.total,
        "chosen": None if plan.chosen is None else values(plan.chosen),
        "offers": [values(offer) for offer in plan.offers],
        "edge": plan.edge,
        "warnings": list(plan.warnings),
        "vllm": plan.option,
    }


def plan_page(plan: Plan) -> str:
    """Return the plan as one HTML document."""
    notes, best = facts(plan.trace, plan.block_bytes, plan.machine), best_offers(plan)
    marked = next((index for index, offer in enumerate(best) if offer is plan.chosen), None)
    said = advice(plan)
    return page(
        f"kvtier plan for {plan.trace.name}",
        notes[0],
        [
            remarks(notes[1:]),
            section(
                "What to buy",
                said[0].upper() + said[1:] + ("" if plan.option else "."),
                [*([code(plan.option)] if plan.option else []), *map(paragraph, remarks_on(plan))],
            ),
            section(
                "What money buys",
                "Every point is a configuration, replayed; the line joins those that no other beats.",
                [figures(_cost_charts(plan.offers))],
            ),
            section(
                "The frontier",
                "Configurations that no other beats in hit rate for the money; dollars a month.",
                [table(HEADER, [offer_row(offer, plan.chosen) for offer in best], marked)],
            ),
        ],
    )


def _cost_charts(offers: Sequence[Offer]) -> list[str]:
    by_rate = frontier(offers, lambda result: result.hit_rate)
    by_time = frontier(offers, lambda result: -result.first_token_at(95))
    return [
        _cost_chart("Hit rate", offers, by_rate, lambda result: result.hit_rate, percent, "blocks found"),
        _cost_chart("First token", offers, by_time, lambda result: result.first_token_at(95), seconds, "p95"),
    ]


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
