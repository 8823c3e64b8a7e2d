"""Prefix: the suite, what it knows of chains, and sessions that grow."""

from kvtier.eviction.prefix import PrefixPolicy
from kvtier.testing.policies import PolicySuite


class TestPrefix(PolicySuite):
    def make_policy(self, capacity: int) -> PrefixPolicy:
        return PrefixPolicy(capacity)
