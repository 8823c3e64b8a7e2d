"""What prometheus-client reads of a manager, for programs without an engine that exports metrics itself.

Interface: custom collectors, https://prometheus.github.io/client_python/collector/custom/.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

from kvtier.errors import ConfigError
from kvtier.metrics.counters import find_sample, zero_counts
from kvtier.metrics.rows import METRICS, PRIMARY, Kind, Metric


class Counted(Protocol):
    """What a collector needs of a manager."""

    def get_stats(self) -> Mapping[str, float] | None:
        """Return counters since the start and current gauges."""


class Collector:
    """A collector for a registry of prometheus-client. Any thread may use it while the manager works."""

    def __init__(self, manager: Counted, prefix: str, families: Any) -> None:
        """Args: families: the module of prometheus-client with the classes of metric families."""
        self._manager = manager
        self._prefix = prefix
        self._families = families

    def describe(self) -> Iterator[Any]:
        """Yield every metric without values, so that a registry refuses a second collector with the same names."""
        for metric in METRICS.values():
            if metric.is_in_get_stats:
                yield self._family(metric)

    def collect(self) -> Iterator[Any]:
        """Yield every metric with its values of now."""
        stats = dict(self._manager.get_stats() or {})
        read_histograms = getattr(self._manager, "get_histograms", None)
        histograms = {} if read_histograms is None else read_histograms()
        found = {metric.name: self._family(metric) for metric in METRICS.values() if metric.is_in_get_stats}
        # An alert on an increase does not notice the event with which a series begins: so series begin at 0.
        tiers = [name.removesuffix(".up") for name in stats if name.endswith(".up")]
        for name, value in {**zero_counts(PRIMARY, tiers), **stats}.items():
            sample = find_sample(name)
            if sample is not None and sample.metric.kind is not Kind.HISTOGRAM:
                found[sample.metric.name].add_metric(sample.labels, value)
        for name, counts in histograms.items():
            metric = METRICS[name.partition(".")[0]]
            labels = name.removeprefix(f"{metric.name}.").rsplit(".", len(metric.labels) - 1)
            total = stats.get(name.replace(metric.name, f"{metric.name}_sum", 1), 0.0)
            found[metric.name].add_metric(labels, _cumulative(metric, counts), total)
        yield from found.values()

    def _family(self, metric: Metric) -> Any:
        kinds = {Kind.COUNTER: "Counter", Kind.GAUGE: "Gauge", Kind.HISTOGRAM: "Histogram"}
        make = getattr(self._families, f"{kinds[metric.kind]}MetricFamily")
        return make(f"{self._prefix}{metric.exported}", metric.help, labels=metric.label_names)


def collector(manager: Counted, prefix: str = "") -> Collector:
    """Return a collector of a manager's metrics, for a registry of prometheus-client.

    One registry takes one manager: the names of a second one are the same.

    Args:
        manager: of kvtier. Metrics that only an engine's adapter counts are left out, and gauges of a tier's own.
        prefix: before every name, for example "vllm:", which alerts and dashboards of `deploy/` expect.

    Raises:
        ConfigError: prometheus-client is not installed.
    """
    try:
        families = import_module("prometheus_client.core")
    except ModuleNotFoundError:
        raise ConfigError(
            "collector", "prometheus_client", "not installed: pip install prometheus-client, or read get_stats()"
        ) from None
    return Collector(manager, prefix, families)


def _cumulative(metric: Metric, counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return (upper end, number of values up to it) per bucket."""
    ends = [*(str(end) for end in metric.buckets), "+Inf"]
    return list(zip(ends, map(float, itertools.accumulate(counts)), strict=True))
