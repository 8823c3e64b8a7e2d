"""All metrics, one row each. `get_stats`, vLLM, Prometheus and docs/metrics.md take names and texts from here.

A counter starts at 0 when the manager is made and only rises; a gauge is the value at this moment. In `get_stats` a
counter is called `name.label.label`, a gauge `tier.name`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from operator import attrgetter
from typing import Any, NamedTuple

from kvtier.events import (
    BlocksEvicted,
    BlocksFailed,
    BlocksLoaded,
    BlocksStored,
    CacheReset,
    CascadeRefused,
    Event,
    HintIgnored,
    JobFinished,
    LoadFailed,
    RequestGaveUp,
    TierState,
    UnexpectedCall,
)


class Kind(Enum):
    """How a value may change."""

    COUNTER = "counter"
    GAUGE = "gauge"


class Source(Enum):
    """Where the value comes from."""

    EVENT = "event"
    """Counted from events."""
    MANAGER = "manager"
    """Read by the tiering manager from its own state."""
    TIER = "tier"
    """Read from `SecondaryTierManager.get_stats`; a tier may leave it out."""
    ENGINE = "engine"
    """Counted by the engine's adapter; not in `get_stats`."""


_COUNTER, _GAUGE = Kind.COUNTER, Kind.GAUGE

Amounts = Iterable[tuple[str, float]]
"""Pairs of label values, joined by dots ("" without labels), and the amount to add."""


class Metric(NamedTuple):
    """One metric.

    Attributes:
        name: in `get_stats`.
        labels: names of the labels; the tier is the first, and the only one of a gauge.
        exported: name in engines, without their prefix.
        event, read: for `Source.EVENT`, the event that is counted, and the function that gives the amounts.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    source: Source
    exported: str
    event: type[Any] | None = None
    read: Callable[[Any], Amounts] | None = None

    @property
    def is_in_get_stats(self) -> bool:
        """Whether the manager reports it, and not the engine's adapter."""
        return self.source is not Source.ENGINE

    @property
    def prometheus_name(self) -> str:
        """Name in Prometheus' text format, without the engine's prefix."""
        return f"{self.exported}_total" if self.kind is _COUNTER else self.exported


class Sample(NamedTuple):
    """The metric and the label values of one name in `get_stats`."""

    metric: Metric
    labels: tuple[str, ...]


def _on(
    event: type[Any],
    read: Callable[[Any], Amounts],
    name: str,
    labels: tuple[str, ...],
    meaning: str,
    exported: str = "",
) -> Metric:
    return Metric(name, _COUNTER, labels, meaning, Source.EVENT, f"kvtier_{exported or name}", event, read)


def _counter(source: Source, name: str, labels: tuple[str, ...], meaning: str, exported: str = "") -> Metric:
    return Metric(name, _COUNTER, labels, meaning, source, f"kvtier_{exported or name}")


def _gauge(source: Source, name: str, meaning: str, exported: str = "") -> Metric:
    return Metric(name, _GAUGE, _TIER, meaning, source, f"kvtier_{exported or name}")


def _loads(amount: Callable[[JobFinished], float]) -> Callable[[JobFinished], Amounts]:
    return lambda event: ((event.tier, amount(event)),) if event.is_promotion else ()


def _stores(amount: Callable[[JobFinished], float]) -> Callable[[JobFinished], Amounts]:
    return lambda event: () if event.is_promotion else ((event.tier, amount(event)),)


_BLOCKS, _BYTES, _SECONDS = (attrgetter(name) for name in ("num_successful", "num_bytes", "seconds"))
_MANAGER, _OWN, _ENGINE = Source.MANAGER, Source.TIER, Source.ENGINE
_TIER, _REASON, _CALL = ("tier",), ("reason",), ("call",)

_OF_REQUESTS = (
    _on(BlocksLoaded, lambda event: event.by_source.items(), "loaded_blocks", _TIER,
        "Blocks loaded to the device, by the tier they came from", "hit_blocks"),
    _on(LoadFailed, lambda event: (("", 1),), "failed_loads", (),
        "Loads to the device that failed; the engine computes these blocks, or asks for them once more"),
    _counter(_ENGINE, "lookups", ("answer",), "Answers to lookups of one block; a request that waits asks often"),
    _on(RequestGaveUp, lambda event: ((event.reason, 1),), "gave_up", _REASON,
        "Requests that stopped waiting: deadline, budget, probe or slower", "requests_gave_up"),
    _on(RequestGaveUp, lambda event: ((event.reason, event.num_blocks),), "gave_up_blocks", _REASON,
        "Blocks that requests stopped waiting for"),
    _on(HintIgnored, lambda event: (("", 1),), "ignored_hints", (), "Requests whose hint was malformed"),
)  # fmt: skip

_OF_BLOCKS = (
    _on(BlocksStored, lambda event: ((event.source or "device", len(event.keys)),), "stored_blocks", ("source",),
        "Blocks that became ready in host memory, from the device or a tier"),
    _on(BlocksEvicted, lambda event: ((event.tier, len(event.keys)),), "evicted_blocks", _TIER,
        "Blocks that gave way to others"),
    _gauge(_OWN, "blocks", "Blocks held"),
    _gauge(_OWN, "bytes", "Bytes held; where the capacity counts headers, keys or folders, they are counted here, too"),
    _gauge(_OWN, "capacity_blocks", "Blocks that fit"),
    _gauge(_OWN, "capacity_bytes", "The most that bytes held may become"),
    _gauge(_OWN, "kept_blocks", "Blocks that a hint keeps for a time; no victims until then"),
    _gauge(_MANAGER, "quarantined_blocks", "Slots of host memory that a late copy may still touch"),
    _gauge(_OWN, "prepared_share", "Share of a disk's space that is allocated ahead of use, 0 to 1"),
)  # fmt: skip

