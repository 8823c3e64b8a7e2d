"""One engine in one process, with host memory alone."""

import pytest
from vllm_engine import Engine, prompt

BLOCK = 128
"""Tokens in an engine block on the CPU platform."""


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    with Engine(model, tmp_path_factory.mktemp("host") / "log", kvtier={}, num_gpu_blocks_override=24) as engine:
        yield engine


def hits_during(engine, *prompts):
    """Return (answers, tokens that came from kvtier)."""
    before = engine.external_hits()
    answers = [engine.generate(prompt)[0] for prompt in prompts]
    return answers, engine.external_hits() - before


def test_reloads_after_the_prefix_cache_was_reset(engine, baseline):
    asked = prompt(1, 700)
    assert engine.generate(asked) == baseline(asked)
    assert engine.reset()
    answers, hits = hits_during(engine, asked)
    assert answers == baseline(asked)
    assert hits == 5 * BLOCK


def test_the_bytes_really_come_from_kvtier(engine, baseline):
    asked = prompt(5, 700)
    engine.generate(asked)
    engine.generate(prompt(6, 20))  # vLLM starts a store a step after its tokens
    engine.reset()
    assert engine.ask("zero") >= 1
    answers, hits = hits_during(engine, asked)
    assert hits == 5 * BLOCK
    assert answers != baseline(asked)
    assert engine.reset(reset_connector=True)
    assert engine.generate(asked) == baseline(asked)


def test_a_shared_prefix_is_reloaded_and_the_rest_computed(engine, baseline):
    first = prompt(2, 600)
    second = prompt(3, 800, prefix=first[:512])
    engine.generate(first)
    engine.reset()
    answers, hits = hits_during(engine, second)
    assert answers == baseline(second)
    assert hits == 512


def test_serves_what_the_device_had_no_room_for(engine, baseline):
    prompts = [prompt(seed, 1100) for seed in (11, 12, 13)]
    for asked in prompts:
        assert engine.generate(asked) == baseline(asked)
    before = engine.metrics()["prefix_cache_hits"]
    answers, hits = hits_during(engine, prompts[0], prompts[1])
    assert answers == baseline(*prompts[:2])
    assert hits + engine.metrics()["prefix_cache_hits"] - before >= 2 * 1024
    assert hits > 0


def test_requests_side_by_side_get_what_they_would_get_alone(engine, baseline):
    prompts = [prompt(seed, 500 + 7 * seed) for seed in range(20, 26)]
    assert engine.generate(*prompts) == baseline(*prompts)
    engine.reset()
    assert engine.generate(*prompts) == baseline(*prompts)


def test_a_reset_of_the_connector_forgets(engine, baseline):
    asked = prompt(30, 700)
    engine.generate(asked)
    assert engine.reset(reset_connector=True)
    answers, hits = hits_during(engine, asked)
    assert (answers, hits) == (baseline(asked), 0)
    engine.reset()
    answers, hits = hits_during(engine, asked)
    assert (answers, hits) == (baseline(asked), 5 * BLOCK)


def test_an_aborted_request_leaves_nothing_behind(engine, baseline):
    asked = prompt(40, 900)
    assert engine.ask("abort", prompt=asked, steps=2) == {"running": 1, "left": 0}
    assert engine.generate(asked) == baseline(asked)
    engine.reset()
    engine.ask("abort", prompt=asked, steps=1)
    engine.ask("abort", prompt=asked, steps=0)
    assert engine.generate(asked) == baseline(asked)
    assert engine.generate(prompt(41, 100)) == baseline(prompt(41, 100))
    assert engine.metrics().get("kvtier_quarantined_blocks.primary") == 0


def test_preempted_requests_end_as_if_they_had_not_been(engine, model, tmp_path):
    prompts = [prompt(seed, 5 * BLOCK) for seed in (50, 51, 52, 53)]
    before = engine.metrics().get("num_preemptions", 0)
    engine.reset()
    together = engine.generate(*prompts, max_tokens=160)
    assert engine.metrics().get("num_preemptions", 0) > before
    engine.reset(reset_connector=True)
    assert together == [engine.generate(asked, max_tokens=160)[0] for asked in prompts]


def test_nothing_in_kvtier_failed(engine):
    metrics = engine.metrics()
    assert metrics["kvtier_hit_blocks.primary"] > 0
    assert metrics["kvtier_stored_blocks.device"] > 0
    assert metrics["kvtier_lookups.hit"] > 0
    assert not [name for name in metrics if name.startswith(("kvtier_errors", "kvtier_unexpected"))]
    assert "Traceback" not in engine.log().replace("renderers/base.py", "").split("kvtier is ready")[0]
