"""kvtier's LRU finds no fewer tokens than vLLM's own of the same size, under vLLM's real scheduler and connector."""

import random

import pytest
from scheduler_driver import BLOCK, HOST_BLOCKS, Driver, kvtier_manager
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy

NUM_REQUESTS = 250
ORDERS_LIVE_BLOCKS = hasattr(CachePolicy, "on_request_access")
"""Whether vLLM evicts the tails of requests that run before their heads: from 0.33 on."""


def prompts_that_share_prefixes(seed):
    """Sessions that begin with one of three system prompts, and grow at every turn until they are long."""
    rng = random.Random(seed)
    systems = [[rng.randrange(3, 500) for _ in range(6 * BLOCK)] for _ in range(3)]
    sessions, prompts = [], []
    for _ in range(NUM_REQUESTS):
        if len(sessions) < 12:
            sessions.append(list(rng.choice(systems)))
        session = rng.choice(sessions)
        session += [rng.randrange(3, 500) for _ in range(rng.randrange(BLOCK, 5 * BLOCK))]
        prompts.append(list(session))
        if len(session) > 30 * BLOCK:
            sessions.remove(session)
    return prompts


@pytest.mark.parametrize(
    ("with_window", "most_seeds_behind"),
    [(False, 3), (True, 4 if ORDERS_LIVE_BLOCKS else 0)],
    ids=["full", "full and window"],
)
def test_no_fewer_hits_than_vllms_own_lru(model, monkeypatch, with_window, most_seeds_behind):
    """The engine computes no more tokens over all seeds, and in most of them; before vLLM 0.33 in each with a window.

    A run differs by a tenth either way, by what happens to be in memory: which of 12 sessions goes on is chance, and no
    order of eviction foretells it.
    """
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # vLLM's block hashes, and so the order of equal ranks, depend on it
    ours, theirs = {}, {}
    for seed in range(12):
        prompts = prompts_that_share_prefixes(seed)
        manager = kvtier_manager()
        ours[seed] = Driver(model, manager, with_window).run(prompts)
        manager.shutdown()
        theirs[seed] = Driver(model, CPUOffloadingManager(HOST_BLOCKS, "lru"), with_window).run(prompts)
    pairs = [(ours[seed], theirs[seed]) for seed in ours]
    told = f"tokens loaded over kvtier and vLLM, and computed, by seed: {list(map(counts, pairs))}"
    assert all(other.hits for _, other in pairs)
    assert sum(mine.num_computed for mine, _ in pairs) <= sum(other.num_computed for _, other in pairs), told
    if not (with_window and ORDERS_LIVE_BLOCKS):  # there the device finds more, and what it has is not loaded
        assert sum(mine.hits for mine, _ in pairs) >= sum(other.hits for _, other in pairs), told
    assert sum(mine.num_computed > other.num_computed for mine, other in pairs) <= most_seeds_behind, told


def counts(pair):
    mine, other = pair
    return mine.hits, other.hits, mine.num_computed, other.num_computed
