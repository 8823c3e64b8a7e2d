"""All metrics, one row each. `get_stats`, vLLM, Prometheus and docs/metrics.md take names and texts from here.

A counter starts at 0 when the manager is made and only rises; a gauge is the value at this moment; a histogram counts
observed values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from operator import attrgetter
from typing import Any, NamedTuple

from kvtier.events import (
    BlocksEvicted,
    BlocksFailed,
    BlocksLoaded,
    BlocksRecomputed,
    BlocksStored,
    CacheReset,
    CascadeRefused,
    HintIgnored,
    JobFinished,
    LoadFailed,
    RequestGaveUp,
    RequestWaited,
    TierState,
    UnexpectedCall,
    WaitOutcome,
)
from kvtier.types import FailureCause, LookupResult


class Kind(Enum):
    """How a value may change."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


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


PRIMARY = "primary"
"""What host memory is called where tiers have names."""

_COUNTER, _GAUGE, _HISTOGRAM = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

Amounts = Iterable[tuple[str, float]]
"""Pairs of label values, joined by dots ("" without labels), and the amount to add, or the value of a histogram."""


class Label(NamedTuple):
    """A label of a metric, and all of its values; () if these are names of tiers or of calls.

    `of_primary` tells whether host memory is among the tiers.
    """

    name: str
    values: tuple[str, ...] = ()
    of_primary: bool = True


class Metric(NamedTuple):
    """One metric.

    Attributes:
        name: in `get_stats`.
        labels: the tier is the first, and the only one of a gauge in `get_stats`.
        exported: name in engines, without their prefix.
        event, read: for `Source.EVENT`, the event that is counted, and the function that gives the amounts.
        also: name, without the engine's prefix, that vLLM's own offloading gives to the same value; "" if it has none.
        buckets: upper ends of a histogram's buckets.
    """

    name: str
    kind: Kind
    labels: tuple[Label, ...]
    help: str
    source: Source
    exported: str
    event: type[Any] | None = None
    read: Callable[[Any], Amounts] | None = None
    also: str = ""
    buckets: tuple[float, ...] = ()

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels."""
        return tuple(label.name for label in self.labels)

    def series_of(self, name: str) -> tuple[str, ...]:
        """Return the names in Prometheus' text format of the series of this metric, exported as `name`."""
        if self.kind is _HISTOGRAM:
            return f"{name}_bucket", f"{name}_count", f"{name}_sum"
        return (f"{name}_total",) if self.kind is _COUNTER else (name,)

    @property
    def is_in_get_stats(self) -> bool:
        """Whether the manager reports it, and not the engine's adapter."""
        return self.source is not Source.ENGINE

    @property
    def labels_of_also(self) -> tuple[str, ...]:
        """Names of the labels of `also`: vLLM's values of host memory have none."""
        return () if self.also.startswith("kv_offload_cpu_") else self.label_names


OFF_REASONS = ("starting", "configuration", "engine_id", "fault", "failed_copy")
"""Why an engine's adapter answers every lookup with a miss: its workers have not attached yet; the configuration is
wrong; another engine has the same id; the manager could not be made; a worker could not copy blocks."""

_LOAD_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Those of vLLM's own histogram of promotions."""
_WAIT_SECONDS = (0.001, 0.0025, *_LOAD_SECONDS[:-1])


def _on(
    event: type[Any],
    read: Callable[[Any], Amounts],
    name: str,
    labels: tuple[Label, ...],
    meaning: str,
    exported: str = "",
    also: str = "",
) -> Metric:
    return Metric(name, _COUNTER, labels, meaning, Source.EVENT, f"kvtier_{exported or name}", event, read, also)


def _observed(
    event: type[Any],
    read: Callable[[Any], Amounts],
    name: str,
    labels: tuple[Label, ...],
    meaning: str,
    buckets: tuple[float, ...],
    also: str = "",
) -> Metric:
    return Metric(name, _HISTOGRAM, labels, meaning, Source.EVENT, f"kvtier_{name}", event, read, also, buckets)


def _counter(source: Source, name: str, labels: tuple[Label, ...], meaning: str, exported: str = "") -> Metric:
    return Metric(name, _COUNTER, labels, meaning, source, f"kvtier_{exported or name}")


def _gauge(source: Source, name: str, meaning: str, exported: str = "", also: str = "") -> Metric:
    return Metric(name, _GAUGE, _TIER, meaning, source, f"kvtier_{exported or name}", also=also)


def _loads(amount: Callable[[JobFinished], float]) -> Callable[[JobFinished], Amounts]:
    return lambda event: ((event.tier, amount(event)),) if event.is_promotion else ()


def _stores(amount: Callable[[JobFinished], float]) -> Callable[[JobFinished], Amounts]:
    return lambda event: () if event.is_promotion else ((event.tier, amount(event)),)


