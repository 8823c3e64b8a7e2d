import hashlib
import random

import pytest

from kvtier.eviction import shadows
from kvtier.eviction.auto import FOLLOWED
from kvtier.eviction.lru import LRUPolicy
from kvtier.eviction.shadows import SampledUses, Sampler, ShadowCache, Shadows
from kvtier.keys import OffloadKey, make_offload_key

from .changing import chain, scans, sessions
from .replay import replay


def counted_keys(count: int) -> list[OffloadKey]:
    return [make_offload_key(number.to_bytes(8, "big"), 3) for number in range(count)]


def hashed_keys(count: int) -> list[OffloadKey]:
    return [make_offload_key(hashlib.sha256(str(number).encode()).digest(), 0) for number in range(count)]


@pytest.mark.parametrize("make", [counted_keys, hashed_keys])
@pytest.mark.parametrize("capacity", [1, 100, 1000, 10_000, 200_000])
def test_the_sample_is_the_share_that_a_shadow_has_of_the_capacity(make, capacity):
    sampler = Sampler(capacity)
    assert min(capacity, 100) <= sampler.capacity <= shadows.MAX_KEYS
    keys = make(65_536)
    picked = sampler.pick(keys)
    chosen = set(picked)
    assert picked == [key for key in keys if key in chosen]
    expected = len(keys) * sampler.capacity / capacity
    assert len(picked) == pytest.approx(expected, rel=0.02 if make is counted_keys else 0.3)


def test_a_very_large_cache_samples_by_two_bytes():
    sampler = Sampler(50_000_000)
    assert sampler.capacity == 50_000_000 // 65_536
    assert 0 < len(sampler.pick(counted_keys(400_000))) < 20


def test_a_key_is_sampled_or_not_whatever_comes_with_it():
    sampler, keys = Sampler(2000), hashed_keys(3000)
    together = sampler.pick(keys)
    assert together == [key for key in keys if sampler.pick([key])]
    assert sampler.pick([]) == []


def test_a_hit_ends_at_the_first_block_of_its_run_that_is_missing():
    cache = ShadowCache(LRUPolicy(8))
    first, second = chain("a", 3), chain("b", 2)
    cache.policy.insert([first[0], first[2], *second])
    assert cache.replay([first, second], [*second, *first]) == 3
    assert cache.replay([first], first) == 3
    assert list(cache.policy.candidates()) == [*reversed(second), *reversed(first)]


def test_a_full_shadow_evicts_nothing_of_the_batch():
    cache = ShadowCache(LRUPolicy(4))
    cache.replay([chain("a", 4)], chain("a", 4))
    runs = [chain("a", 1), chain("b", 3)]
    assert cache.replay(runs, [*runs[1], *runs[0]]) == 1
    assert set(cache.policy.candidates()) == {*runs[0], *runs[1]}


def test_hits_count_once_a_shadow_is_warm():
    cache = ShadowCache(LRUPolicy(2))
    keys = chain("a", 2)
    for _ in range(3):
        cache.replay([keys], keys)
    assert (cache.hits, cache.blocks) == (2, 2)
    cache.rest()
    cache.replay([keys], keys)
    assert (cache.hits, cache.blocks) == (2, 2)


def test_what_is_spent_must_be_earned_by_other_uses(monkeypatch):
    monkeypatch.setattr(shadows, "FIRST_CREDIT", 0)
    uses, sampled = SampledUses(100), 0
    most = uses._round
    keys = iter(hashed_keys(20_000))

    def use(count):
        nonlocal sampled
        for _ in range(count):
            uses.note_new([next(keys)])
            while uses.batches:
                sampled += len(uses.batches.popleft().keys)

    use(4000)
    assert uses.resting
    assert sampled == pytest.approx(most * (1 + shadows.EARNED_PER_USE), abs=10)
    first = sampled
    use(10_000)
    assert sampled == first
    uses.note_new([])
    uses._credit = most
    use(2000)
    assert sampled > first


def test_batches_that_nobody_replays_are_bounded():
    uses = SampledUses(100)
    for number in range(200):
        uses.note_new(chain(number, 10))
    assert len(uses.batches) == shadows.MAX_WAITING


def test_what_one_request_brings_is_bounded():
    uses = SampledUses(1000)
    uses.note_new(hashed_keys(2000))
    assert [len(batch.keys) for batch in uses.batches] == [shadows.MAX_RUN_KEYS]


def test_a_run_begins_with_what_was_found_and_ends_with_what_was_new():
    uses, keys = SampledUses(32), chain("a", 6)
    uses.note_found(keys[:4], keys[:4])
    uses.note_new(keys[4:])
    assert [batch.runs for batch in uses.batches] == [[keys]]


def test_the_same_use_told_twice_counts_once():
    uses, keys = SampledUses(200), chain("a", 6)
    uses.note_new(keys)
    uses.note_found(keys, keys)
    uses.note_found(chain("b", 6), chain("b", 6))
    uses.note_new([])
    (batch,) = uses.batches
    assert sorted(batch.keys) == sorted(set(batch.keys))


def test_what_an_engine_names_before_it_stores_it_is_no_use_yet_and_one_then():
    uses, keys = SampledUses(32), chain("a", 6)
    for _ in range(3):  # a wait
        uses.note_found(keys, keys[:2])
    uses.note_found(keys, keys[:3])
    uses.note_new(keys[2:])  # what was there has been replaced
    assert [batch.runs for batch in uses.batches][-1][-1] == keys[2:]
    assert sum(len(batch.keys) for batch in uses.batches) == len(keys)


def follow(made: Shadows, requests) -> None:
    seen = set[OffloadKey]()
    for keys in requests:
        found = next((index for index, key in enumerate(keys) if key not in seen), len(keys))
        made.uses.note_found(keys[:found], seen)
        made.uses.note_new(keys[found:])
        seen.update(keys)
        while made.uses.batches or made.is_busy:
            made.work()


@pytest.mark.parametrize("make", [scans, sessions])
def test_differences_of_shadows_are_those_of_caches(make, monkeypatch):
    monkeypatch.setattr(shadows, "FIRST_CREDIT", 1 << 30)
    capacity, requests = 512, make(random.Random(4), 1200)
    made = Shadows(capacity, FOLLOWED, "lru")
    assert made.size == capacity // 4
    follow(made, requests)
    made.check_invariants()
    real = {name: replay(kind(capacity), requests).hit_percent for name, kind in FOLLOWED.items()}
    real["double"] = replay(LRUPolicy(2 * capacity), requests).hit_percent
    found = {name: 100 * made.caches[name].hits / made.caches[name].blocks for name in real}
    del found["tinylfu"]  # it holds tails without heads, which a sample of a chain does not show
    for name in found:
        assert found[name] - found["lru"] == pytest.approx(real[name] - real["lru"], abs=5), (name, real, found)


def test_the_shadows_of_other_sizes_follow_the_policy_in_charge():
    made = Shadows(1000, FOLLOWED, "lru")
    half, double = made.caches["half"], made.caches["double"]
    assert (half.policy.capacity, double.policy.capacity) == (made.size // 2, made.size * 2)
    half.hits = half.blocks = 7
    made.put_in_charge("arc")
    assert type(made.caches["half"].policy) is FOLLOWED["arc"]
    assert made.caches["half"].blocks == 7


def test_cleared_shadows_hold_nothing():
    made = Shadows(200, FOLLOWED, "lru")
    follow(made, scans(random.Random(1), 100))
    assert any(len(cache.policy) for cache in made.caches.values())
    made.clear()
    assert not any(len(cache.policy) for cache in made.caches.values())
    assert not made.uses.batches
