"""kvtier's table of metrics, and what `get_stats` returns, in vLLM's form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingGaugeMetadata

from kvtier.metrics import METRICS, Kind, Metric, Sample, find_sample

_METADATA = {Kind.COUNTER: OffloadingCounterMetadata, Kind.GAUGE: OffloadingGaugeMetadata}


def vllm_name(metric: Metric) -> str:
    """Return a metric's name in vLLM, which appends "_total" to counters when it shows them."""
    return f"vllm:{metric.exported}"


def metric_definitions() -> dict[str, Any]:
    """Return the metadata of every metric, by name; vLLM refuses names that are not declared."""
    return {vllm_name(metric): _METADATA[metric.kind](metric.help, metric.labels) for metric in METRICS.values()}


class StatsReporter:
    """Turns counts since the beginning into vLLM's counts since the last report.

    Attributes:
        answers: lookups so far, by answer.
        errors: exceptions kept from the engine so far, by method.
    """

    def __init__(self) -> None:
        self.answers: Counter[Any] = Counter()
        self.errors: Counter[str] = Counter()
        self._reported: dict[str, float] = {}
        self._known: dict[str, tuple[str, Sample] | None] = {}

    def report(self, stats: Mapping[str, float]) -> Any:
        """Return vLLM's statistics, or None if nothing has changed.

        Args:
            stats: as `TieringOffloadingManager.get_stats` returns them.
        """
        made = OffloadingConnectorStats()
        answers = {f"lookups.{answer.name.lower()}": count for answer, count in self.answers.items()}
        errors = {f"errors.{method}": count for method, count in self.errors.items()}
        known = self._known
        for name, value in {**stats, **answers, **errors}.items():
            # vLLM asks at every step and the same names come back: to take them apart costs more than all the rest.
            if name not in known:
                sample = find_sample(name)
                known[name] = None if sample is None else (vllm_name(sample.metric), sample)
            found = known[name]
            if found is None:
                continue
            exported, (metric, labels) = found
            if metric.kind is Kind.GAUGE:
                made.set_gauge(exported, value, labels)
            elif (added := value - self._reported.get(name, 0)) > 0:
                self._reported[name] = value
                made.increase_counter(exported, added, labels)
        return None if made.is_empty() else made