def _by_share(amount: Callable[[BlocksLoaded], float]) -> Callable[[BlocksLoaded], Amounts]:
    """Divide an amount among the tiers that blocks came from."""

    def read(event: BlocksLoaded) -> Amounts:
        total = sum(event.by_source.values())
        return [(tier, amount(event) * count / total) for tier, count in event.by_source.items()] if total else ()

    return read


def _has_failed(event: JobFinished) -> float:
    return float(event.num_successful < event.num_blocks)


def _load_latency(event: JobFinished) -> Amounts:
    result = "failure" if _has_failed(event) else "success"
    return ((f"{event.tier}.{result}", event.latency),) if event.is_promotion else ()


_BLOCKS, _BYTES, _SECONDS = (attrgetter(name) for name in ("num_successful", "num_bytes", "seconds"))
_MANAGER, _OWN, _ENGINE = Source.MANAGER, Source.TIER, Source.ENGINE
_TIER, _CALL = (Label("tier"),), (Label("call"),)
_BELOW = Label("tier", of_primary=False)
_GAVE_UP = (Label("reason", ("deadline", "budget", "probe", "slower")),)
_REFUSED = Label("reason", ("admission", "throttled", "down"))
_CAUSE = Label("cause", tuple(cause.value for cause in FailureCause))
_ANSWER = Label("answer", tuple(answer.name.lower() for answer in LookupResult))
_OUTCOME = Label("outcome", tuple(outcome.value for outcome in WaitOutcome))

_OF_REQUESTS = (
    _on(BlocksLoaded, lambda event: event.by_source.items(), "loaded_blocks", _TIER,
        "Blocks loaded to the device, by the tier they came from", "hit_blocks"),
    _on(LoadFailed, lambda event: (("", 1),), "failed_loads", (),
        "Loads to the device that failed; they save nothing: the engine computes these blocks, or asks for them once "
        "more"),
    _on(BlocksLoaded, _by_share(attrgetter("num_tokens")), "saved_tokens", _TIER,
        "Tokens that were loaded and not computed"),
    _on(BlocksLoaded, _by_share(attrgetter("seconds")), "saved_seconds", _TIER,
        "Estimated seconds that computing these tokens would have taken; waiting for tiers is not deducted"),
    _observed(RequestWaited, lambda event: ((event.outcome.value, event.seconds),), "wait_seconds", (_OUTCOME,),
              "How long a request has waited for tiers before it loaded blocks, was computed or was cancelled",
              _WAIT_SECONDS),
    _on(RequestGaveUp, lambda event: ((event.reason, 1),), "gave_up", _GAVE_UP,
        "Requests that stopped waiting", "requests_gave_up"),
    _on(RequestGaveUp, lambda event: ((event.reason, event.num_blocks),), "gave_up_blocks", _GAVE_UP,
        "Blocks that requests stopped waiting for"),
    _counter(_ENGINE, "lookups", (_ANSWER,), "Answers to lookups of one block; a request that waits asks often"),
    _on(HintIgnored, lambda event: (("", 1),), "ignored_hints", (), "Requests whose hint was malformed"),
)  # fmt: skip

_OF_BLOCKS = (
    _on(BlocksStored, lambda event: ((event.source or "device", len(event.keys)),), "stored_blocks", (Label("source"),),
        "Blocks that became ready in host memory, from the device or a tier"),
    _on(BlocksEvicted, lambda event: ((event.tier, len(event.keys)),), "evicted_blocks", _TIER,
        "Blocks that gave way to others"),
    _on(BlocksRecomputed, lambda event: ((event.tier, event.num_blocks),), "recomputed_blocks", _TIER,
        "Blocks that this tier was the last to evict, and that were then computed again; estimated from one in 65"),
    _gauge(_OWN, "blocks", "Blocks held"),
    _gauge(_OWN, "bytes", "Bytes held; where the capacity counts headers, keys or folders, they are counted here, too"),
    _gauge(_OWN, "capacity_blocks", "Blocks that fit"),
    _gauge(_OWN, "capacity_bytes", "The most that bytes held may become"),
    _gauge(_OWN, "kept_blocks", "Blocks that a hint keeps for a time; no victims until then"),
    _gauge(_MANAGER, "pinned_share", "Share of host memory that cannot be evicted now: it is being copied, or held for "
           "a request", also="kv_offload_cpu_cache_usage_perc"),
    _gauge(_MANAGER, "filling_share", "Share of host memory that is being filled, from the device or a tier",
           also="kv_offload_cpu_cache_write_usage_perc"),
    _gauge(_MANAGER, "reading_share", "Share of host memory that is being read, or held for a request",
           also="kv_offload_cpu_cache_read_usage_perc"),
    _gauge(_MANAGER, "quarantined_blocks", "Slots of host memory that a late copy may still touch"),
    _gauge(_OWN, "prepared_share", "Share of a disk's space that is allocated ahead of use, 0 to 1"),
)  # fmt: skip

