"""W-TinyLFU: the suite, equality with the paper, and batches."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.eviction.tinylfu import TinyLFUPolicy
from kvtier.testing.policies import PolicySuite, admit, keys_of

from .one_by_one import check_equals, skewed_trace
from .textbook_filters import TextbookTinyLFU


class TestTinyLFU(PolicySuite):
    def make_policy(self, capacity: int) -> TinyLFUPolicy:
        return TinyLFUPolicy(capacity)


@settings(max_examples=150)
@given(st.integers(1, 12), st.lists(st.integers(0, 25), max_size=200))
def test_single_keys_equal_the_paper(capacity: int, trace: list[int]) -> None:
    check_equals(TinyLFUPolicy(capacity), TextbookTinyLFU(capacity), trace)


@pytest.mark.parametrize(("seed", "capacity"), [(0, 50), (1, 50), (2, 250)])
def test_a_long_skewed_trace_equals_the_paper(seed: int, capacity: int) -> None:
    check_equals(TinyLFUPolicy(capacity), TextbookTinyLFU(capacity), skewed_trace(seed))


def test_a_scan_does_not_flush_what_is_used_again() -> None:
    policy = TinyLFUPolicy(8)
    for _ in range(2):
        admit(policy, keys_of(0, 1, 2, 3))
    for number in range(100, 140):
        admit(policy, keys_of(number))
    assert all(key in policy for key in keys_of(0, 1, 2, 3))


def test_old_uses_lose_weight() -> None:
    policy = TinyLFUPolicy(8)
    for _ in range(15):
        admit(policy, keys_of(0, 1))
    for number in range(400):
        admit(policy, keys_of(10 + number % 9))
    assert not any(key in policy for key in keys_of(0, 1))
