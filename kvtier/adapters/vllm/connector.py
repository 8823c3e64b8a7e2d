"""vLLM's OffloadingConnector, except that a load that fails does not stop the engine.

    {"kv_connector": "KVTierConnector", "kv_connector_module_path": "kvtier.adapters.vllm.connector",
     "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
     "kv_connector_extra_config": {"spec_name": "KVTierOffloadingSpec", ...}}

vLLM's own connector takes every load for a success. This one tells vLLM what did not arrive, in vLLM's own terms. If a
model has one KV group, with full attention, it names the engine blocks. vLLM then sets the request back to what it had
before the load, and computes the rest. For other models it names the requests, and vLLM begins them anew: groups use
the same numbers for engine blocks, and where a window or a state was loaded, the device lacks what comes before it. A
request that had nothing before, or begins anew, is looked up again. By then kvtier's manager has forgotten the blocks
of the load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvtier.adapters.vllm.compat import HAS_FAILED_RECEIVES
from kvtier.adapters.vllm.manager import KVTierOffloadingManager
from kvtier.adapters.vllm.metrics import KVTierConnectorStats
from kvtier.errors import ConfigError
from kvtier.log import cleaned

logger = cleaned(init_logger("vllm.kvtier"))


@dataclass
class WorkerMetadata(OffloadingWorkerMetadata):  # type: ignore[misc]  # vLLM is not there when types are checked
    """What workers report in a step.

    Attributes:
        failed_requests: whose loads have failed on a worker.
    """

    failed_requests: set[str] = field(default_factory=set)

    def aggregate(self, other: Any) -> WorkerMetadata:
        """Return what this worker and another one report together."""
        return WorkerMetadata(
            **vars(super().aggregate(other)), failed_requests=self.failed_requests | other.failed_requests
        )


class KVTierConnector(OffloadingConnector):  # type: ignore[misc]  # vLLM is not there when types are checked
    """Connects vLLM with `KVTierOffloadingSpec`. vLLM makes one in its scheduler and one in every worker."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """Make vLLM's connector.

        Raises:
            ConfigError: the configuration names another spec than kvtier's, or the model has an encoder.
        """
        model = vllm_config.model_config
        if model.is_encoder_decoder:  # vLLM 0.33 only has an assertion for it
            allowed = "one without an encoder: vLLM cannot offload encoder-decoder models"
            raise ConfigError("model", model.model, allowed)
        super().__init__(vllm_config, role, kv_cache_config)
        self._names_blocks = _is_one_of_full_attention(kv_cache_config.kv_cache_groups)
        self._can_report = HAS_FAILED_RECEIVES or self._names_blocks
        self._running_loads: dict[int, Any] = {}
        self._failed_loads: list[Any] = []
        if self.connector_scheduler is not None:
            self._check_scheduler(vllm_config.kv_transfer_config.kv_load_failure_policy)

    def _check_scheduler(self, policy: str) -> None:
        scheduler = self.connector_scheduler
        if not isinstance(scheduler.manager, KVTierOffloadingManager):
            raise ConfigError("spec_name", type(scheduler.manager).__name__, "KVTierOffloadingSpec for KVTierConnector")
        if not self._can_report:
            logger.warning(
                "kvtier: this vLLM cannot be told that a load failed if a model has several KV groups, a sliding window"
                " or a state: such a load stops the engine"
            )
        elif policy != "recompute":
            logger.warning(
                "kvtier: kv_load_failure_policy is %r: a request whose load fails ends with an error; with 'recompute'"
                " it would be computed",
                policy,
            )
        if getattr(scheduler.config, "sync_load_budget_bytes", 0):
            # In the step of a synchronous load vLLM already computes with the blocks, shares them with other requests
            # and offers for storing what it computes with them. It takes back none of that when the load fails.
            scheduler.config = scheduler.config._replace(sync_load_budget_bytes=0)
            logger.warning("kvtier: KVTierConnector ignores sync_load_budget_bytes, since a load may fail")

    # -- in a worker, in the order of vLLM's calls in a step ----------------------------------------------

    def start_load_kv(self, forward_context: Any, **keywords: Any) -> None:
        self._running_loads.update(self._connector_metadata.load_jobs)
        super().start_load_kv(forward_context, **keywords)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        if self._can_report:
            failed = self.connector_worker.worker.take_failed_loads()
            self._failed_loads = [self._running_loads[job_id] for job_id in failed]
        finished: tuple[set[str], set[str]] = super().get_finished(finished_req_ids)
        return finished

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        results = super().get_transfer_results(finished_req_ids)
        if not self._names_blocks:
            results.failed_recving.update(job.req_id for job in self._failed_loads)
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the engine blocks of the loads that failed in this step."""
        if not self._names_blocks:
            return set()
        return {int(block) for job in self._failed_loads for block in job.dst_spec.block_ids}

    def build_connector_worker_meta(self) -> WorkerMetadata | None:
        meta = super().build_connector_worker_meta()
        if meta is None:
            return None
        for job_id in meta.completed_jobs:
            self._running_loads.pop(job_id, None)
        return WorkerMetadata(**vars(meta), failed_requests={job.req_id for job in self._failed_loads})

    # -- in the frontend ----------------------------------------------------------------------------------

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVTierConnectorStats:
        """Return statistics of which vLLM logs a line that a person reads."""
        return KVTierConnectorStats() if data is None else KVTierConnectorStats(data=data)

    # -- in the scheduler ---------------------------------------------------------------------------------

    def update_connector_output(self, connector_output: Any) -> None:
        """Let the manager forget the blocks of failed loads, then let vLLM complete the loads."""
        meta = connector_output.kv_connector_worker_meta
        if meta is not None and meta.failed_requests:
            self.connector_scheduler.manager.fail_loads(meta.failed_requests)
        super().update_connector_output(connector_output)


def _is_one_of_full_attention(groups: Sequence[Any]) -> bool:
    """Return whether there is one KV group, and each of its layers needs the blocks of all tokens."""
    if len(groups) != 1:
        return False
    spec = groups[0].kv_cache_spec
    of_layers = getattr(spec, "kv_cache_specs", {"": spec}).values()  # several only if layers differ in size
    return all(isinstance(of_layer, FullAttentionSpec) for of_layer in of_layers)