_OF_JOBS = (
    _on(JobFinished, _loads(_BLOCKS), "promoted_blocks", (_BELOW,), "Blocks read from a tier", "read_blocks"),
    _on(JobFinished, _loads(_BYTES), "promoted_bytes", (_BELOW,),
        "Bytes of the blocks read from a tier, before compression", "read_bytes",
        also="kv_offload_tiering_read_bytes"),
    _on(JobFinished, _loads(_SECONDS), "promoted_seconds", (_BELOW,), "Seconds that reading jobs took", "read_seconds",
        also="kv_offload_tiering_read_time"),
    _observed(JobFinished, _load_latency, "promotion_seconds", (_BELOW, Label("result", ("success", "failure"))),
              "How long a tier took to answer a job that reads, with the time in its queue", _LOAD_SECONDS,
              also="kv_offload_tiering_promotion_latency_seconds"),
    _on(JobFinished, _loads(_has_failed), "failed_promotions", (_BELOW,), "Reading jobs of which a block failed",
        also="kv_offload_tiering_promotion_job_failures"),
    _on(JobFinished, _stores(attrgetter("num_moved")), "cascaded_blocks", (_BELOW,),
        "Blocks written to a tier, without those that it had", "written_blocks"),
    _on(JobFinished, _stores(_BYTES), "cascaded_bytes", (_BELOW,),
        "Bytes of the blocks written to a tier, before compression", "written_bytes",
        also="kv_offload_tiering_write_bytes"),
    _on(JobFinished, _stores(_SECONDS), "cascaded_seconds", (_BELOW,), "Seconds that writing jobs took",
        "written_seconds", also="kv_offload_tiering_write_time"),
    _on(JobFinished, _stores(_has_failed), "failed_cascades", (_BELOW,), "Writing jobs of which a block failed",
        also="kv_offload_tiering_cascade_job_failures"),
    _on(BlocksFailed, lambda event: ((f"{event.tier}.{event.cause.value}", event.num_blocks),), "failed_blocks",
        (_BELOW, _CAUSE), "Blocks that a tier could not serve or store; a wrong checksum counts as corrupt"),
    _on(CascadeRefused, lambda event: ((f"{event.tier}.{event.reason}", event.num_blocks),), "refused_blocks",
        (_BELOW, _REFUSED), "Blocks that were not offered to a tier when they were stored"),
    _counter(_OWN, "compressed_blocks", (_BELOW,), "Blocks that were compressed before a tier stored them"),
    _counter(_OWN, "unwritten_bytes", (_BELOW,), "Bytes that compression has saved a tier from writing"),
    _counter(_OWN, "unread_bytes", (_BELOW,), "Bytes that compression has saved a tier from reading"),
    _gauge(_MANAGER, "jobs", "Jobs that a tier has not answered"),
    _gauge(_MANAGER, "store_jobs_in_flight", "Unanswered jobs that write to a tier",
           also="kv_offload_tiering_active_cascade_jobs"),
    _gauge(_MANAGER, "load_jobs_in_flight", "Unanswered jobs that read from a tier",
           also="kv_offload_tiering_active_promotion_jobs"),
    _gauge(_MANAGER, "store_blocks_in_flight", "Blocks of unanswered jobs that write to a tier"),
    _gauge(_MANAGER, "load_blocks_in_flight", "Blocks of unanswered jobs that read from a tier"),
    _gauge(_MANAGER, "storing_share", "Share of host memory that is being written to a tier",
           also="kv_offload_tiering_primary_read_usage_perc"),
    _gauge(_MANAGER, "loading_share", "Share of host memory that is being filled from a tier",
           also="kv_offload_tiering_primary_write_usage_perc"),
)  # fmt: skip

_OF_HEALTH = (
    Metric("off", _GAUGE, (Label("reason", OFF_REASONS),), "Whether kvtier is off altogether for this reason: 1 or 0",
           _ENGINE, "kvtier_off"),
    _gauge(_MANAGER, "up", "Whether a tier is used: 1 or 0", "tier_up"),
    _counter(_MANAGER, "down_seconds", (_BELOW,), "Seconds that a tier was down", "tier_down_seconds"),
    *(
        _counter(_MANAGER, f"times_{state.value}", (_BELOW,), f"Times that a tier became {state.value}",
                 f"tier_times_{state.value}")
        for state in TierState
    ),
    _counter(_OWN, "breaker_openings", (_BELOW,),
             "Times that a tier stopped all its work, or its stores, after failures"),
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
