"""What an engine's metrics were at moments of a recording, whose calls are repeated for that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from kvtier.cli.watching.exposition import PREFIX, Sample
from kvtier.metrics.counters import find_sample
from kvtier.metrics.rows import Kind
from kvtier.simulator.again import steps


def samples(path: Path, interval: float | None) -> Iterator[Sample]:
    """Yield the metrics at the beginning of a recording, after each `interval` of seconds in which something happened,
    and at the end; with None, only at the beginning and the end.

    Raises:
        TraceError: the file is no recording, or is damaged.
        ConfigError: the recorded policy is not registered.
    """
    seconds, last = None, None
    for time, repeater in steps(path):
        if seconds is None or (interval is not None and time >= seconds + interval):
            seconds = time
            yield _sample(time, repeater.stats())
        last = time, repeater
    if last is not None and last[0] != seconds:
        yield _sample(last[0], last[1].stats())


def _sample(seconds: float, stats: Mapping[str, float]) -> Sample:
    """Return `get_stats` under the names that an engine exports."""
    values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for name, value in stats.items():
        found = find_sample(name)
        if found is None:
            continue
        series = found.metric.exported.removeprefix(PREFIX)
        if found.metric.kind is Kind.HISTOGRAM:
            series += name.partition(".")[0].removeprefix(found.metric.name)
        elif found.metric.kind is Kind.COUNTER:
            series += "_total"
        values[series, frozenset(zip(found.metric.label_names, found.labels, strict=True))] = value
    return Sample(seconds, values)
