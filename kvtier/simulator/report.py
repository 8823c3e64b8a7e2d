"""The report of a simulation: rows for the terminal, values for JSON, and an HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvtier.simulator.axes import Axis
from kvtier.simulator.charts import Data, Series, area_chart, line_chart
from kvtier.simulator.page import figures, page, remarks, section
from kvtier.simulator.rates import HOUR, UNEVEN, busiest_hour
from kvtier.simulator.results import NUM_INTERVALS, Result
from kvtier.simulator.setup import DISK, Machine
from kvtier.simulator.tables import table
from kvtier.simulator.trace import Trace
from kvtier.sizes import format_size

NO_OFFLOADING = "no offloading"
HEADER = (
    "policy",
    "DRAM",
    "disk",
    "hit rate",
    "from DRAM",
    "from disk",
    "tokens saved",
    "read from disk",
    "written to disk",
    "writes a day",
    "TTFT p50",
    "p95",
    "p99",
)


def percent(share: float) -> str:
    """Return a share, 0 to 1, as a percentage."""
    return f"{100 * share:.1f}%"


def seconds(value: float) -> str:
    """Return seconds as a short text."""
    if not value:
        return "0 s"
    if value < 0.001:
        return f"{1e6 * value:.0f} µs"
    if value < 1:
        return f"{1000 * value:.0f} ms"
    return f"{value:.2f} s" if value < 100 else f"{value:,.0f} s"


def overload_note(results: Sequence[Result]) -> str:
    """Return a line if the accelerator cannot keep up with the requests in one of the results; else ""."""
    if all(result.computing <= 1 for result in results):
        return ""
    least, most = (percent(choose(result.computing for result in results)) for choose in (min, max))
    takes = most if least == most else f"{least} to {most}"
    return (
        f"one accelerator is too few: computing takes {takes} of the trace's time, so that requests wait ever longer"
        " and times to the first token grow with the trace; --prefill-rate takes the rate of several together"
    )


def drive_writes(result: Result) -> str:
    """Return the whole writes of the disk per day, in hours like the busiest and on average; "-" without a disk."""
    busiest, mean = result.busiest_drive_writes_a_day, result.drive_writes_a_day
    return "-" if busiest is None or mean is None else f"{busiest:.1f}x / {mean:.1f}x"


def result_row(result: Result) -> list[str]:
    """Return the cells of one configuration, in the order of `HEADER`."""
    setup = result.setup
    has_disk = bool(setup.disk_blocks)
    admission = f", {setup.admission.value}" if has_disk and setup.admission.value != "always" else ""
    return [
        setup.policy + admission,
        format_size(setup.dram_bytes),
        format_size(setup.disk_bytes) if has_disk else "-",
        percent(result.hit_rate),
        percent(result.share("primary")),
        percent(result.share(DISK)) if has_disk else "-",
        f"{result.saved_tokens / 1e6:,.1f} M",
        format_size(result.promoted_bytes) if has_disk else "-",
        format_size(result.cascaded_bytes) if has_disk else "-",
        drive_writes(result),
        *(seconds(result.first_token_at(p)) for p in (50, 95, 99)),
    ]


def recompute_row(result: Result) -> list[str]:
    """Return the cells for the same requests without offloading, in the order of `HEADER`."""
    times = [seconds(result.recompute_at(p)) for p in (50, 95, 99)]
    return [NO_OFFLOADING, "-", "-", percent(0.0), "-", "-", "0.0 M", "-", "-", "-", *times]


def facts(trace: Trace, block_bytes: int, machine: Machine) -> list[str]:
    """Return lines about the trace, the block size and the machine, on which the figures depend."""
    ideal = trace.num_ideal_hits / max(1, trace.num_accesses)
    doubling = machine.prefill_doubling
    slowing = "" if math.isinf(doubling) else f" (half as many behind {doubling:,.0f} tokens)"
    return [
        f"{trace.name} ({trace.format}): {len(trace.requests):,} requests, {trace.num_accesses:,} block accesses, "
        f"{trace.num_unique:,} different blocks of {trace.tokens_per_block} tokens, {trace.seconds:,.0f} s",
        f"a block is {format_size(block_bytes)}, all of them {format_size(trace.num_unique * block_bytes)}; "
        f"a cache without limit would hit {percent(ideal)}",
        f"computes {machine.prefill_rate:,.0f} tokens/s{slowing}, copies {machine.host_bandwidth / 1e9:g} GB/s; disk "
        f"reads {machine.disk_read / 1e9:g} GB/s, writes {machine.disk_write / 1e9:g} GB/s, "
        f"takes {seconds(machine.disk_latency)} a job",
        *([trace.note] if trace.note else []),
        *([uneven] if (uneven := uneven_note(trace, machine)) else []),
    ]


def uneven_note(trace: Trace, machine: Machine) -> str:
    """Return a line if the busiest hour has more than `UNEVEN` times the mean hour's work; else ""."""
    work = [(request.time, machine.prefill_seconds(0, request.input_tokens)) for request in trace.requests]
    ratio = busiest_hour(work, trace.seconds) / (sum(amount for _, amount in work) / trace.seconds or 1.0)
    if ratio <= UNEVEN:
        return ""
    return (
        f"the busiest hour has {ratio:.0f} times the mean hour's work in {trace.seconds / HOUR:.0f} h: buy for the "
        "busiest; rates are given for both"
    )


def label(result: Result, others: Sequence[Result]) -> str:
    """Return a name with the values in which the configurations differ."""
    setup = result.setup
    parts = [setup.policy]
    if len({other.setup.dram_blocks for other in others}) > 1:
        parts.append(format_size(setup.dram_bytes))
    if len({other.setup.disk_blocks for other in others}) > 1:
        parts.append(f"+ {format_size(setup.disk_bytes)} disk" if setup.disk_blocks else "no disk")
    if len({other.setup.admission for other in others}) > 1:
        parts.append(setup.admission.value)
    return " ".join(parts)


