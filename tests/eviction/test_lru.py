"""LRU: the suite, and the order in detail."""

from kvtier.eviction.lru import LRUPolicy
from kvtier.testing.policies import PolicySuite, keys_of


class TestLRU(PolicySuite):
    def make_policy(self, capacity: int) -> LRUPolicy:
        return LRUPolicy(capacity)


def test_a_prefix_is_eaten_from_its_end() -> None:
    policy = LRUPolicy(6)
    policy.insert(keys_of(0, 1, 2))
    policy.insert(keys_of(3, 4, 5))
    policy.touch(keys_of(0, 1))
    assert list(policy.candidates()) == keys_of(2, 5, 4, 3, 1, 0)


def test_settle_orders_a_use_that_came_in_parts() -> None:
    policy = LRUPolicy(6)
    policy.insert(keys_of(0, 1))
    policy.insert(keys_of(2))
    policy.insert(keys_of(9))
    policy.settle(keys_of(0, 1, 2))
    assert list(policy.candidates()) == keys_of(9, 2, 1, 0)
