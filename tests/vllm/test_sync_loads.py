"""Hits in host memory that vLLM loads within a step, from 0.33 on: `sync_load_budget_bytes`."""

import inspect

import pytest
from vllm.v1.kv_offload import base
from vllm_engine import Engine, prompt

BLOCK = 128
ASKED = prompt(1600, 5 * BLOCK + 20)
HAS_SYNC_LOADS = "expedited" in inspect.signature(base.OffloadingWorker.submit_load).parameters


def steps_to_first_token(engine, asked):
    """Return how many steps of the engine a request takes to its first token, and its whole answer."""
    name, steps = engine.ask("begin", prompt=asked, steps=0), 0
    while not engine.ask("answer", name=name):
        engine.ask("step", steps=1)
        steps += 1
    return steps, engine.ask("end", name=name, abort=False)


@pytest.fixture(scope="module")
def steps(model, baseline, tmp_path_factory):
    """Return a function from the budget to the steps that a request takes whose blocks are in host memory."""

    def count(budget):
        log = tmp_path_factory.mktemp("sync") / "log"
        with Engine(model, log, kvtier={"sync_load_budget_bytes": budget}) as engine:
            assert engine.generate(ASKED) == baseline(ASKED)
            engine.reset()
            before = engine.external_hits()
            count, answer = steps_to_first_token(engine, ASKED)
            assert [answer] == baseline(ASKED)
            assert engine.external_hits() - before == 5 * BLOCK
            return count

    return count


def test_a_hit_within_the_budget_starts_sooner(steps):
    assert steps(1 << 30) == steps(0) - HAS_SYNC_LOADS, "vLLM before 0.33 knows no budget"
