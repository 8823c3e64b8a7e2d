"""Engines on one pool of Mooncake's, to which they lend memory."""

import itertools
import os
import signal

import pytest
from vllm_engine import Engine, prompt, wait_until_up, written

from kvtier.testing.patience import wait_for

HOSTS = ("127.0.0.1", "127.0.0.2")
SEGMENT_BYTES = 16 << 20
BLOCK_TOKENS = 128
BLOCK_BYTES = 128 << 10
LONG = 1900
"""Tokens of a prompt with 14 blocks."""


@pytest.fixture
def start(model, tmp_path):
    """Starts engines, each of which lends memory to a pool as one of the hosts."""
    engines = []

    def make(pool, host, **keys):
        tier = {"type": "mooncake", "master": pool.address, "segment": SEGMENT_BYTES, "protocol": "tcp", "host": host}
        keys = {"secondary_tiers": [tier], "probe_deadline": 30.0} | keys  # a busy machine may answer late
        engines.append(Engine(model, tmp_path / f"log-{len(engines)}", kvtier=keys))
        return engines[-1]

    yield make
    for engine in engines:
        engine.stop()


def hits(engine):
    """Return how many blocks the engine has loaded from the pool."""
    return int(engine.metrics().get("kvtier_hit_blocks.mooncake", 0))


def answer_and_store(engine, asked):
    """Return the answer to a prompt, when the pool has its blocks."""
    before = written(engine, "mooncake")
    answer = engine.generate(asked)
    wait_for(lambda: written(engine, "mooncake") == before + len(asked) // BLOCK_TOKENS, "the blocks are stored")
    return answer


def store_at_each_host(engine, pool, num_blocks):
    """Store prompts of one block until each host has `num_blocks` of them or more; return the prompts by host."""
    prompts = {host: [] for host in HOSTS}
    seeds = itertools.count(1000)
    while min(map(len, prompts.values())) < num_blocks:
        before, asked = pool.host_of_blocks().keys(), prompt(next(seeds), 200)
        answer_and_store(engine, asked)
        (host,) = (host for name, host in pool.host_of_blocks().items() if name not in before)
        prompts[host].append(asked)
    return prompts


def test_engines_hit_each_others_blocks_and_a_lost_host_costs_its_own_only(make_pool, start, baseline):
    pool = make_pool(lent_bytes=0)
    first, second = (start(pool, host) for host in HOSTS)
    for engine in (first, second):
        wait_until_up(engine, "mooncake")
    wait_for(lambda: pool.hosts() == set(HOSTS), "both hosts lend memory")
    of_first, of_second = prompt(900, 700), prompt(901, 700)
    assert answer_and_store(first, of_first) == baseline(of_first)
    assert second.generate(of_first) == baseline(of_first)
    assert (hits(second), second.external_hits()) == (5, 5 * BLOCK_TOKENS)
    assert written(second, "mooncake") == 0
    assert answer_and_store(second, of_second) == baseline(of_second)
    assert first.generate(of_second) == baseline(of_second)
    assert (hits(first), first.external_hits()) == (5, 5 * BLOCK_TOKENS)
    assert written(first, "mooncake") == 5

    kept = store_at_each_host(first, pool, 4)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    for host in HOSTS:
        asked = kept[host].pop()
        assert second.generate(asked) == baseline(asked)
    assert hits(second) == 7  # the process that lends the first one's memory goes on

    (lender,) = pool.kvtier_lenders(HOSTS[0])
    os.kill(lender, signal.SIGKILL)
    for asked in kept[HOSTS[0]]:
        assert second.generate(asked) == baseline(asked)
    assert hits(second) == 7
    for asked in kept[HOSTS[1]]:
        assert second.generate(asked) == baseline(asked)
    assert hits(second) == 7 + len(kept[HOSTS[1]])
    assert second.metrics()["kvtier_tier_times_up.mooncake"] == 1  # it was never down

    wait_for(lambda: pool.hosts() == {HOSTS[1]}, "the master forgets the lost host")
    after = prompt(902, 700)
    assert answer_and_store(second, after) == baseline(after)
    again = start(pool, HOSTS[0])
    wait_until_up(again, "mooncake")
    assert again.generate(after) == baseline(after)
    assert hits(again) == 5
    wait_for(lambda: pool.hosts() == set(HOSTS), "the first host lends memory again")


def test_a_lost_master_costs_misses_only_and_a_full_pool_evicts(make_pool, start, baseline):
    pool = make_pool(lent_bytes=0)
    engine = start(pool, HOSTS[0], cpu_bytes_to_use="4MiB")
    wait_until_up(engine, "mooncake")
    long_prompts = (prompt(seed, LONG) for seed in itertools.count(2000))

    def push_out_of_memory():
        for _ in range(3):
            engine.generate(next(long_prompts))
        assert engine.reset()
        return hits(engine)

    asked = prompt(910, 700)
    assert answer_and_store(engine, asked) == baseline(asked)
    before = push_out_of_memory()
    assert engine.generate(asked) == baseline(asked)
    assert hits(engine) == before + 5

    before = push_out_of_memory()
    pool.kill_master()
    assert engine.generate(asked) == baseline(asked)
    assert hits(engine) == before
    wait_for(lambda: engine.generate(prompt(1, 20)) and not engine.metrics()["kvtier_tier_up.mooncake"], "down")
    pool.start()
    wait_until_up(engine, "mooncake")
    wait_for(lambda: pool.hosts() == {HOSTS[0]}, "the memory is lent to the new master")
    asked = prompt(911, 700)
    assert answer_and_store(engine, asked) == baseline(asked)
    before = push_out_of_memory()
    assert engine.generate(asked) == baseline(asked)
    assert hits(engine) == before + 5

    start_of_fill = written(engine, "mooncake")

    def has_taken_more_than_it_holds():
        asked = next(long_prompts)
        assert engine.generate(asked) == baseline(asked)
        return written(engine, "mooncake") - start_of_fill > SEGMENT_BYTES // BLOCK_BYTES

    wait_for(has_taken_more_than_it_holds, "the pool has taken more than it holds")
    assert pool.num_evicted() > 0
    assert engine.metrics()["kvtier_tier_up.mooncake"]
