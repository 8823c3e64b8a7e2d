"""Multi-head latent attention under tensor parallelism: what all workers hold is stored once."""

import pytest
from combinations import NO_MLA
from vllm_engine import Engine, prompt
from vllm_models import save_deepseek

from kvtier.testing.patience import wait_for

BLOCK = 16
"""The block of vLLM's reference implementation of MLA for CPUs."""
NUM_BLOCKS = 8
BLOCK_BYTES = BLOCK * (512 + 64) * 4 * 2
"""Latent and rope values of a block's tokens, in float32, in two layers."""


def test_two_workers_store_once_what_both_have(tmp_path):
    begun = prompt(1700, NUM_BLOCKS * BLOCK)
    two = {"tensor_parallel_size": 2, "processes": True, "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}}
    with Engine(
        save_deepseek(tmp_path / "model"), tmp_path / "log", kvtier={}, num_gpu_blocks_override=256, **two
    ) as engine:
        try:
            engine.wait_until_started()
        except RuntimeError:
            if NO_MLA in engine.log():
                pytest.skip(f"THIS VLLM CANNOT RUN MLA ON CPUS: use another version ({NO_MLA})")
            raise
        wait_for(
            lambda: engine.generate(prompt(1, 40)) and engine.metrics().get("kvtier_blocks.primary"), "both workers"
        )
        (expected,) = engine.generate(begun, max_tokens=13)
        # That implementation computes one token behind its cache in another way than a prompt, with other results. So
        # the answer after a hit is compared with one that was computed token by token, too.
        before = engine.external_hits()
        assert engine.generate([*begun, expected[0]]) == [expected[1:]]
        assert engine.external_hits() - before == NUM_BLOCKS * BLOCK
        values = engine.metrics()
        assert values["kvtier_bytes.primary"] == values["kvtier_blocks.primary"] * BLOCK_BYTES
        assert values["kv_offload_store_bytes"] == values["kvtier_stored_blocks.device"] * BLOCK_BYTES
        assert not [name for name, value in values.items() if name.startswith("kvtier_unexpected") and value]
