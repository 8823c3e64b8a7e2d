"""kvtier's metrics and statistics as vLLM's types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingHistogramMetadata,
)

from kvtier.metrics import METRICS, OFF_REASONS, Kind, Metric
from kvtier.metrics.counters import Observations, Sample, find_sample, zero_counts
from kvtier.tiering.requests import PRIMARY

Targets = list[tuple[str, tuple[str, ...]]]
"""Names in vLLM, each with its label values."""
_NOT_OFF = {f"{reason}.off": 0.0 for reason in OFF_REASONS}


def vllm_name(exported: str) -> str:
    """Return a metric's name in vLLM; vLLM itself appends "_total" to the names of exported counters."""
    return f"vllm:{exported}"


def metric_definitions(*, with_names_of_vllm: bool = True) -> dict[str, Any]:
    """Return the metadata of every metric, by name. vLLM refuses metrics that are not declared.

    Args:
        with_names_of_vllm: whether kvtier's values also have the names of vLLM's own offloading.
    """
    definitions: dict[str, Any] = {}
    for metric in METRICS.values():
        definitions[vllm_name(metric.exported)] = _metadata(metric, metric.label_names)
        if metric.also and with_names_of_vllm:
            definitions[vllm_name(metric.also)] = _metadata(metric, metric.labels_of_also)
    return definitions


def _metadata(metric: Metric, labels: tuple[str, ...]) -> Any:
    if metric.kind is Kind.HISTOGRAM:
        return OffloadingHistogramMetadata(metric.help, labels, metric.buckets)
    return (OffloadingCounterMetadata if metric.kind is Kind.COUNTER else OffloadingGaugeMetadata)(metric.help, labels)


def _targets(metric: Metric, labels: tuple[str, ...]) -> Targets:
    targets = [(vllm_name(metric.exported), labels)]
    if metric.also:
        targets.append((vllm_name(metric.also), labels if metric.labels_of_also else ()))
    return targets


class StatsReporter:
    """Turns totals into the increments since the last report, as vLLM expects, and reports gauges that have changed."""

    def __init__(self, observations: Observations | None = None) -> None:
        """Args: observations: the values of histograms, which a report takes."""
        self._observations = observations
        self._reported: dict[str, float] = {}
        self._known: dict[str, tuple[Kind, Targets] | None] = {}

    def report(self, stats: Mapping[str, float]) -> Any:
        """Return vLLM's statistics, or None if nothing has changed.

        Args:
            stats: named as in `TieringOffloadingManager.get_stats`.
        """
        made = OffloadingConnectorStats()
        reported, known = self._reported, self._known
        for name, value in stats.items():
            before = reported.get(name)
            if value == before:
                continue
            # vLLM calls this at every step with the same names. Parsing a name costs more than the rest of the loop.
            if name not in known:
                known[name] = _known(find_sample(name))
            reported[name] = value
            found = known[name]
            if found is None:
                continue
            kind, targets = found
            for exported, labels in targets:
                if kind is Kind.GAUGE:
                    made.set_gauge(exported, value, labels)
                else:
                    # An increment of 0 makes the series begin.
                    made.increase_counter(exported, max(0, value - (before or 0)), labels)
        for metric, labels, value in self._observations.take() if self._observations is not None else ():
            for exported, values in _targets(metric, labels):
                made.observe_histogram(exported, value, values)
        return None if made.is_empty() else made


class ManagerStatsReporter(StatsReporter):
    """Adds what only the engine's adapter counts.

    Attributes:
        num_misses, num_pending, num_retries: number of lookups so far, by answer. The others are hits.
        errors: number of exceptions of kvtier so far, by method of the manager.
    """

    def __init__(self, observations: Observations) -> None:
        super().__init__(observations)
        self.num_misses = self.num_pending = self.num_retries = 0
        self.errors: Counter[str] = Counter()
        self._has_begun = False

    def _gauges_at_zero(self) -> dict[str, float]:
        """Return a 0 for each gauge reported so far: vLLM keeps the last value of one that nobody sets."""
        return {name: 0.0 for name, found in self._known.items() if found is not None and found[0] is Kind.GAUGE}

    def report_all(self, stats: Mapping[str, float], num_lookups: int, off_reason: str | None) -> Any:
        """Return vLLM's statistics, or None if nothing has changed.

        Args:
            stats: as `TieringOffloadingManager.get_stats` returns them; empty without a manager.
            num_lookups: number of lookups so far.
            off_reason: one of `OFF_REASONS` while kvtier is off, else None. Then no tier is up, and nothing is held.
        """
        zeros: Mapping[str, float] = {}
        if stats and not self._has_begun:
            # Every series whose labels are known begins at 0: an alert does not notice the event with which one begins.
            self._has_begun = True
            zeros = zero_counts(PRIMARY, [name.removesuffix(".up") for name in stats if name.endswith(".up")])
        if off_reason is not None:
            stats = self._gauges_at_zero()
        answers = {
            "lookups.hit": num_lookups - self.num_misses - self.num_pending - self.num_retries,
            "lookups.miss": self.num_misses,
            "lookups.hit_pending": self.num_pending,
            "lookups.retry": self.num_retries,
        }
        errors = {f"errors.{method}": count for method, count in self.errors.items()}
        off = _NOT_OFF if off_reason is None else _NOT_OFF | {f"{off_reason}.off": 1.0}
        return self.report({**zeros, **stats, **answers, **errors, **off})


def _known(sample: Sample | None) -> tuple[Kind, Targets] | None:
    """Return how to report a sample; None for a tier's own gauges, and for parts of histograms."""
    if sample is None or sample.metric.kind is Kind.HISTOGRAM:
        return None
    return sample.metric.kind, _targets(sample.metric, sample.labels)


class KVTierConnectorStats(OffloadingConnectorStats):  # type: ignore[misc]  # vLLM is not there when types are checked
    """vLLM's statistics, of which its periodic line in the log has five numbers that a person reads."""

    def reduce(self) -> dict[str, int | float]:
        """Return what kvtier did since the last line."""
        return {
            "kvtier: tokens loaded": round(self._sum("kvtier_saved_tokens")),
            "seconds of computing saved": round(self._sum("kvtier_saved_seconds"), 1),
            "seconds waited": round(self._sum("kvtier_wait_seconds"), 1),
            "blocks stored": round(self._sum("kvtier_stored_blocks", ("device",))),
            "blocks failed": round(self._sum("kvtier_failed_blocks")),
        }

    def _sum(self, exported: str, labels: tuple[str, ...] | None = None) -> float:
        """Return the sum over the values of a metric, of all labels unless `labels` are given."""
        values = self.data["data"].get(vllm_name(exported), {})
        chosen = values.values() if labels is None else filter(None, [values.get(labels)])
        return float(sum(sum(value) if isinstance(value, list) else value for value in chosen))
