"""kvtier's metrics and statistics as vLLM's types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingGaugeMetadata

from kvtier.metrics import METRICS, Kind, Metric, Sample, find_sample

_METADATA = {Kind.COUNTER: OffloadingCounterMetadata, Kind.GAUGE: OffloadingGaugeMetadata}


def vllm_name(metric: Metric) -> str:
    """Return a metric's name in vLLM; vLLM itself appends "_total" to the names of exported counters."""
    return f"vllm:{metric.exported}"


def metric_definitions() -> dict[str, Any]:
    """Return the metadata of every metric, by name. vLLM refuses metrics that are not declared."""
    return {vllm_name(metric): _METADATA[metric.kind](metric.help, metric.labels) for metric in METRICS.values()}


class StatsReporter:
    """Turns totals into the increments since the last report, which vLLM expects.

    Attributes:
        num_hits, num_misses, num_pending, num_retries: number of lookups so far, by answer.
        errors: number of exceptions of kvtier so far, by method of the manager.
    """

    def __init__(self) -> None:
        self.num_hits = self.num_misses = self.num_pending = self.num_retries = 0
        self.errors: Counter[str] = Counter()
        self._reported: dict[str, float] = {}
        self._known: dict[str, tuple[str, Sample] | None] = {}

    def report(self, stats: Mapping[str, float]) -> Any:
        """Return vLLM's statistics, or None if nothing has changed.

        Args:
            stats: as `TieringOffloadingManager.get_stats` returns them.
        """
        made = OffloadingConnectorStats()
        answers = {
            "lookups.hit": self.num_hits,
            "lookups.miss": self.num_misses,
            "lookups.hit_pending": self.num_pending,
            "lookups.retry": self.num_retries,
        }
        errors = {f"errors.{method}": count for method, count in self.errors.items()}
        known = self._known
        for name, value in {**stats, **answers, **errors}.items():
            # vLLM calls this at every step with the same names. Parsing a name costs more than the rest of the loop.
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
