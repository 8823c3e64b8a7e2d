"""The values of metrics: counted from events, and named as in `get_stats`.

In `get_stats` a counter is called `name.label.label`, a gauge `tier.name`. A histogram gives the number and the sum of
its values, as `name_count.label.label` and `name_sum.label.label`.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from kvtier.events import Event
from kvtier.metrics.rows import METRICS, Amounts, Kind, Metric, Source

MAX_OBSERVATIONS = 10_000
"""Most values of histograms that are kept until they are taken."""

_COUNTER, _GAUGE, _HISTOGRAM = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM
_READ_COUNTERS = frozenset(m.name for m in METRICS.values() if m.kind is _COUNTER and m.source is not Source.EVENT)
_PARTS_OF = {m.name: (f"{m.name}_sum", f"{m.name}_count") for m in METRICS.values() if m.kind is _HISTOGRAM}
_PARTS = {part: METRICS[name] for name, parts in _PARTS_OF.items() for part in parts}


class Sample(NamedTuple):
    """The metric and the label values of one name in `get_stats`."""

    metric: Metric
    labels: tuple[str, ...]


def tier_readings(tier: str, readings: Mapping[str, float]) -> dict[str, float]:
    """Return the values read for one tier under their names in `get_stats`; names without a row are gauges."""
    return dict(zip(_names_of_readings(tier, tuple(readings)), readings.values(), strict=True))


@lru_cache(maxsize=256)
def _names_of_readings(tier: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names in `get_stats`; an engine asks for the same ones at every step."""
    return tuple(f"{name}.{tier}" if name in _READ_COUNTERS else f"{tier}.{name}" for name in names)


def find_sample(name: str) -> Sample | None:
    """Return the metric and label values of a name in `get_stats`; None if it has no row (a tier's own gauge)."""
    first, _, rest = name.partition(".")
    metric = _PARTS.get(first) or METRICS.get(first)
    if metric is not None and metric.kind is not _GAUGE and (metric.kind is _COUNTER or first in _PARTS):
        # Only the value of the first label (a tier's or a call's name) may contain dots.
        labels = tuple(rest.rsplit(".", len(metric.labels) - 1)) if rest else ()
        if len(labels) == len(metric.labels):
            return Sample(metric, labels)
    tier, _, last = name.rpartition(".")
    metric = METRICS.get(last)
    return Sample(metric, (tier,)) if tier and metric is not None and metric.kind is _GAUGE else None


def zero_counts(primary: str, tiers: Sequence[str]) -> dict[str, float]:
    """Return a 0 for every count of events whose labels are known before it happens, named as in `get_stats`.

    Args:
        primary, tiers: names of host memory and of the tiers below it.
    """
    every, zeros = [primary, *tiers], {}
    for metric in METRICS.values():
        if metric.kind is _COUNTER and metric.source is Source.EVENT:
            names = [
                (every if label.of_primary else tiers) if label.name == "tier" else label.values
                for label in metric.labels
            ]
            zeros.update({".".join((metric.name, *values)): 0.0 for values in itertools.product(*names)})
    return zeros


class EventCounters:
    """Counts events as the rows say, since it was made."""

    def __init__(self) -> None:
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._readers: defaultdict[type[Any], list[tuple[str, str, Callable[[Any], Amounts]]]] = defaultdict(list)
        self._histograms: dict[str, tuple[str, tuple[float, ...]]] = {}
        self._in_buckets: dict[str, list[int]] = {}
        for metric in METRICS.values():
            if metric.event is None or metric.read is None:
                continue
            dot = "." if metric.labels else ""
            if metric.kind is _HISTOGRAM:
                total, times = (f"{part}{dot}" for part in _PARTS_OF[metric.name])
                self._histograms[times] = (f"{metric.name}{dot}", metric.buckets)
            else:
                total, times = f"{metric.name}{dot}", ""
            self._readers[metric.event].append((total, times, metric.read))

    def on_event(self, event: Event) -> None:
        counts = self._counts
        for prefix, times, read in self._readers.get(type(event), ()):
            for labels, amount in read(event):
                counts[prefix + labels] += amount
                if times:
                    counts[times + labels] += 1
                    self._count_in_bucket(times, labels, amount)

    def _count_in_bucket(self, times: str, labels: str, value: float) -> None:
        name, ends = self._histograms[times]
        numbers = self._in_buckets.setdefault(name + labels, [0] * (len(ends) + 1))
        numbers[bisect_left(ends, value)] += 1  # a bucket has the values up to its end, with the end

    def snapshot(self) -> dict[str, float]:
        """Return all counts, named as in `get_stats`."""
        return dict(self._counts)

    def histograms(self) -> dict[str, tuple[int, ...]]:
        """Return per histogram, as `name.label.label`, the number of values in each bucket; the last has no end."""
        return {name: tuple(numbers) for name, numbers in self._in_buckets.copy().items()}


class Observations:
    """An observer that keeps the values of histograms until an engine's adapter takes them.

    Attributes:
        kinds: the events that have values.
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[Metric, tuple[str, ...], float]] = deque(maxlen=MAX_OBSERVATIONS)
        self._rows = [metric for metric in METRICS.values() if metric.kind is _HISTOGRAM]
        self.kinds = tuple({metric.event for metric in self._rows if metric.event is not None})

    def on_event(self, event: Event) -> None:
        """Keep the values that an event gives."""
        for metric in self._rows:
            if metric.event is type(event) and metric.read is not None:
                for labels, value in metric.read(event):
                    self._kept.append((metric, tuple(labels.rsplit(".", len(metric.labels) - 1)), value))

    def take(self) -> Iterable[tuple[Metric, tuple[str, ...], float]]:
        """Return the values since the last call, as (metric, label values, value)."""
        if not self._kept:
            return ()
        taken = list(self._kept)
        self._kept.clear()
        return taken
