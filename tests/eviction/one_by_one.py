"""Holds a policy to a textbook: one key at a time, the same victims."""

from collections.abc import Sequence
from itertools import islice
from random import Random
from typing import Protocol

from kvtier.abc import EvictionPolicy
from kvtier.keys import OffloadKey
from kvtier.testing.policies import keys_of


class Textbook(Protocol):
    def __contains__(self, x: OffloadKey) -> bool: ...

    def request(self, x: OffloadKey) -> OffloadKey | None: ...


def use(policy: EvictionPolicy, key: OffloadKey) -> OffloadKey | None:
    """Use one key as a tier does; return the victim."""
    if key in policy:
        policy.touch([key])
        return None
    victims = list(islice(policy.candidates([key]), int(len(policy) == policy.capacity)))
    policy.evict(victims)
    policy.insert([key])
    return victims[0] if victims else None


def check_equals(policy: EvictionPolicy, textbook: Textbook, trace: Sequence[int]) -> None:
    keys = keys_of(*range(max(trace, default=0) + 1))
    for step, number in enumerate(trace):
        assert use(policy, keys[number]) == textbook.request(keys[number]), f"step {step}"
        policy.check_invariants()
    assert [key for key in keys if key in policy] == [key for key in keys if key in textbook]


def skewed_trace(seed: int, length: int = 3000) -> list[int]:
    random = Random(seed)
    return [int(random.paretovariate(0.7)) % 400 if random.random() < 0.8 else step % 300 for step in range(length)]
