"""Adapts tiers that were written for the first interface of vLLM's offloading layer to today's contract.

In that interface, `lookup` returns True, False or None (ask again), results come from `get_finished`, there is no
`drain_jobs`, and the constructor takes `vllm_config=`. The tier's class need not be derived from kvtier's base class.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from kvtier.abc import SecondaryTierManager
from kvtier.errors import ConfigError
from kvtier.keys import OffloadKey
from kvtier.types import (
    JobMetadata,
    JobResult,
    LookupResult,
    OffloadingEvent,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)

DRAIN_SECONDS = 2.0
_POLL_SECONDS = 0.001
"""Time between two polls of a tier without `drain_jobs`: short, since a reset waits for the drain."""
_ANSWERS = {True: LookupResult.HIT, False: LookupResult.MISS, None: LookupResult.RETRY}
_NEEDED = ("lookup", "submit_store", "submit_load")


def adapt_tier(tier: Any, primary_kv_view: memoryview, drain_seconds: float = DRAIN_SECONDS) -> SecondaryTierManager:
    """Return `tier` itself if it follows today's contract, else an adapter around it.

    Args:
        primary_kv_view: the view that the tier was constructed with, shape (num_blocks, block_bytes).
        drain_seconds: longest time that a drain waits for a tier without `drain_jobs`.
    """
    if isinstance(tier, SecondaryTierManager) and not _is_first_interface(type(tier)):
        return tier
    fixed = {
        "medium": getattr(tier, "medium", None),
        "locality": getattr(tier, "locality", None),
        "verifies_payloads": getattr(tier, "verifies_payloads", False),
    }
    adapter: type[FirstInterfaceTier] = type("FirstInterfaceTier", (FirstInterfaceTier,), fixed)
    return adapter(tier, primary_kv_view, drain_seconds)


class TierMaker:
    """Makes adapted tiers of a class of the first interface. It is called like a tier class."""

    def __init__(self, tier_class: type) -> None:
        self.tier_class = tier_class
        self._parameters = inspect.signature(tier_class).parameters
        missing = {"get_finished_jobs", "drain_jobs"} & set(getattr(tier_class, "__abstractmethods__", ()))
        if missing:  # derived from today's base class, which makes a class without these methods abstract
            stand_ins = {"get_finished_jobs": _get_finished, "drain_jobs": _drain_nothing}
            self.tier_class = type(tier_class.__name__, (tier_class,), {name: stand_ins[name] for name in missing})

    def __call__(
        self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, **options: Any
    ) -> SecondaryTierManager:
        """Make a tier. If its constructor has `vllm_config`, pass the spec's instead of `offloading_spec`."""
        arguments: dict[str, Any] = {"primary_kv_view": primary_kv_view, "tier_type": tier_type, **options}
        if "vllm_config" in self._parameters:
            arguments["vllm_config"] = getattr(offloading_spec, "vllm_config", None)
        else:
            arguments["offloading_spec"] = offloading_spec
        return adapt_tier(self.tier_class(**arguments), primary_kv_view)


def adapt_tier_class(tier_class: type) -> type[SecondaryTierManager] | TierMaker:
    """Return `tier_class` itself if it follows today's contract, else a maker of adapted tiers.

    Raises:
        ConfigError: the class follows neither interface.
    """
    missing = [name for name in _NEEDED if not callable(getattr(tier_class, name, None))]
    if missing or not (_has(tier_class, "get_finished_jobs") or _has(tier_class, "get_finished")):
        wanted = ", ".join(missing or ["get_finished_jobs"])
        raise ConfigError("type", tier_class.__name__, f"a secondary tier; this class has no {wanted}")
    if issubclass(tier_class, SecondaryTierManager) and not _is_first_interface(tier_class):
        return tier_class
    return TierMaker(tier_class)


