"""S3-FIFO: the suite, equality with the paper, and batches."""

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.eviction.s3fifo import S3FIFOPolicy
from kvtier.testing.policies import PolicySuite, admit, keys_of

from .one_by_one import check_equals, skewed_trace
from .textbook_filters import TextbookS3FIFO


class TestS3FIFO(PolicySuite):
    def make_policy(self, capacity: int) -> S3FIFOPolicy:
        return S3FIFOPolicy(capacity)


@settings(max_examples=150)
@given(st.integers(1, 25), st.lists(st.integers(0, 35), max_size=150))
def test_single_keys_equal_the_paper(capacity: int, trace: list[int]) -> None:
    check_equals(S3FIFOPolicy(capacity), TextbookS3FIFO(capacity), trace)


@pytest.mark.parametrize("seed", range(3))
def test_a_long_skewed_trace_equals_the_paper(seed: int) -> None:
    check_equals(S3FIFOPolicy(50), TextbookS3FIFO(50), skewed_trace(seed))


def test_a_scan_does_not_flush_what_is_used_again() -> None:
    policy = S3FIFOPolicy(20)
    for _ in range(2):
        admit(policy, keys_of(0, 1, 2, 3))
    for start in range(100, 300, 4):
        admit(policy, keys_of(*range(start, start + 4)))
    assert all(key in policy for key in keys_of(0, 1, 2, 3))


def test_a_batch_takes_its_victims_from_the_small_queue_that_it_fills_again() -> None:
    policy = S3FIFOPolicy(20)
    for _ in range(2):
        admit(policy, keys_of(*range(10)))
    admit(policy, keys_of(*range(20, 30)))
    assert set(islice(policy.candidates(keys_of(*range(40, 50))), 10)) == set(keys_of(*range(20, 30)))


def test_victims_that_the_caller_cannot_take_keep_their_place() -> None:
    policy = S3FIFOPolicy(20)
    policy.insert(keys_of(0, 1, 2, 3))
    policy.evict(keys_of(1))
    policy.check_invariants()
    assert list(policy.candidates()) == keys_of(3, 2, 0)


def test_a_key_that_is_not_held_is_refused_as_a_victim() -> None:
    policy = S3FIFOPolicy(20)
    policy.insert(keys_of(0, 1, 2, 3))
    policy.touch(keys_of(0, 1))
    with pytest.raises(KeyError):
        policy.evict(keys_of(3, 4))
