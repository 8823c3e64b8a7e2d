"""Engines and workers over vLLM's region, for the path of CUDA and XPU."""

import numpy as np
import torch
from vllm.v1.kv_offload import base

from kvtier.adapters.vllm.core import CoreHalf
from kvtier.adapters.vllm.device import RegionTieringSpec
from kvtier.adapters.vllm.translation import KVTierLoadStoreSpec
from kvtier.adapters.vllm.worker import KVTierOffloadingWorker
from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.keys import make_offload_key
from kvtier.types import ReqContext

PAGE = 1536
"""Bytes of one layer's page: two layers and two ranks make a block that is no multiple of the page size."""

LAYERS = ("a", "b")
SHARE = PAGE * len(LAYERS)
ENGINE_BLOCKS = 8
IDENTITY = {"layout": "l", "hash": "sha256"}


def config(engine_id, world_size=1, rank=0, replicated=False, **keys):
    extra = {"cpu_bytes_to_use": "64KiB"} | keys
    block_bytes = SHARE * (1 if replicated else world_size)
    return OffloadingConfig(
        extra,
        (KVCacheGroup(16, LAYERS),),
        block_bytes,
        engine_id=engine_id,
        world_size=world_size,
        rank=rank,
        replicated=replicated,
    )


def kv_caches(rank=0, kind="cpu"):
    """Return vLLM's KV caches, every page of every rank unlike every other."""
    tensors, refs = [], []
    for layer in range(len(LAYERS)):
        random = torch.Generator().manual_seed(rank * len(LAYERS) + layer)
        bytes_of_layer = torch.randint(-128, 128, (ENGINE_BLOCKS, PAGE), dtype=torch.int8, generator=random)
        tensors.append(base.CanonicalKVCacheTensor(bytes_of_layer.to(kind), PAGE))
        refs.append(base.CanonicalKVCacheRef(layer, PAGE))
    return base.CanonicalKVCaches(tensors, [refs])


class HostCopier:
    """Copies like vLLM's worker, over the views of vLLM's region, where there is no device."""

    def __init__(self, kv_caches, blocks_per_chunk, num_chunks, region):
        self.region = region
        self.results, self.expedited = [], set()
        tensors = [tensor.tensor for tensor in kv_caches.tensors]
        self.pairs = [(t, region.create_next_worker_view(t.shape[1] * blocks_per_chunk)) for t in tensors]
        self.parts = blocks_per_chunk

    def submit_store(self, job_id, source, target):
        return self.copy(job_id, source, target, to_slots=True)

    def submit_load(self, job_id, source, target, expedited=False):
        self.expedited |= {job_id} if expedited else set()
        return self.copy(job_id, target, source, to_slots=False)

    def copy(self, job_id, blocks, slots, to_slots):
        assert isinstance(blocks, base.GPULoadStoreSpec)
        assert isinstance(slots, base.BlockIDsLoadStoreSpec)
        for place, block in enumerate(blocks.block_ids):
            slot, part = slots.block_ids[place // self.parts], place % self.parts
            for tensor, view in self.pairs:
                ours = view[slot, part * PAGE : (part + 1) * PAGE]
                (ours if to_slots else tensor[block]).copy_(tensor[block] if to_slots else ours)
        self.results.append(base.TransferResult(job_id, True, len(blocks.block_ids) * SHARE, 0.001))
        return True

    def get_finished(self):
        results, self.results = self.results, []
        return results

    def wait(self, job_ids):
        assert job_ids

    def shutdown(self):
        self.pairs = []
        self.region.cleanup()


class Rig:
    """A core and its workers in one process, over vLLM's region."""

    def __init__(self, engine_id, world_size, **keys):
        self.caches = [kv_caches(rank) for rank in range(world_size)]
        self.workers = [
            KVTierOffloadingWorker(
                RegionTieringSpec(config(engine_id, world_size, rank, **keys)),
                self.caches[rank],
                lambda rank=rank: IDENTITY | {"rank": rank},
                False,
                None if rank else lambda stop: ({"weights": "w"}, ""),
            )
            for rank in range(world_size)
        ]
        spec = RegionTieringSpec(config(engine_id, world_size, **keys))
        self.core = CoreHalf(spec, spec.forget_name)
        self.core.start(30)

    def close(self):
        self.core.shutdown()
        for worker in self.workers:
            worker.shutdown()


def engine_blocks(*blocks):
    return base.GPULoadStoreSpec(np.array(blocks), (len(blocks),), (0,))


def place(rig, *names):
    """Return (keys, vLLM's spec of their slots)."""
    keys = [make_offload_key(name.encode().ljust(32), 0) for name in names]
    placed = rig.core.manager.prepare_store(keys, ReqContext("request"))
    return keys, KVTierLoadStoreSpec(placed.store_spec)