def trace_json(trace: Trace) -> dict[str, Any]:
    """Return a trace's figures as JSON values."""
    return {
        "name": trace.name,
        "format": trace.format,
        "tokens_per_block": trace.tokens_per_block,
        "requests": len(trace.requests),
        "block_accesses": trace.num_accesses,
        "unique_blocks": trace.num_unique,
        "ideal_hit_rate": trace.num_ideal_hits / max(1, trace.num_accesses),
        "seconds": trace.seconds,
        "note": trace.note,
    }


def as_json(trace: Trace, machine: Machine, results: Sequence[Result], curve: Sequence[Result]) -> dict[str, Any]:
    """Return the whole report as JSON values."""
    return {
        "trace": trace_json(trace),
        "machine": {name: getattr(machine, name) for name in machine.__dataclass_fields__},
        "results": [result.to_json() for result in results],
        "curve": [
            {
                "policy": result.setup.policy,
                "dram_bytes": result.setup.dram_bytes,
                "disk_bytes": result.setup.disk_bytes,
                "hit_rate": result.hit_rate,
            }
            for result in curve
        ],
    }


def as_page(
    trace: Trace, machine: Machine, block_bytes: int, results: Sequence[Result], curve: Sequence[Result]
) -> str:
    """Return the report as one HTML document.

    Args:
        curve: further results, for the chart of the hit rate over the size of the primary tier.
    """
    rows = [result_row(result) for result in results] + [recompute_row(results[0])]
    best = max(range(len(results)), key=lambda index: results[index].hit_rate) if len(results) > 1 else None
    notes = facts(trace, block_bytes, machine)
    shown = _most_telling(results)
    return page(
        f"kvtier simulation of {trace.name}",
        notes[0],
        [
            remarks(notes[1:]),
            section("Configurations", "The best hit rate stands out.", [table(HEADER, rows, best)]),
            section(
                "How much memory",
                "Every point is a replay of the whole trace; the dashed line is a cache without limit.",
                [figures([_size_chart(trace, [*results, *curve]), _time_chart(shown, results)])],
            ),
            section(
                "Where the blocks came from",
                "Over the time of the trace, as a share of the blocks that were asked for.",
                [figures([_source_chart(result, label(result, results)) for result in shown])],
            ),
        ],
    )


def _most_telling(results: Sequence[Result]) -> list[Result]:
    """Return the six results with the best hit rates, in the order of `results`."""
    best = sorted(results, key=lambda result: -result.hit_rate)[:6]
    return [result for result in results if any(result is one for one in best)]


def _size_chart(trace: Trace, results: Sequence[Result]) -> str:
    ideal = trace.num_ideal_hits / max(1, trace.num_accesses)
    lines: dict[str, dict[float, float]] = {}
    several = len({result.setup.disk_blocks for result in results}) > 1
    for result in results:
        setup = result.setup
        disk = f", {format_size(setup.disk_bytes)} disk" if several and setup.disk_blocks else ""
        lines.setdefault(setup.policy + disk, {})[float(setup.dram_bytes)] = result.hit_rate
    sizes = [float(result.setup.dram_bytes) for result in results]
    low, high = min(sizes), max(sizes)
    if low == high:
        low, high = low / 2, high * 2
    x = Axis("size of the primary tier", _short_size, low, high, logarithmic=True)
    series = [Series(name, sorted(points.items())) for name, points in lines.items()]
    series.append(Series("without limit", [(low, ideal), (high, ideal)], dashed=True))
    top = max(0.05, *(result.hit_rate for result in results), ideal) * 1.08
    return line_chart("Hit rate over cache size", x, Axis("blocks found", _short_percent, 0.0, top), series)


def _time_chart(shown: Sequence[Result], results: Sequence[Result]) -> str:
    """Return a figure of the share of requests over the time to the first token."""
    series = [Series(label(result, results), _cumulated(result.first_token)) for result in shown]
    series.append(Series(NO_OFFLOADING, _cumulated(results[0].recompute), dashed=True))
    values = [value for one in series for value, _ in one.points]
    high = max(values)
    low = max(high / 10_000, min(value for value in values if value > 0) if high > 0 else 1e-3)
    x = Axis("time to first token", seconds, low, max(high, low * 2), logarithmic=True)
    y = Axis("requests served by then", _short_percent, 0.0, 1.0)
    rows = [
        [f"{percentage}%", *(seconds(one.points[round(percentage / 100 * (len(one.points) - 1))][0]) for one in series)]
        for percentage in (*range(0, 100, 5), 99, 100)
    ]
    return line_chart("Time to first token", x, y, series, Data([y.title, *(one.name for one in series)], rows))


def _cumulated(quantiles: Sequence[float]) -> list[tuple[float, float]]:
    return [(value, index / (len(quantiles) - 1)) for index, value in enumerate(quantiles)]


def _source_chart(result: Result, name: str) -> str:
    names: Mapping[str, int] = {"from DRAM": 0, "from disk": 1, "computed": 2}
    step = result.seconds / NUM_INTERVALS / 60
    rows = [
        ((index + 0.5) * step, [count / max(1, sum(counts)) for count in counts])
        for index, counts in enumerate(result.timeline)
        if sum(counts)
    ]
    x = Axis("minutes", lambda value: f"{value:.4g}", 0.0, result.seconds / 60)
    return area_chart(name, x, Axis("blocks", _short_percent, 0.0, 1.0), list(names), rows)


def _short_percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _short_size(size: float) -> str:
    text = format_size(size)
    return text.replace(".0 ", " ")
