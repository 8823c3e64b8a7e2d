"""The parts of vLLM's engine core that decide about KV blocks, as the fuzz puts them together.

The scheduler, its half of the connector and the worker's half are vLLM's own. Requests, and what the model runner does,
are simulated.
"""

import random
from collections import deque

from late_copies import LateCopies
from simulated_model import SimulatedModel
from vllm.config import KVEventsConfig, KVTransferConfig, set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine import core
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

GARBAGE = 0x41
BROKEN = "a test breaks this copy"


class FuzzEngine:
    """A scheduler and a simulated model, with a connector between them."""

    def __init__(self, scenario, model, folder, rng):
        """Args: model: folder with any small model's `config.json`."""
        self._config = make_config(scenario, model, folder)
        cache, self._hasher = make_cache(self._config, scenario.specs)
        self._worker = KVConnectorFactory.create_connector(self._config, KVConnectorRole.WORKER, cache)
        with set_current_vllm_config(self._config):
            self.model = SimulatedModel(self._config, cache, self._worker)
        copying = self._worker.connector_worker
        self._copies = copying.worker
        if scenario.late_copies:
            copying.worker = LateCopies(copying.worker, rng)
        sizes = kv_cache_utils.resolve_kv_cache_block_sizes(cache, self._config)
        self.scheduler = self._config.scheduler_config.get_scheduler_cls()(
            vllm_config=self._config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(self._config),
            block_size=sizes[0],
            hash_block_size=sizes[1],
            log_stats=True,
        )
        self.connector = self.scheduler.connector.connector_scheduler
        self.manager = self.connector.manager._core.manager
        assert self.manager is not None, "kvtier is off"
        self.num_failed = 0
        if scenario.breaks_loads:
            self._break_loads(random.Random(f"breaks {scenario.seed}"))
        self._steps_ahead = int(scenario.asynchronous)
        self._in_flight = deque()
        self.answers = {}

    def add(self, name, tokens, max_tokens, params):
        """Add a request; `params` are its `kv_transfer_params`."""
        extra_args = {"kv_transfer_params": params} if params else None
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra_args)
        sampling.update_from_generation_config({}, 2)
        self.answers[name] = []
        self.scheduler.add_request(Request(name, list(tokens), sampling, None, block_hasher=self._hasher))

    def abort(self, name):
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self, between=lambda: None):
        """Plan a step and run it; `between` is called before the scheduler learns what it has answered."""
        planned = self.scheduler.schedule()
        self._in_flight.append((planned, self.model.execute(planned)))
        between()
        if len(self._in_flight) > self._steps_ahead:
            self._learn()

    def settle(self):
        """Let the scheduler learn of everything that the model has answered."""
        while self._in_flight:
            self._learn()

    def can_reset(self):
        """Return whether only running requests hold blocks. Else vLLM fails to reset, and its next step may fail."""
        caches = self.scheduler.kv_cache_manager
        held = {
            block
            for request in self.scheduler.running
            for blocks in caches.get_block_ids(request.request_id)
            for block in blocks
        }
        pool = caches.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks() == len(held - {0})

    def has_work(self):
        return self.scheduler.has_requests() or bool(self._in_flight)

    def close(self):
        self.scheduler.shutdown()
        self._worker.shutdown()

    def _break_loads(self, rng):
        """Let every few copies to the device fail, after they have left garbage there."""
        worker = self._copies._attached.worker
        whole = worker._copy

        def copy(plan, to_slots):
            if to_slots or rng.random() > 0.2:
                return whole(plan, to_slots)
            for group_idx, runs in plan.groups:
                for _, rows in worker._pages[group_idx]:
                    for block, _, _, length in runs:
                        rows[block : block + length] = GARBAGE
            self.num_failed += 1
            raise ValueError(BROKEN)

        worker._copy = copy

    def _learn(self):
        outputs = self.scheduler.update_from_output(*self._in_flight.popleft())
        for of_client in outputs.values():
            for output in of_client.outputs:
                self.answers[output.request_id] += output.new_token_ids


def make_config(scenario, model, folder):
    config = EngineArgs(
        model=str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="float32",
        block_size=16,
        max_model_len=320,
        max_num_seqs=scenario.max_num_seqs,
        max_num_batched_tokens=scenario.max_tokens_per_step,
        num_gpu_blocks_override=scenario.device_blocks,
        disable_hybrid_kv_cache_manager=False,
        kv_transfer_config=KVTransferConfig(**scenario.transfer_config(folder)),
        kv_events_config=KVEventsConfig(enable_kv_cache_events=scenario.kv_events, publisher="null"),
    ).create_engine_config()
    config.scheduler_config.async_scheduling = scenario.asynchronous  # the CPU platform never does it by itself
    if getattr(config.cache_config, "kv_cache_layout", "") is None:
        config.cache_config.kv_cache_layout = "LBHNC"  # as the engine core resolves it for this connector
    return config


def make_cache(config, specs):
    """Return the KV cache's configuration and the function that hashes blocks, made as the engine core makes them."""
    kv_cache_utils.init_none_hash(sha256)
    arguments = [config, [specs], [1 << 30]]
    if hasattr(core, "get_global_kv_cache_groups"):  # from 0.33 on
        arguments.append(core.get_global_kv_cache_groups(config, [specs]))
    (of_worker,) = core.get_kv_cache_configs(*arguments)
    cache = kv_cache_utils.generate_scheduler_kv_cache_config([of_worker])
    config.cache_config.num_gpu_blocks = cache.num_blocks
    block_size, hash_block_size = kv_cache_utils.resolve_kv_cache_block_sizes(cache, config)
    if hasattr(cache, "hash_block_size"):  # from 0.32 on
        cache.hash_block_size = hash_block_size
        cache.kv_cache_layout = config.cache_config.kv_cache_layout
        cache.cache_hit_alignment_tokens = kv_cache_utils.resolve_cache_hit_alignment_tokens(
            cache, config, block_size, hash_block_size
        )
    return cache, kv_cache_utils.get_request_block_hasher(hash_block_size, sha256)
