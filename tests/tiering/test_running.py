"""While a request is computed, loads for others take its last blocks first, and cut no hole into its chain."""

import pytest
from engine import Engine, make_keys

from kvtier.hints import HINT_KEY
from kvtier.registry import POLICIES

KEYS, OTHER = make_keys(12), make_keys(3, "other")


def run_on(engine: Engine, params: dict | None = None) -> None:
    """Serve a session's first turn, and compute its second one, which finds 6 blocks and fills memory in two calls."""
    first = engine.request("first", kv_transfer_params=params)
    engine.store(KEYS[:6], first)
    engine.finish(first)
    engine.step()
    second = engine.request("second", kv_transfer_params=params)
    assert engine.wait_hits(KEYS[:6], second) == 6
    engine.load(KEYS[:6], second)
    engine.store(KEYS[6:9], second)
    engine.step()
    engine.store(KEYS[9:], second)
    engine.step()


def held(engine: Engine) -> list[bytes]:
    return [key for key in KEYS if key in engine.table]


@pytest.mark.parametrize("policy", POLICIES.names())
def test_a_load_takes_the_last_blocks_of_a_request_that_is_computed(make_engine, policy):
    engine = make_engine(num_blocks=12, policy=POLICIES.load(policy))
    run_on(engine)
    engine.plant(OTHER)
    assert engine.wait_hits(OTHER, engine.request("other")) == 3
    assert held(engine) == KEYS[:9]


@pytest.mark.parametrize("quotas", [False, True])
@pytest.mark.parametrize("policy", POLICIES.names())
def test_so_it_is_with_hints(make_engine, policy, quotas):
    engine = make_engine(num_blocks=12, policy=POLICIES.load(policy), tenant_quotas=quotas)
    params = {HINT_KEY: {"tenant": "one"}}
    run_on(engine, params)
    engine.plant(OTHER)
    assert engine.wait_hits(OTHER, engine.request("other", kv_transfer_params=params)) == 3
    assert held(engine) == KEYS[:9]


def holes(engine: Engine, *chains: list[bytes]) -> list[list[bool]]:
    """Return which blocks of those chains are held that have a hole."""
    held = [[key in engine.table for key in keys] for keys in chains]
    return [row for row in held if row != sorted(row, reverse=True)]


# Not tinylfu: in a memory so small, its window holds one block, which gives way before all others.
@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo", "prefix"])
def test_a_load_cuts_no_request_of_several_that_are_computed(make_engine, policy):
    engine = make_engine(num_blocks=24, policy=POLICIES.load(policy))
    chains = [make_keys(8, name) for name in "abc"]
    requests = [engine.request(name) for name in "abc"]
    for half in (slice(4), slice(4, 8)):
        for keys, request in zip(chains, requests, strict=True):
            engine.store(keys[half], request)
        engine.step()
    engine.plant(OTHER)
    assert engine.wait_hits(OTHER, engine.request("other")) == 3
    assert holes(engine, *chains) == []


@pytest.mark.parametrize("num_others", [1, 2])
@pytest.mark.parametrize("policy", POLICIES.names())
def test_a_load_cuts_no_request_whose_first_blocks_another_one_has_used_since(make_engine, policy, num_others):
    engine = make_engine(num_blocks=12, policy=POLICIES.load(policy))
    shared, own = KEYS[:4], KEYS[4:]
    engine.run(shared, "first")
    request = engine.request("computed")
    for user in (request, *(engine.request(f"other {number}") for number in range(num_others))):
        assert engine.wait_hits(shared, user) == 4
        engine.load(shared, user)
        if user is not request:
            engine.finish(user)
    engine.store(own, request)
    engine.step()
    engine.plant(OTHER)
    assert engine.wait_hits(OTHER, engine.request("loads")) == 3
    assert held(engine) == KEYS[:9]


def test_a_session_that_ends_with_a_request_does_not_end_before_it(make_engine):
    """To put blocks in order is not to settle them: a hint that ends the session must not act before the end."""
    engine = make_engine(num_blocks=12)
    params = {HINT_KEY: {"session": "s", "ended": True}}
    run_on(engine, params)
    engine.plant(OTHER)
    assert engine.wait_hits(OTHER, engine.request("other")) == 3
    assert held(engine) == KEYS[:9]
