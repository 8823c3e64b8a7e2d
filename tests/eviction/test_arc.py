"""ARC: the suite, equality with the paper, and batches."""

from collections.abc import Sequence
from itertools import islice
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.eviction.arc import ARCPolicy
from kvtier.keys import OffloadKey
from kvtier.testing.policies import PolicySuite, admit, keys_of

from .textbook import TextbookARC


class TestARC(PolicySuite):
    def make_policy(self, capacity: int) -> ARCPolicy:
        return ARCPolicy(capacity)


def use(policy: ARCPolicy, key: OffloadKey) -> OffloadKey | None:
    """Use one key as a tier does; return the victim."""
    if key in policy:
        policy.touch([key])
        return None
    victims = list(islice(policy.candidates([key]), int(len(policy) == policy.capacity)))
    policy.evict(victims)
    policy.insert([key])
    return victims[0] if victims else None


def check_equals_textbook(capacity: int, trace: Sequence[int]) -> None:
    policy, textbook = ARCPolicy(capacity), TextbookARC(capacity)
    keys = dict(zip(range(max(trace, default=0) + 1), keys_of(*range(max(trace, default=0) + 1)), strict=True))
    for step, number in enumerate(trace):
        assert use(policy, keys[number]) == textbook.request(keys[number]), f"step {step}"
        assert policy.p == textbook.p, f"step {step}"
        policy.check_invariants()
    assert [key for key in keys.values() if key in policy] == [
        key for key in keys.values() if key in textbook.t1 or key in textbook.t2
    ]


@settings(max_examples=150)
@given(st.integers(1, 9), st.lists(st.integers(0, 20), max_size=150))
def test_single_keys_equal_the_paper(capacity: int, trace: list[int]) -> None:
    check_equals_textbook(capacity, trace)


@pytest.mark.parametrize("seed", range(4))
def test_a_long_skewed_trace_equals_the_paper(seed: int) -> None:
    random = Random(seed)
    trace = [int(random.paretovariate(0.7)) % 400 if random.random() < 0.8 else step % 300 for step in range(3000)]
    check_equals_textbook(50, trace)


@settings(max_examples=60)
@given(st.integers(1, 12), st.lists(st.lists(st.integers(0, 40), unique=True, max_size=12), max_size=40))
def test_batches_keep_the_bounds(capacity: int, batches: list[list[int]]) -> None:
    policy = ARCPolicy(capacity)
    for numbers in batches:
        admit(policy, keys_of(*numbers[:capacity]))


def test_a_scan_does_not_flush_what_is_used_again() -> None:
    policy = ARCPolicy(8)
    for _ in range(2):
        admit(policy, keys_of(0, 1, 2, 3))
    for start in range(100, 180, 4):
        admit(policy, keys_of(*range(start, start + 4)))
    assert all(key in policy for key in keys_of(0, 1, 2, 3))


def test_settle_counts_no_use() -> None:
    policy = ARCPolicy(8)
    policy.insert(keys_of(0))
    policy.insert(keys_of(1))
    policy.insert(keys_of(2))
    policy.touch(keys_of(2))
    policy.settle(keys_of(0, 1, 2))
    assert list(policy.candidates()) == keys_of(1, 0, 2)


def test_a_batch_of_one_call_is_its_keys_one_by_one_from_the_tail() -> None:
    batch, single = ARCPolicy(6), ARCPolicy(6)
    admit(batch, keys_of(0, 1, 2, 3, 4, 5))
    for number in (5, 4, 3, 2, 1, 0):
        admit(single, keys_of(number))
    batch.touch(keys_of(1, 4))
    single.touch(keys_of(4))
    single.touch(keys_of(1))
    victims = list(islice(batch.candidates(keys_of(6, 7, 8)), 3))
    assert victims == [use(single, key) for key in reversed(keys_of(6, 7, 8))]
