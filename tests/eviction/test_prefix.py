"""Prefix: the suite, what it knows of chains, and sessions that grow."""

from heapq import heappop, heappush
from itertools import count, islice
from random import Random

import pytest

from kvtier.eviction.lru import LRUPolicy
from kvtier.eviction.prefix import PrefixPolicy
from kvtier.eviction.reuse import NEW, NUM_CLASSES, ReuseTable, class_of
from kvtier.keys import make_offload_key
from kvtier.testing.policies import PolicySuite, admit, keys_of

from .replay import Requests, replay


class TestPrefix(PolicySuite):
    def make_policy(self, capacity: int) -> PrefixPolicy:
        return PrefixPolicy(capacity)


def growing_sessions(num_live: int = 40, num_sessions: int = 120, seed: int = 2) -> Requests:
    """Sessions of 5 to 30 turns that share two blocks, grow by about three a turn, and interleave."""
    random, fresh = Random(seed), count(2)
    key = [make_offload_key(number.to_bytes(8, "big"), 0) for number in range(100_000)]
    queue = [(random.uniform(0, 60), index, list(range(2)), random.randint(5, 30)) for index in range(num_live)]
    queue.sort()
    started, requests = num_live, []
    while queue:
        now, index, numbers, turns = heappop(queue)
        numbers = [*numbers, *islice(fresh, 1 + int(random.expovariate(1 / 3)))]
        requests.append([key[number] for number in numbers])
        if turns > 1:
            heappush(queue, (now + 2 + random.expovariate(1 / 30), index, numbers, turns - 1))
        elif started < num_sessions:
            heappush(queue, (now + 1, started, list(range(2)), random.randint(5, 30)))
            started += 1
    return requests


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_growing_sessions_do_not_collapse(share: float) -> None:
    requests = growing_sessions()
    capacity = int(share * len({key for keys in requests for key in keys}))
    ours, lru = (replay(policy(capacity), requests) for policy in (PrefixPolicy, LRUPolicy))
    assert ours.hit_percent > lru.hit_percent - 2.0


def test_a_held_block_has_all_before_it() -> None:
    policy = PrefixPolicy(300)
    for number, keys in enumerate(growing_sessions()[:1200]):
        admit_prefix(policy, keys)
        if number % 50 == 0:
            policy.check_invariants()
            held = [key in policy for key in keys]
            assert held == sorted(held, reverse=True)


def admit_prefix(policy, keys):
    policy.touch([key for key in keys if key in policy])
    missing = [key for key in keys if key not in policy]
    own, wanted = set(keys), len(policy) + len(missing) - policy.capacity
    policy.evict(list(islice((key for key in policy.candidates(missing) if key not in own), max(0, wanted))))
    policy.insert(missing[: policy.capacity - len(policy)])


def test_it_learns_that_one_history_comes_back_and_another_does_not() -> None:
    policy, lru, fresh, random = PrefixPolicy(40), LRUPolicy(40), count(100), Random(4)
    for round_number in range(200):
        is_last = round_number == 199
        admit(policy, keys_of(0, 1, 2, 3))
        admit(lru, keys_of(0, 1, 2, 3))
        for _ in range(4 if is_last else random.randint(1, 6)):
            scan = keys_of(*islice(fresh, 16))
            admit(policy, scan)
            admit(lru, scan)
    assert all(key in policy for key in keys_of(0, 1, 2, 3))
    assert not any(key in lru for key in keys_of(0, 1, 2, 3))


def test_the_same_touch_at_once_is_one_use() -> None:
    policy = PrefixPolicy(8)
    policy.insert(keys_of(0, 1))
    policy.insert(keys_of(2))
    for _ in range(3):
        policy.touch(keys_of(0, 1))
    assert policy.uses_of(keys_of(0)[0]) == 2


def test_ghosts_remember_uses() -> None:
    policy = PrefixPolicy(4)
    policy.insert(keys_of(0, 1))
    policy.insert(keys_of(5))
    policy.touch(keys_of(0, 1))
    policy.evict(keys_of(1, 0, 5))
    policy.insert(keys_of(7))
    policy.insert(keys_of(0, 1, 2))
    assert [policy.uses_of(key) for key in keys_of(0, 1, 2)] == [3, 3, 1]


def test_what_is_taken_back_late_leaves_no_debt():
    table = ReuseTable(100)
    for _ in range(3):
        table.note_reached(NEW, 0, 20)
        for _ in range(20):
            table.learn()
        table.take_back(NEW, 20)
    assert table.reached[NEW][0] == 0
    table.learn()
    assert all(0 <= rank < 1 for rank in table.ranks[NEW])


def test_ranks_never_rise_with_age_nor_fall_with_uses() -> None:
    random, table = Random(3), ReuseTable(100)
    for _ in range(3000):
        kind, index = random.randrange(NUM_CLASSES), random.randrange(len(table.edges))
        table.note_reached(kind, index, random.randint(1, 30))
        table.note_used(kind, random.randrange(3000), random.randint(1, 8))
    table.learn()
    for row in table.ranks:
        assert row == sorted(row, reverse=True)
    used = [table.ranks[class_of(uses)] for uses in (2, 3, 4, 6, 11, 50)]
    for fewer, more in zip([table.ranks[NEW], *used], used, strict=False):
        assert all(low <= high for low, high in zip(fewer, more, strict=True))
