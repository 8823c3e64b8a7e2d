"""Adapter for kvtier's tiers under vLLM's own `TieringOffloadingSpec`, through its `module_path` option.

    {"type": "KVTierSecondaryTier", "module_path": "kvtier.adapters.vllm.tier",
     "tier": {"type": "disk", "path": "/cache", "capacity": "200GiB"}}

vLLM's spec knows only the model's name and layout. A model in a local folder is identified by its files' contents. For
any other model, `"namespace": "a name"` identifies the weights, and kvtier trusts it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import vllm
from vllm.logger import init_logger
from vllm.v1.kv_offload import base
from vllm.v1.kv_offload.tiering import base as tiering

from kvtier import types
from kvtier.abc import SecondaryTierManager, TierContext
from kvtier.adapters.vllm.compat import NEWLY_COMPUTED_ONLY, make_known, slots_of_job, source_of_medium
from kvtier.adapters.vllm.metrics import StatsReporter, metric_definitions
from kvtier.adapters.vllm.translation import ANSWERS, LOCALITIES, MEDIA, EngineReqContext, offloading_event
from kvtier.errors import ConfigError
from kvtier.events import Observers, TierState
from kvtier.keys import OffloadKey
from kvtier.metrics.counters import EventCounters, tier_readings
from kvtier.namespace import Namespace
from kvtier.registry import create_secondary_tier
from kvtier.secondary.stand_ins import UnusableTierManager
from kvtier.spec.tiers import with_distinct_names
from kvtier.tier_config import parse_tier
from kvtier.types import JobMetadata, ScheduleEndContext
from kvtier.weights.weight_files import UnknownWeightsError, identify_files, process_started_at, weight_files

logger = init_logger("vllm.kvtier")

_EPOCH_BYTES = 16


class KVTierSecondaryTier(tiering.SecondaryTierManager):  # type: ignore[misc]  # vLLM is not there when types are checked
    """One tier of kvtier behind vLLM's interface.

    Its I/O runs on threads instead of a process, since vLLM's host memory has no file descriptor to share.

    Attributes:
        medium, locality: those of kvtier's tier, by which requests choose; None matches every choice.
        cache_hit_source: vLLM's name for hits of this tier, which follows from the medium; from 0.32 on.
    """

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """Return kvtier's metrics. vLLM refuses metrics that are not declared."""
        return metric_definitions(with_names_of_vllm=False)  # vLLM's manager has its own values

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        *,
        tier: Mapping[str, Any],
        namespace: str | None = None,
    ) -> None:
        """Make and start kvtier's tier; a fault other than a wrong configuration leaves it out and is logged.

        Args:
            tier: the tier's configuration, an entry of kvtier's `secondary_tiers`.
            namespace: name of the weights, needed if the model is not in a local folder.

        Raises:
            ConfigError: a key of `tier` has a wrong value, or the tier's blocks outlive the engine and the weights are
                not known.
        """
        detectors = [backpressure_detector] if backpressure_detector is not None else []  # from 0.32 on
        super().__init__(offloading_spec, primary_kv_view, tier_type, *detectors)
        identity = spec_identity(offloading_spec, namespace)
        self._counters, self._stats = EventCounters(), StatsReporter()
        context = TierContext(
            namespace=Namespace(identity) if identity is not None else None, observer=Observers([self._counters])
        )
        self._running: set[int] = set()
        spec = SimpleNamespace(tier_context=context, config=offloading_spec.config)
        name = distinct_name(tier, tier_type, offloading_spec.secondary_tier_configs)
        try:
            self._tier: SecondaryTierManager = create_secondary_tier({**tier, "name": name}, primary_kv_view, spec)
            self._tier.start()
        except ConfigError:
            raise
        except Exception as error:  # a fault costs this tier only: reported
            logger.exception("kvtier: tier %s cannot be used, the engine runs without it", name)
            reason = f"{type(error).__name__}: {error}"
            self._tier = UnusableTierManager(primary_kv_view, name, reason)
        self.medium = MEDIA[self._tier.medium] if self._tier.medium is not None else None
        self.locality = LOCALITIES[self._tier.locality] if self._tier.locality is not None else None
        if self.medium is not None and hasattr(self, "cache_hit_source"):
            self.cache_hit_source = source_of_medium(self.medium)

    def lookup(self, key: OffloadKey, req_context: Any) -> Any:
        return ANSWERS[self._tier.lookup(key, EngineReqContext(req_context))]

    def submit_store(self, job_metadata: Any) -> None:
        self._tier.submit_store(self._job(job_metadata))

    def submit_load(self, job_metadata: Any) -> None:
        self._tier.submit_load(self._job(job_metadata))

    def get_finished_jobs(self) -> Iterable[Any]:
        """Return the results since the last call, each once: vLLM fails on a job that it does not know."""
        results = [result for result in self._tier.get_finished_jobs() if result.job_id in self._running]
        self._running.difference_update(result.job_id for result in results)
        return [
            make_known(
                tiering.JobResult,
                job_id=result.job_id,
                success=result.success,
                successful_keys=result.successful_keys,
                transfer_time=result.transfer_time,
                transfer_bytes=result.transfer_bytes,
            )
            for result in results
        ]

    def touch(self, keys: Collection[OffloadKey], req_context: Any) -> None:
        self._tier.touch(keys, EngineReqContext(req_context))

    def on_new_request(self, req_context: Any) -> Any:
        wanted = self._tier.on_new_request(EngineReqContext(req_context))
        if wanted.policy is types.OffloadPolicy.REQUEST_LEVEL:
            return base.RequestOffloadingContext(base.OffloadPolicy.REQUEST_LEVEL)
        return base.RequestOffloadingContext(NEWLY_COMPUTED_ONLY)

    def on_request_finished(self, req_context: Any) -> None:
        self._tier.on_request_finished(EngineReqContext(req_context))

    def on_schedule_end(self, context: Any) -> None:
        self._tier.on_schedule_end(ScheduleEndContext(context.new_req_ids, context.preempted_req_ids))

    def has_pending_work(self) -> bool:
        return bool(self._running) or self._tier.has_pending_work()

    def take_events(self) -> Iterable[Any]:
        return [offloading_event(event) for event in self._tier.take_events()]

    def get_stats(self) -> Any:
        """Return what the tier has counted since the last call, and what it holds; None if nothing is known."""
        readings = {**self._tier.get_stats(), "up": float(self._tier.state is TierState.UP)}
        return self._stats.report(self._counters.snapshot() | tier_readings(self._tier.tier_type, readings))

    def drain_jobs(self) -> None:
        """Wait for all jobs, then forget all blocks: vLLM drains only to reset its cache, maybe for new weights."""
        self._tier.drain_jobs()
        self._tier.start_epoch(os.urandom(_EPOCH_BYTES))

    def shutdown(self) -> None:
        self._tier.shutdown()

    def _job(self, job: Any) -> JobMetadata:
        self._running.add(job.job_id)
        return JobMetadata(
            job.job_id, list(job.keys), slots_of_job(job), job.is_promotion, EngineReqContext(job.req_context)
        )


