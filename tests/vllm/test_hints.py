"""Hints of clients and orchestrators, through vLLM's scheduler and connector."""

import random

import pytest
from scheduler_driver import BLOCK, Driver, kvtier_manager

PROMPT_BLOCKS = 20


def prompt(name):
    rng = random.Random(name)
    return [rng.randrange(3, 500) for _ in range(PROMPT_BLOCKS * BLOCK + 5)]


class Engine:
    """Serves one request after the other."""

    def __init__(self, model, **options):
        self.manager = kvtier_manager(**options)
        self.driver = Driver(model, self.manager, with_window=False)
        self.count = 0

    def serve(self, tokens, hint=None, **more):
        """Return how many tokens of a prompt are loaded."""
        before, self.count = self.driver.hits, self.count + 1
        self.driver.add(str(self.count), tokens, hint, **more)
        while self.driver.scheduler.has_unfinished_requests():
            self.driver.step()
        for _ in range(3):
            self.driver.step()
        return self.driver.hits - before

    def serve_others(self):
        """Serve as many prompts as fill host memory twice."""
        for number in range(20):
            self.serve(prompt(f"other {number}"))

    @property
    def stats(self):
        return self.manager._core.manager.get_stats()


@pytest.fixture
def engine(model):
    engine = Engine(model)
    yield engine
    engine.manager.shutdown()


@pytest.mark.parametrize("hint", [{"retain": "1h"}, {"priority": "high"}, {"retain": 600, "priority": "high"}])
def test_blocks_that_a_hint_keeps_are_loaded_again(engine, hint):
    engine.serve(prompt("kept"), hint)
    engine.serve(prompt("not kept"))
    engine.serve_others()
    assert engine.serve(prompt("kept")) == PROMPT_BLOCKS * BLOCK
    assert engine.serve(prompt("not kept")) == 0


def test_what_a_session_leaves_gives_way_when_it_says_that_it_has_ended(engine):
    session = {"session": "s", "retain": "1h"}
    engine.serve(prompt("turn"), session)
    engine.serve_others()
    assert engine.serve(prompt("turn"), session) == PROMPT_BLOCKS * BLOCK
    assert engine.stats["primary.kept_blocks"] >= PROMPT_BLOCKS
    engine.serve(prompt("turn"), {"session": "s", "ended": True})
    assert engine.stats["primary.kept_blocks"] == 0
    engine.serve_others()
    assert engine.serve(prompt("turn")) == 0


@pytest.mark.parametrize("wrong", ["10m", {"retain": "soon"}, {"pin": True}, [1], {"priority": None}])
def test_a_malformed_hint_fails_no_request(engine, wrong):
    assert engine.serve(prompt("a"), wrong) == 0
    engine.serve_others()
    assert engine.serve(prompt("other 12")) > 0
    assert engine.stats["ignored_hints"] == 1


def test_an_orchestrators_hint_comes_in_vllms_envelope(engine):
    kv_hints = pytest.importorskip("vllm.v1.kv_hints", reason="vLLM has kv_hints from 0.32 on")
    actions = [
        kv_hints.KvHintAction("1", "kv.fetch", "1.0", {}),
        kv_hints.KvHintAction("2", "kvtier", "1", {"retain": 600}),
    ]
    engine.serve(prompt("kept"), kv_hints=kv_hints.KvHintsEnvelope("0.1", "message", actions))
    engine.serve_others()
    assert engine.serve(prompt("kept")) == PROMPT_BLOCKS * BLOCK


def test_a_tenant_leaves_another_ones_share_alone(model):
    engine = Engine(model, tenant_quotas=True)
    engine.serve(prompt("theirs"), {"tenant": "small"})
    for number in range(20):
        engine.serve(prompt(f"other {number}"), {"tenant": "large"})
    assert engine.serve(prompt("theirs"), {"tenant": "small"}) == PROMPT_BLOCKS * BLOCK
    engine.manager.shutdown()