class FirstInterfaceTier(SecondaryTierManager):
    """Wraps a tier of the first interface in today's contract.

    Such a tier knows no epochs. After `start_epoch` the adapter therefore answers MISS for all keys that were not
    stored since. The manager keeps digests for tiers that do not verify payloads, so it notices if the tier loads old
    bytes.
    """

    def __init__(self, tier: Any, primary_kv_view: memoryview, drain_seconds: float = DRAIN_SECONDS) -> None:
        """Args: as `adapt_tier`."""
        tier_type = getattr(tier, "tier_type", type(tier).__name__)
        super().__init__(getattr(tier, "offloading_spec", None), primary_kv_view, tier_type)
        self.tier = tier
        self._drain_seconds = drain_seconds
        self._open_stores: dict[int, list[OffloadKey]] = {}
        self._open_loads: set[int] = set()
        self._answers: list[JobResult] = []
        self._stored_in_epoch: set[OffloadKey] | None = None
        self._narrowed: dict[int, list[OffloadKey]] = {}

    def start(self) -> None:
        self._call_if_there("start")

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Return the tier's answer as a `LookupResult`."""
        if self._stored_in_epoch is not None and key not in self._stored_in_epoch:
            return LookupResult.MISS
        answer = self.tier.lookup(key, req_context)
        return answer if isinstance(answer, LookupResult) else _ANSWERS[None if answer is None else bool(answer)]

    def submit_store(self, job_metadata: JobMetadata) -> None:
        self._open_stores[job_metadata.job_id] = list(job_metadata.keys)
        self.tier.submit_store(job_metadata)

    def submit_load(self, job_metadata: JobMetadata) -> None:
        """Submit the job without blocks of an earlier epoch."""
        known = self._stored_in_epoch
        kept = [index for index, key in enumerate(job_metadata.keys) if known is None or key in known]
        if len(kept) < len(job_metadata.keys):
            if not kept:
                self._answers.append(JobResult(job_metadata.job_id, False))
                return
            keys = [job_metadata.keys[index] for index in kept]
            job_metadata = replace(job_metadata, keys=keys, block_ids=job_metadata.block_ids[kept])
            self._narrowed[job_metadata.job_id] = keys
        self._open_loads.add(job_metadata.job_id)
        self.tier.submit_load(job_metadata)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        answers, self._answers = self._answers, []
        return answers + self._collect()

    def can_store(self, num_blocks: int) -> bool:
        answer = self._call_if_there("can_store", num_blocks)
        return True if answer is None else bool(answer)

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        self._call_if_there("touch", keys, req_context)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        answer = self._call_if_there("on_new_request", req_context)
        return answer if isinstance(answer, RequestOffloadingContext) else RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._call_if_there("on_request_finished", req_context)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._call_if_there("on_schedule_end", context)

    def has_pending_work(self) -> bool:
        return bool(self._call_if_there("has_pending_work"))

    def drain_jobs(self) -> None:
        """Call the tier's own `drain_jobs`, if any; then poll until all jobs have results, at most `drain_seconds`."""
        self._call_if_there("drain_jobs")
        deadline = time.monotonic() + self._drain_seconds
        self._answers += self._collect()
        while (self._open_loads or self._open_stores) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)  # the first interface can only be polled; the deadline bounds the wait
            self._answers += self._collect()

    def start_epoch(self, epoch: bytes) -> None:
        """Answer MISS for everything stored before now; tell the tier, too, if it has `start_epoch`."""
        self._stored_in_epoch = set()
        self._call_if_there("start_epoch", epoch)

    def take_events(self) -> Iterable[OffloadingEvent]:
        events: Iterable[OffloadingEvent] | None = self._call_if_there("take_events")
        return events or ()

    def get_stats(self) -> Mapping[str, float]:
        stats: Mapping[str, float] | None = self._call_if_there("get_stats")
        return stats or {}

    def shutdown(self) -> None:
        self._call_if_there("shutdown")

    def _collect(self) -> list[JobResult]:
        finished = getattr(self.tier, "get_finished", None) or self.tier.get_finished_jobs
        results = [_as_result(answer) for answer in finished()]
        for result in results:
            self._open_loads.discard(result.job_id)
            narrowed = self._narrowed.pop(result.job_id, None)
            if narrowed is not None and result.success:
                result.success, result.successful_keys = False, narrowed
            keys = self._open_stores.pop(result.job_id, ())
            if self._stored_in_epoch is not None:
                self._stored_in_epoch.update(keys if result.success else result.successful_keys or ())
        return results

    def _call_if_there(self, name: str, *arguments: Any) -> Any:
        method = getattr(self.tier, name, None)
        return method(*arguments) if callable(method) else None


def _as_result(answer: Any) -> JobResult:
    """Return a `JobResult` of a pair (job_id, success), or of an object with these attributes."""
    if isinstance(answer, tuple):
        job_id, success = answer
        return JobResult(job_id, bool(success))
    return JobResult(
        answer.job_id,
        bool(answer.success),
        getattr(answer, "successful_keys", None),
        getattr(answer, "transfer_time", None),
        getattr(answer, "transfer_bytes", None),
    )


def _has(tier_class: type, name: str) -> bool:
    """Return whether a class implements a method, instead of only inheriting the abstract one."""
    return callable(getattr(tier_class, name, None)) and name not in getattr(tier_class, "__abstractmethods__", ())


def _is_first_interface(tier_class: type) -> bool:
    if any(tier_class.__dict__.get(name) is stand_in for name, stand_in in _STAND_INS):
        return True
    if not _has(tier_class, "get_finished_jobs") or not _has(tier_class, "drain_jobs"):
        return True
    return "vllm_config" in inspect.signature(tier_class).parameters


def _get_finished(self: Any) -> Any:
    return self.get_finished()


def _drain_nothing(self: Any) -> None:
    """Do nothing: `FirstInterfaceTier.drain_jobs` polls for the results."""


_STAND_INS = (("get_finished_jobs", _get_finished), ("drain_jobs", _drain_nothing))
