"""Blocks of several sizes, several KV groups, several workers."""

import pytest
from vllm_engine import Engine, prompt, wait_until_up, written

from kvtier.testing.patience import wait_for

BLOCK = 128


def test_two_engine_blocks_to_an_offloaded_block(model, baseline, tmp_path):
    first = prompt(300, 5 * BLOCK + 20)
    second = prompt(301, 8 * BLOCK, prefix=first[: 4 * BLOCK + 9])
    with Engine(model, tmp_path / "log", kvtier={"block_size": 2 * BLOCK}) as engine:
        assert engine.generate(first) == baseline(first)
        engine.reset()
        assert engine.generate(first) == baseline(first)
        assert engine.external_hits() == 4 * BLOCK
        engine.reset()
        # One engine block is on the device: the load starts in the middle of an offloaded block.
        assert engine.generate(first[: BLOCK + 1]) == baseline(first[: BLOCK + 1])
        before = engine.external_hits()
        assert engine.generate(second) == baseline(second)
        assert engine.external_hits() - before == 3 * BLOCK


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    from vllm_models import save_gemma

    return save_gemma(tmp_path_factory.mktemp("gemma"))


def test_larger_blocks_are_refused_where_a_layer_has_a_window(gemma, tmp_path):
    """vLLM frees what has left the window, and would store halves of blocks that it later loads as wholes."""
    engine = Engine(gemma, tmp_path / "log", kvtier={"blocks_per_chunk": 2})
    with pytest.raises(RuntimeError, match="no reply from the engine"), engine:
        engine.wait_until_started()
    assert "blocks_per_chunk=2: 1: vLLM stores parts only of larger blocks of the layer " in engine.log()


def test_full_and_sliding_layers_are_two_groups(gemma, tmp_path):
    prompts = [prompt(seed, 7 * BLOCK + 30) for seed in (310, 311)]
    branch = prompt(312, 8 * BLOCK, prefix=prompts[0][: 5 * BLOCK])
    with Engine(gemma, tmp_path / "plain", enable_prefix_caching=False) as plain:
        expected = [plain.generate(asked)[0] for asked in (*prompts, branch)]
    with Engine(gemma, tmp_path / "log", kvtier={}) as engine:
        assert [engine.generate(asked)[0] for asked in prompts] == expected[:2]
        engine.reset()
        assert [engine.generate(asked)[0] for asked in (*prompts, branch)] == expected
        assert engine.external_hits() >= 2 * 6 * BLOCK
        engine.reset()
        assert engine.generate(*prompts, branch) == expected
        # blocks of both groups: more than the full-attention layers alone would store
        assert engine.metrics()["kvtier_stored_blocks.device"] > 6 + 6 + 3


def test_two_workers_share_an_arena_and_never_read_what_one_wrote(model, baseline, tmp_path):
    asked = prompt(320, 700)
    keys = {"secondary_tiers": [{"type": "disk", "path": str(tmp_path / "disk"), "capacity": "64MiB"}]}
    with Engine(model, tmp_path / "one", kvtier=keys) as engine:
        wait_until_up(engine)
        assert engine.generate(asked) == baseline(asked)
        wait_for(lambda: written(engine) == 5, what="writing 5 blocks")
    two = {"tensor_parallel_size": 2, "processes": True, "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}}
    with Engine(model, tmp_path / "two", kvtier=keys, **two) as engine:
        wait_until_up(engine)
        cold = engine.generate(asked)
        assert engine.external_hits() == 0
        engine.reset()
        assert engine.generate(asked) == cold == baseline(asked)
        assert engine.external_hits() == 5 * BLOCK
        assert engine.log().count("kvtier knows the weights: ") == 1  # one worker reads for all