def distinct_name(tier: Mapping[str, Any], tier_type: str, listed: Sequence[Mapping[str, Any]]) -> str:
    """Return a name for a tier that no other one of kvtier's has, since it is the label of its metrics.

    Args:
        tier: of an entry in `listed`, the same object.
        tier_type: vLLM's type of that entry. Entries of other types have options of their own.
        listed: the entries of vLLM's `secondary_tiers`.

    Raises:
        ConfigError: two entries give the same name, or one is wrong.
    """
    ours = [
        (f"secondary_tiers[{index}].tier", entry["tier"])
        for index, entry in enumerate(listed)
        if entry.get("type") == tier_type and "tier" in entry
    ]
    named = with_distinct_names([parse_tier(entry, where) for where, entry in ours], [entry for _, entry in ours])
    return next(
        (one.name for one, (_, entry) in zip(named, ours, strict=True) if entry is tier), parse_tier(tier, "tier").name
    )


def spec_identity(spec: Any, namespace: str | None) -> dict[str, str | int] | None:
    """Return the values of the namespace, from vLLM's spec; None if the weights are not known.

    The weights are known if the user gives a `namespace`, or if the model is in a local folder.
    """
    config, parallel = spec.config, spec.config.parallel
    try:
        files = weight_files(Path(config.model.name)) if namespace is None else []
        weights = namespace or identify_files(files, loaded_after=process_started_at()).digest
    except (UnknownWeightsError, OSError):
        return None
    groups = [f"{group.tokens_per_block}:{','.join(group.layer_names)}" for group in config.groups]
    return {
        "engine": f"vllm {vllm.__version__}, its own tiering",
        "weights": weights,
        "dtype": config.model.dtype,
        "kv_layout": str(getattr(config, "kv_cache_layout", None) or ""),
        "groups": ";".join(groups),
        "tokens_per_hash": config.cache.tokens_per_hash,
        "blocks_per_block": config.cache.blocks_per_chunk,
        "world_size": parallel.world_size,
        "parallel": f"tp {parallel.tp_size} pp {parallel.pp_size} pcp {parallel.pcp_size} dcp {parallel.dcp_size}",
    }