_OF_JOBS = (
    _on(JobFinished, _loads(_BLOCKS), "promoted_blocks", _TIER, "Blocks read from a tier", "read_blocks"),
    _on(JobFinished, _loads(_BYTES), "promoted_bytes", _TIER, "Bytes read from a tier", "read_bytes"),
    _on(JobFinished, _loads(_SECONDS), "promoted_seconds", _TIER, "Seconds that reading jobs took", "read_seconds"),
    _on(JobFinished, _stores(_BLOCKS), "cascaded_blocks", _TIER, "Blocks written to a tier", "written_blocks"),
    _on(JobFinished, _stores(_BYTES), "cascaded_bytes", _TIER, "Bytes written to a tier", "written_bytes"),
    _on(JobFinished, _stores(_SECONDS), "cascaded_seconds", _TIER, "Seconds that writing jobs took", "written_seconds"),
    _on(BlocksFailed, lambda event: ((f"{event.tier}.{event.cause.value}", event.num_blocks),), "failed_blocks",
        ("tier", "cause"), "Blocks that a tier could not serve or store; a wrong checksum counts as corrupt"),
    _on(CascadeRefused, lambda event: ((f"{event.tier}.{event.reason}", event.num_blocks),), "refused_blocks",
        ("tier", "reason"), "Blocks that were not offered to a tier: admission, throttled or down"),
    _gauge(_MANAGER, "jobs", "Jobs that a tier has not answered"),
    _gauge(_MANAGER, "store_jobs_in_flight", "Unanswered jobs that write to a tier"),
    _gauge(_MANAGER, "load_jobs_in_flight", "Unanswered jobs that read from a tier"),
    _gauge(_MANAGER, "store_blocks_in_flight", "Blocks of unanswered jobs that write to a tier"),
    _gauge(_MANAGER, "load_blocks_in_flight", "Blocks of unanswered jobs that read from a tier"),
)  # fmt: skip

_OF_HEALTH = (
    _gauge(_MANAGER, "up", "Whether a tier is used: 1 or 0", "tier_up"),
    _counter(_MANAGER, "down_seconds", _TIER, "Seconds that a tier was down", "tier_down_seconds"),
    *(
        _counter(_MANAGER, f"times_{state.value}", _TIER, f"Times that a tier became {state.value}",
                 f"tier_times_{state.value}")
        for state in TierState
    ),
    _counter(_OWN, "breaker_openings", _TIER, "Times that a tier stopped all its work, or its stores, after failures"),
    _gauge(_OWN, "stripes", "Directories that a tier is spread over"),
    _gauge(_OWN, "stripes_up", "Directories of a tier that work"),
    _on(UnexpectedCall, lambda event: ((event.what, event.times),), "unexpected", _CALL,
        "Completions that nothing waited for; should stay at 0", "unexpected_calls"),
    _counter(_ENGINE, "errors", _CALL, "Exceptions inside kvtier that were kept from the engine; should stay at 0"),
    _on(CacheReset, lambda event: (("", 1),), "resets", (), "Times that the cache was reset"),
)  # fmt: skip

GROUPS = {
    "Requests": _OF_REQUESTS,
    "Blocks held": _OF_BLOCKS,
    "Jobs of tiers": _OF_JOBS,
    "Health": _OF_HEALTH,
}
"""Every metric, by what it is about, in the order of the documentation."""

METRICS = {metric.name: metric for group in GROUPS.values() for metric in group}
"""Every metric, by its name in `get_stats`."""
_READ_COUNTERS = frozenset(m.name for m in METRICS.values() if m.kind is _COUNTER and m.source is not Source.EVENT)


def tier_readings(tier: str, readings: Mapping[str, float]) -> dict[str, float]:
    """Return the values read for one tier under their names in `get_stats`; names without a row are gauges."""
    return {f"{name}.{tier}" if name in _READ_COUNTERS else f"{tier}.{name}": value for name, value in readings.items()}


def find_sample(name: str) -> Sample | None:
    """Return the metric and label values of a name in `get_stats`; None if it has no row (a tier's own gauge)."""
    first, _, rest = name.partition(".")
    metric = METRICS.get(first)
    if metric is not None and metric.kind is _COUNTER:
        # Only the value of the first label (a tier's or a call's name) may contain dots.
        labels = tuple(rest.rsplit(".", len(metric.labels) - 1)) if rest else ()
        if len(labels) == len(metric.labels):
            return Sample(metric, labels)
    tier, _, last = name.rpartition(".")
    metric = METRICS.get(last)
    return Sample(metric, (tier,)) if tier and metric is not None and metric.kind is _GAUGE else None


class EventCounters:
    """Counts events as the rows say, since it was made."""

    def __init__(self) -> None:
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._readers: defaultdict[type[Any], list[tuple[str, Callable[[Any], Amounts]]]] = defaultdict(list)
        for metric in METRICS.values():
            if metric.event is not None and metric.read is not None:
                prefix = f"{metric.name}." if metric.labels else metric.name
                self._readers[metric.event].append((prefix, metric.read))

    def on_event(self, event: Event) -> None:
        counts = self._counts
        for prefix, read in self._readers.get(type(event), ()):
            for labels, amount in read(event):
                counts[prefix + labels] += amount

    def snapshot(self) -> dict[str, float]:
        """Return all counts, named as in `get_stats`."""
        return dict(self._counts)
