"""The page of a recorded engine: where its hits came from, what it lost, and what larger tiers would have given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvtier.recording.format import Header
from kvtier.simulator import looks
from kvtier.simulator.axes import Axis
from kvtier.simulator.charts import Data, Series, area_chart, line_chart
from kvtier.simulator.live_run import COMPUTED, LiveRun
from kvtier.simulator.page import figures, page, remarks, section
from kvtier.simulator.report import percent, seconds
from kvtier.simulator.results import PRIMARY
from kvtier.simulator.tables import table
from kvtier.simulator.trace import Trace
from kvtier.simulator.what_if import AS_IT_WAS, Answer
from kvtier.sizes import format_size

_UNITS = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
_REASONS = {
    "deadline": "a tier took longer than load_deadline, or than computing",
    "budget": "host memory had no room for blocks on their way up",
    "probe": "a tier did not say in time whether it had them",
    "slower": "computing them was faster than loading",
}


def live_page(name: str, header: Header, run: LiveRun, trace: Trace, answers: Sequence[Answer]) -> str:
    """Return the page of a recording as one HTML document.

    Args:
        answers: the recorded configuration first.
    """
    tiers = ", ".join(tier.name for tier in header.tiers) or "none"
    memory = format_size(header.primary_blocks * header.block_bytes)
    return page(
        f"kvtier in {name}",
        f"{len(run.served):,} requests in {seconds(run.seconds)}; {memory} of host memory ({header.policy}), "
        f"tiers below: {tiers}",
        [
            remarks([trace.note]) if trace.note else "",
            section("Where the blocks came from", _summary(run), [_sources(run, header), figures([_over_time(run)])]),
            section("What was evicted and came back", _returns(run), _return_charts(run)),
            *_unanswered(run),
            section(
                "What larger tiers would have given",
                "The recorded requests, replayed in simulated time with other sizes; tiers below host memory as one "
                "disk. Compare with the row in bold: it is the recorded configuration, replayed with the same speeds.",
                [_answer_table(answers), figures([_size_chart(trace, header, run, answers)])],
            ),
        ],
    )


def live_json(run: LiveRun, answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the figures of the page as JSON values."""
    what_if = [{"line": one.question.line, "memory": one.question.memory, **one.result.to_json()} for one in answers]
    return {"recorded": run.to_json(), "what_if": what_if}


def _named(source: str) -> str:
    return "host memory" if source == PRIMARY else source


def _summary(run: LiveRun) -> str:
    saved = f" {run.saved_tokens:,} tokens were not computed, about {seconds(run.saved_seconds)} of work."
    return f"{percent(run.hit_rate)} of the prompts' blocks were loaded." + (saved if run.saved_tokens else "")


def _sources(run: LiveRun, header: Header) -> str:
    loaded, all_blocks = run.loaded, max(1, run.loaded.total() + run.num_computed)
    counts = [(_named(source), loaded[source]) for source in run.sources] + [(COMPUTED, run.num_computed)]
    rows = [
        [name, f"{count:,}", percent(count / all_blocks), format_size(count * header.block_bytes)]
        for name, count in counts
    ]
    return table(["source", "blocks", "share", "bytes"], rows)


def _over_time(run: LiveRun) -> str:
    names, (x, unit) = [*run.sources, COMPUTED], _time_axis(run)
    rows = [(at / unit, [row.get(name, 0) / sum(row.values()) for name in names]) for at, row in run.timeline()]
    shown = [*map(_named, run.sources), COMPUTED]
    return area_chart("Over time", x, Axis("blocks", _whole_percent, 0.0, 1.0), shown, rows)


def _time_axis(run: LiveRun) -> tuple[Axis, float]:
    """Return the axis of the recording's time, and the seconds of its unit."""
    name, unit = next((name, unit) for name, unit in _UNITS if run.seconds >= 2 * unit or unit == 1)
    return Axis(f"{name} since the first request", lambda value: f"{value:.4g}", 0.0, run.seconds / unit), unit


def _whole_percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _returns(run: LiveRun) -> str:
    if not run.num_evicted:
        return "Host memory evicted nothing: it was large enough."
    back, computed = len(run.returns), sum(one.source == COMPUTED for one in run.returns)
    text = f"Host memory evicted {run.num_evicted:,} blocks; {back:,} were wanted again"
    if not back:
        return f"{text}: more memory would have changed nothing."
    return f"{text}: {back - computed:,} came from a tier below, {computed:,} were computed again."


