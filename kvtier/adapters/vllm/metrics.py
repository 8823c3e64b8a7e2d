"""kvtier's statistics as metrics of vLLM: one table, from which names are declared and values reported."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingGaugeMetadata


class _Metric(NamedTuple):
    """A metric of vLLM, and the statistics it is made of: `prefix`, followed by one name a label."""

    name: str
    documentation: str
    labels: tuple[str, ...] = ()


_COUNTERS = {
    "loaded_blocks": _Metric(
        "vllm:kvtier_hit_blocks", "Blocks loaded to the device, by where they came from", ("tier",)
    ),
    "stored_blocks": _Metric(
        "vllm:kvtier_stored_blocks", "Blocks that became ready in host memory, by where they came from", ("source",)
    ),
    "evicted_blocks": _Metric("vllm:kvtier_evicted_blocks", "Blocks that gave way to others", ("tier",)),
    "promoted_blocks": _Metric("vllm:kvtier_read_blocks", "Blocks read from a tier into host memory", ("tier",)),
    "promoted_bytes": _Metric("vllm:kvtier_read_bytes", "Bytes read from a tier into host memory", ("tier",)),
    "promoted_seconds": _Metric("vllm:kvtier_read_seconds", "Seconds that jobs reading from a tier took", ("tier",)),
    "cascaded_blocks": _Metric("vllm:kvtier_written_blocks", "Blocks written from host memory to a tier", ("tier",)),
    "cascaded_bytes": _Metric("vllm:kvtier_written_bytes", "Bytes written from host memory to a tier", ("tier",)),
    "cascaded_seconds": _Metric("vllm:kvtier_written_seconds", "Seconds that jobs writing to a tier took", ("tier",)),
    "failed_blocks": _Metric(
        "vllm:kvtier_failed_blocks", "Blocks that a tier could not serve or store, by cause", ("tier", "cause")
    ),
    "refused_blocks": _Metric(
        "vllm:kvtier_refused_blocks", "Blocks that were not offered to a tier, by reason", ("tier", "reason")
    ),
    "gave_up": _Metric("vllm:kvtier_requests_gave_up", "Requests that stopped waiting, by reason", ("reason",)),
    "shadow_hits": _Metric(
        "vllm:kvtier_shadow_hit_blocks", "Sampled blocks that another policy or size would have had", ("shadow",)
    ),
    "shadow_blocks": _Metric(
        "vllm:kvtier_shadow_blocks", "Sampled blocks that another policy or size was asked for", ("shadow",)
    ),
    "policy_switches": _Metric(
        "vllm:kvtier_policy_switches", "Times that another policy took over", ("tier", "former", "chosen")
    ),
    "unexpected": _Metric("vllm:kvtier_unexpected_calls", "Completions that nothing waited for", ("call",)),
    "resets": _Metric("vllm:kvtier_resets", "Times the cache was reset"),
}
_GAUGES = {
    "blocks": _Metric("vllm:kvtier_blocks", "Blocks held", ("tier",)),
    "capacity_blocks": _Metric("vllm:kvtier_capacity_blocks", "Blocks that fit", ("tier",)),
    "quarantined_blocks": _Metric("vllm:kvtier_quarantined_blocks", "Slots a late copy may still touch", ("tier",)),
    "up": _Metric("vllm:kvtier_tier_up", "Whether a tier is used: 1 or 0", ("tier",)),
    "jobs": _Metric("vllm:kvtier_jobs", "Jobs that a tier has not answered", ("tier",)),
}
_ANSWERS = _Metric("vllm:kvtier_lookups", "Answers to lookups of one block; who waits asks often", ("answer",))
_ERRORS = _Metric("vllm:kvtier_errors", "Exceptions inside kvtier that were kept from the engine", ("call",))


def metric_definitions() -> dict[str, Any]:
    """Return the metadata of every metric, by name; vLLM refuses names that are not declared."""
    counters = [*_COUNTERS.values(), _ANSWERS, _ERRORS]
    return {
        **{metric.name: OffloadingCounterMetadata(metric.documentation, metric.labels) for metric in counters},
        **{metric.name: OffloadingGaugeMetadata(metric.documentation, metric.labels) for metric in _GAUGES.values()},
    }


class StatsReporter:
    """Turns counts since the beginning into vLLM's counts since the last report.

    Attributes:
        answers: lookups so far, by answer.
        errors: exceptions kept from the engine so far, by method.
    """

    def __init__(self) -> None:
        self.answers: Counter[Any] = Counter()
        self.errors: Counter[str] = Counter()
        self._reported: defaultdict[tuple[str, tuple[str, ...]], float] = defaultdict(float)

    def report(self, stats: Mapping[str, float]) -> Any:
        """Return vLLM's statistics, or None if nothing has changed.

        Args:
            stats: as `TieringOffloadingManager.get_stats` returns them.
        """
        made = OffloadingConnectorStats()
        for name, value in stats.items():
            self._add(made, name, value)
        for answer, count in self.answers.items():
            self._increase(made, _ANSWERS, (answer.name.lower(),), count)
        for method, count in self.errors.items():
            self._increase(made, _ERRORS, (method,), count)
        return None if made.is_empty() else made

    def _add(self, made: Any, name: str, value: float) -> None:
        prefix, _, rest = name.partition(".")
        counter = _COUNTERS.get(prefix)
        if counter is not None:
            num_labels = len(counter.labels)
            labels = tuple(rest.rsplit(".", num_labels - 1)) if num_labels else ()
            if len(labels) == num_labels:
                self._increase(made, counter, labels, value)
            return
        tier, _, kind = name.rpartition(".")
        gauge = _GAUGES.get(kind)
        if gauge is not None and tier:
            made.set_gauge(gauge.name, value, (tier,))

    def _increase(self, made: Any, metric: _Metric, labels: tuple[str, ...], total: float) -> None:
        added = total - self._reported[metric.name, labels]
        if added > 0:
            self._reported[metric.name, labels] = total
            made.increase_counter(metric.name, added, labels)
