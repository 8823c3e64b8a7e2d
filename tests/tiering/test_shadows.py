"""Policies with shadows, inside the manager: events, counters, pins and resets."""

import random

import pytest
from engine import make_keys

from kvtier.config import CPUConfig, parse_config
from kvtier.errors import ConfigError
from kvtier.events import PolicySwitched
from kvtier.eviction import contest, shadows
from kvtier.eviction.auto import AutoPolicy, ShadowedPolicy, with_shadows
from kvtier.eviction.lru import LRUPolicy
from kvtier.eviction.s3fifo import S3FIFOPolicy

TWO = {"lru": LRUPolicy, "s3fifo": S3FIFOPolicy}


def lru_that_may_switch(capacity):
    return ShadowedPolicy(capacity, "lru", TWO, may_switch=True)


def scan(engine, rng, count):
    """Some prompts come again and again among many that come once, which is where LRU loses."""
    for number in range(count):
        name = f"hot {rng.randrange(8)}" if rng.random() < 0.4 else f"once {rng.random()}"
        keys, context = make_keys(6, name), engine.request(str(number))
        num_hits = engine.hits(keys, context)
        if num_hits:
            engine.manager.prepare_load(keys[:num_hits], context)
            engine.manager.complete_load(set(keys[:num_hits]), context)
        stored = engine.manager.prepare_store(keys[num_hits:], context)
        if stored is not None:
            engine.manager.complete_store(set(stored.keys_to_store), context)
        engine.finish(context)


@pytest.fixture
def switched(make_engine, monkeypatch):
    """An engine whose policy has just changed while a request holds its blocks."""
    monkeypatch.setattr(shadows, "FIRST_CREDIT", 1 << 20)
    monkeypatch.setattr(contest, "WINDOW_KEYS", 64)
    engine = make_engine(num_blocks=96, num_tiers=0, policy=lru_that_may_switch)
    held, context = make_keys(6, "held"), engine.request("holder")
    engine.store(held, context)
    engine.manager.prepare_load(held, context)
    scan(engine, random.Random(1), 700)
    return engine, held, context


def test_a_switch_is_an_event_and_a_counter_and_keeps_every_pin(switched):
    engine, held, context = switched
    events = engine.log.of(PolicySwitched)
    assert [event[:3] for event in events] == [("primary", "lru", "s3fifo")]
    assert 0 <= events[0].former_rate < events[0].chosen_rate <= 1
    stats = engine.manager.get_stats()
    assert stats["policy_switches.primary.lru.s3fifo"] == 1
    assert stats["shadow_blocks.lru"] == pytest.approx(stats["shadow_blocks.s3fifo"], abs=64)  # of a batch under way
    assert stats["shadow_hits.s3fifo"] > stats["shadow_hits.lru"]
    assert all(engine.table.is_ready(key) for key in held)
    engine.manager.complete_load(set(held), context)
    engine.step()
    assert not engine.table.policy.is_moving


def test_a_reset_clears_the_shadows_and_starts_over(switched):
    engine, _, _ = switched
    before = engine.manager.get_stats()["shadow_blocks.lru"]
    engine.manager.reset_cache()
    engine.step()
    assert engine.table.policy.name == "lru"
    assert not any(len(cache.policy) for cache in engine.table.policy._shadows.caches.values())
    scan(engine, random.Random(2), 20)
    engine.step()
    assert engine.manager.get_stats()["shadow_blocks.lru"] == before  # not warm again


def test_without_shadows_nothing_is_counted(make_engine):
    engine = make_engine()
    assert not any(name.startswith("shadow") for name in engine.manager.get_stats())


def test_shadows_beside_any_policy():
    class Mine(LRUPolicy):
        pass

    policy = with_shadows("mine", Mine)(300)
    assert isinstance(policy, ShadowedPolicy)
    assert (policy.name, policy.capacity) == ("mine", 300)
    assert {"shadow_hits.mine", "shadow_hits.arc", "shadow_hits.double"} <= policy.stats().keys()
    assert with_shadows("auto", AutoPolicy) is AutoPolicy


def test_configured_by_name():
    user = parse_config({"cpu_bytes_to_use": 4096, "eviction_policy": "auto", "shadow_caches": True}, CPUConfig)
    assert user.shadow_caches
    with pytest.raises(ConfigError, match="shadow_caches"):
        parse_config({"cpu_bytes_to_use": 4096, "shadow_caches": "yes"}, CPUConfig)
