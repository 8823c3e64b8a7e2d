"""vLLM's own worker and a whole engine on a device; skipped, loudly, where there is none."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from region_rig import IDENTITY, SHARE, config, engine_blocks, kv_caches, place
from vllm_engine import Engine, prompt

from kvtier.adapters.vllm.core import CoreHalf
from kvtier.adapters.vllm.device import RegionTieringSpec
from kvtier.adapters.vllm.translation import KVTierLoadStoreSpec
from kvtier.adapters.vllm.worker import KVTierOffloadingWorker
from kvtier.testing.patience import wait_for
from kvtier.types import ReqContext


@pytest.fixture
def accelerator():
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        pytest.skip(f"NO CUDA DEVICE: vLLM's own worker was not run (torch {torch.__version__})")
    return found.type


@pytest.mark.gpu
def test_vllms_worker_on_a_device(accelerator, engine_id):
    spec = RegionTieringSpec(config(engine_id, blocks_per_chunk=2))
    caches = kv_caches(kind=accelerator)
    worker = KVTierOffloadingWorker(RegionTieringSpec(spec.config), caches, lambda: IDENTITY, False)
    core = CoreHalf(spec, spec.forget_name)
    try:
        core.start(60)
        blocks, wanted = [5, 2, 7, 0], [tensor.tensor.clone() for tensor in caches.tensors]
        keys, slots = place(SimpleNamespace(core=core), "x", "y")
        worker.submit_store(1, engine_blocks(*blocks), slots)
        worker.wait({1})
        wait_for(lambda: [result.job_id for result in worker.get_finished()] == [1])
        assert core.control.finished(1) == slots.sequence
        core.manager.complete_store(set(keys), ReqContext("request"))
        row = np.asarray(spec.arena.row(slots.block_ids[0])).view(np.int8)
        held = np.concatenate([tensor[blocks[:2]].cpu().numpy().ravel() for tensor in wanted])
        assert np.array_equal(row[: 2 * SHARE], held)
        for tensor in caches.tensors:
            tensor.tensor.zero_()
        loaded = KVTierLoadStoreSpec(core.manager.prepare_load(keys, ReqContext("request")))
        worker.submit_load(2, loaded, engine_blocks(*blocks))
        worker.wait({2})
        wait_for(lambda: [result.job_id for result in worker.get_finished()] == [2])
        for tensor, old in zip(caches.tensors, wanted, strict=True):
            assert torch.equal(tensor.tensor[blocks], old[blocks])
    finally:
        worker.shutdown()
        core.shutdown()


@pytest.mark.gpu
def test_an_engine_on_a_device(accelerator, model, tmp_path):
    asked = prompt(1, 700)
    options = {"processes": True, "gpu_memory_utilization": 0.3}
    with Engine(model, tmp_path / "plain", enable_prefix_caching=False, **options) as engine:
        wanted = engine.generate(asked)
    tiers = [{"type": "disk", "path": str(tmp_path / "disk"), "capacity": "64MiB"}]
    options["kvtier"] = {"secondary_tiers": tiers}
    with Engine(model, tmp_path / "first", **options) as engine:
        assert engine.generate(asked) == wanted
        engine.generate(prompt(2, 20))  # vLLM starts a store a step after its tokens
        assert engine.reset()
        assert engine.generate(asked) == wanted
        assert engine.external_hits() > 0
        assert "kvtier is ready" in engine.log()
    with Engine(model, tmp_path / "second", **options) as engine:
        assert engine.generate(asked) == wanted
        assert engine.external_hits() > 0
