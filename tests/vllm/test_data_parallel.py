"""Data-parallel engines that share a configuration."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_server import Server
from vllm_engine import prompt

from kvtier.adapters.vllm.compat import data_parallel_size
from kvtier.testing.patience import wait_for

BLOCK_BYTES = 2 * 2 * 128 * 64 * 4
"""Keys and values of two layers for 128 tokens in float32."""


@pytest.mark.parametrize(
    ("index", "size", "engine_id", "known"),
    [(0, 1, "abc", 1), (0, 4, "abc_dp0", 4), (3, 4, "abc_dp3", 4), (0, 1, "abc_dp0", None), (1, 1, "abc_dp1", None)],
)
def test_engines_of_models_without_experts_are_told_that_they_are_alone(index, size, engine_id, known):
    parallel = SimpleNamespace(data_parallel_index=index, data_parallel_size=size)
    assert data_parallel_size(SimpleNamespace(parallel=parallel, engine_id=engine_id)) == known


@pytest.fixture
def server(model, tmp_path):
    kvtier = {
        "cpu_bytes_to_use": 8 * BLOCK_BYTES,
        "secondary_tiers": [{"type": "disk", "path": str(tmp_path / "disk"), "capacity": "64MiB"}],
    }
    options = ["--data-parallel-size", "2", "--api-server-count", "1"]
    # vLLM 0.33 gives each engine a NUMA node of its own: here it takes processors for nodes.
    made = Server(model, tmp_path / "log", kvtier, options, {"VLLM_CPU_SIM_MULTI_NUMA": "1"})
    try:
        wait_for(made.is_up, "the server's start")
        yield made
    finally:
        made.stop()


def test_each_engine_has_a_directory_and_hits_its_own_blocks(server, baseline, tmp_path):
    asked, other = prompt(900, 700), prompt(901, 700)

    def metric(name, rank):
        return sum(server.metrics(name, f'engine="{rank}"'))

    def has_written(rank):
        return server.stream(prompt(1, 20), rank) and metric("vllm:kvtier_written_blocks_total", rank) == 10

    for rank in (0, 1):
        assert [server.stream(one, rank) for one in (asked, other)] == baseline(asked, other)
        wait_for(partial(has_written, rank), what=f"engine {rank} writing 10 blocks")
    assert metric("vllm:external_prefix_cache_hits_total", 0) == 0
    assert metric("vllm:external_prefix_cache_hits_total", 1) == 0
    server.open("/reset_prefix_cache", {}).read()
    for rank in (0, 1):  # the first one's blocks have left host memory for the other's
        assert server.stream(asked, rank) == baseline(asked)[0]
        assert metric("vllm:external_prefix_cache_hits_total", rank) == 5 * 128
        assert metric("vllm:kvtier_read_blocks_total", rank) >= 2
    namespaces = [list(Path(tmp_path / "disk" / f"dp{rank}").rglob("namespace.json")) for rank in (0, 1)]
    first, second = (json.loads(found[0].read_text()) for found in namespaces)
    assert first == second
