"""vLLM's scheduler and connector over an offloading manager: no model runs, and no bytes move."""

from dataclasses import fields
from types import SimpleNamespace

import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.kv_offload.config import OffloadingGroupConfig
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from kvtier.adapters.vllm.compat import groups_to_retry
from kvtier.adapters.vllm.manager import KVTierOffloadingManager
from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.keys import GROUP_BYTES
from kvtier.metrics.counters import Observations
from kvtier.spec.tiering import TieringOffloadingSpec

TELLS_KIND_OF_GROUP = "sliding_window_size_in_chunks" in {item.name for item in fields(OffloadingGroupConfig)}
BLOCK = 16
DEVICE_BLOCKS = 128
HOST_BLOCKS = 192
WINDOW = 64


RETRIED_GROUPS = frozenset({bytes(GROUP_BYTES)} if TELLS_KIND_OF_GROUP else ())
"""What `groups_to_retry` returns for a driver's groups."""


def kvtier_manager(host_blocks=HOST_BLOCKS, events=False, **options):
    """Return a manager for a driver.

    Args:
        events: whether it reports KV events.
    """
    groups = (KVCacheGroup(BLOCK), KVCacheGroup(BLOCK))
    extra = {"cpu_bytes_to_use": host_blocks * 4096, **options}
    spec = TieringOffloadingSpec(OffloadingConfig(extra, groups, 4096, enable_kv_cache_events=events))
    core = SimpleNamespace(
        manager=spec.get_manager(),
        control=spec.arena.control,
        shutdown=spec.shutdown,
        off_reason=None,
        observations=Observations(),
    )
    assert core.manager.get_stats()["primary.capacity_blocks"] == host_blocks
    return KVTierOffloadingManager(core, RETRIED_GROUPS)


def engine_configs(model, with_window=False, **extra):
    """Return vLLM's configuration of an engine and of its KV cache; `extra` are keys of the connector's."""
    shape = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 16, "dtype": torch.float32}
    groups = [KVCacheGroupSpec(["full"], FullAttentionSpec(**shape))]
    if with_window:
        groups.append(KVCacheGroupSpec(["window"], SlidingWindowSpec(**shape, sliding_window=WINDOW)))
    extra = {"cpu_bytes_to_use": 1 << 20} | extra
    transfer = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=extra)
    config = EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        block_size=BLOCK,
        max_model_len=1024,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        kv_transfer_config=transfer,
        disable_hybrid_kv_cache_manager=False,
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = DEVICE_BLOCKS
    return config, KVCacheConfig(num_blocks=DEVICE_BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups)


class Driver:
    """vLLM's scheduler with an offloading connector; what a worker would copy has been copied a step later."""

    def __init__(self, model, manager, with_window):
        config, cache = engine_configs(model, with_window)
        self.scheduler = Scheduler(config, cache, StructuredOutputManager(config), block_size=BLOCK, log_stats=False)
        assert groups_to_retry(build_offloading_config(config, cache)) == RETRIED_GROUPS
        self.connector = self.scheduler.connector.connector_scheduler
        self.connector.manager = manager
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.hits = self.num_computed = 0
        self.jobs = OffloadingWorkerMetadata()
        self.received = set()
        whole = self.connector.update_state_after_alloc

        def count(request, blocks, num_external_tokens):
            self.hits += num_external_tokens
            return whole(request, blocks, num_external_tokens)

        self.connector.update_state_after_alloc = count

    def add(self, name, tokens, hint=None, **more):
        """Add a request; `hint` is what its client sends for kvtier."""
        extra_args = {"kv_transfer_params": {"kvtier": hint}} if hint is not None else None
        sampling = SamplingParams(max_tokens=8, ignore_eos=True, extra_args=extra_args)
        sampling.update_from_generation_config({}, 2)
        self.scheduler.add_request(Request(name, tokens, sampling, None, block_hasher=self.hasher, **more))

    def step(self):
        self.end(*self.begin())

    def begin(self):
        """Schedule a step; return what `end` takes."""
        planned = self.scheduler.schedule()
        self.num_computed += planned.total_num_scheduled_tokens
        metadata = planned.kv_connector_metadata
        done = KVConnectorOutput(kv_connector_worker_meta=self.jobs, finished_recving=self.received)
        self.jobs, self.received = OffloadingWorkerMetadata(), set()
        for job_id, job in metadata.load_jobs.items():
            self.jobs.mark_completed(job_id)
            self.received.add(job.req_id)
        for job_id in metadata.store_jobs:
            self.jobs.mark_completed(job_id)
        names = list(planned.num_scheduled_tokens)
        requests = [self.scheduler.requests[name] for name in names]
        sampled = [[7] if request.num_computed_tokens >= request.num_prompt_tokens else [] for request in requests]
        places = {name: index for index, name in enumerate(names)}
        return planned, ModelRunnerOutput(names, places, sampled, kv_connector_output=done)

    def end(self, planned, output):
        self.scheduler.update_from_output(planned, output)

    def run(self, prompts):
        waiting = list(enumerate(prompts))
        for _ in range(100_000):
            while waiting and self.scheduler.get_num_unfinished_requests() < 4:
                number, tokens = waiting.pop(0)
                self.add(str(number), tokens)
            if not waiting and not self.scheduler.has_unfinished_requests():
                return self
            self.step()
        raise AssertionError("the scheduler does not come to an end")