def _return_charts(run: LiveRun) -> list[str]:
    if not run.returns:
        return []
    names, (x, unit) = [source for source in run.sources if source != PRIMARY], _time_axis(run)
    rows = [(at / unit, [row.get(name, 0) for name in (*names, COMPUTED)]) for at, row in run.returned()]
    highest = max(sum(heights) for _, heights in rows)
    y = Axis("blocks", lambda value: f"{value:,.0f}", 0.0, highest * 1.08)
    # Host memory has the first look, here as in the chart above.
    over_time = area_chart("When they came back", x, y, [*names, "computed again"], rows, first_look=1)
    return [figures([over_time, _away_chart(run, names)])]


def _away_chart(run: LiveRun, names: Sequence[str]) -> str:
    """Return a figure of the time between a block's eviction and its return."""
    by_source = {name: sorted(one.away for one in run.returns if one.source == name) for name in (*names, COMPUTED)}
    shown = {name: times for name, times in by_source.items() if times}
    longest = max(times[-1] for times in shown.values())
    x = Axis("away for", seconds, max(longest / 10_000, 1e-3), max(longest, 2e-3), logarithmic=True)
    y = Axis("came back by then", _whole_percent, 0.0, 1.0)
    shares = [index / 100 for index in range(0, 101, 5)]
    series = [
        Series(
            "computed again" if name == COMPUTED else name,
            [(_at(times, share), share) for share in shares],
            look=looks.COMPUTED if name == COMPUTED else 1 + names.index(name),
        )
        for name, times in shown.items()
    ]
    rows = [[_whole_percent(share), *(seconds(_at(times, share)) for times in shown.values())] for share in shares]
    return line_chart("How long they were away", x, y, series, Data([y.title, *(one.name for one in series)], rows))


def _at(times: Sequence[float], share: float) -> float:
    return times[round(share * (len(times) - 1))]


def _unanswered(run: LiveRun) -> list[str]:
    if not run.gave_up:
        return []
    rows = [[_REASONS.get(reason, reason), f"{count:,}"] for reason, count in run.gave_up.most_common()]
    said = "Blocks that a tier may have had, and that were computed all the same."
    return [section("What was not waited for", said, [table(["because", "blocks"], rows)])]


def _answer_table(answers: Sequence[Answer]) -> str:
    first = answers[0].result
    rows = []
    for one in sorted(
        answers, key=lambda one: (one.question.line != AS_IT_WAS, one.question.line, one.question.memory)
    ):
        setup, result = one.result.setup, one.result
        gain = 100 * (result.hit_rate - first.hit_rate)
        rows.append(
            [
                one.question.line,
                format_size(setup.dram_bytes),
                format_size(setup.disk_bytes) if setup.disk_blocks else "-",
                percent(result.hit_rate),
                "as it was" if one is answers[0] else f"{gain:+.1f} points",
                seconds(result.first_token_at(50)),
                seconds(result.first_token_at(95)),
            ]
        )
    best = next(index for index, row in enumerate(rows) if row[4] == "as it was")
    return table(["", "memory", "tiers below", "hit rate", "gain", "TTFT p50", "p95"], rows, best)


def _size_chart(trace: Trace, header: Header, run: LiveRun, answers: Sequence[Answer]) -> str:
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in answers:
        lines.setdefault(one.question.line, []).append((float(one.result.setup.dram_bytes), one.result.hit_rate))
    sizes = [size for points in lines.values() for size, _ in points]
    ideal = trace.num_ideal_hits / max(1, trace.num_accesses)
    low, high = min(sizes), max(max(sizes), 2 * min(sizes))
    series = [Series(name, sorted(points)) for name, points in lines.items()]
    recorded = float(header.primary_blocks * header.block_bytes)
    series.append(Series("recorded", [(recorded, run.hit_rate)], line=False))
    series.append(Series("without limit", [(low, ideal), (high, ideal)], dashed=True))
    top = max(0.05, ideal, run.hit_rate, *(one.result.hit_rate for one in answers)) * 1.08
    x = Axis("host memory", lambda size: format_size(size).replace(".0 ", " "), low, high, logarithmic=True)
    return line_chart("Hit rate over host memory", x, Axis("blocks found", _whole_percent, 0.0, top), series)
