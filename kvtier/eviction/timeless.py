"""Adapts policies whose `insert` and `touch` do not take the time of the request (`now`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence

from kvtier.abc import EvictionPolicy
from kvtier.key_tables import KeySlots
from kvtier.keys import OffloadKey


class TimelessPolicy(EvictionPolicy):
    """Passes every call to `policy`, without `now`."""

    def __init__(self, policy: EvictionPolicy) -> None:
        super().__init__(policy.capacity)
        self.policy = policy

    @property
    def may_decline(self) -> bool:
        return self.policy.may_decline

    @may_decline.setter
    def may_decline(self, value: bool) -> None:
        self.policy.may_decline = value

    @property
    def num_evictable(self) -> Callable[[Sequence[OffloadKey]], int]:
        return self.policy.num_evictable

    @num_evictable.setter
    def num_evictable(self, value: Callable[[Sequence[OffloadKey]], int]) -> None:
        self.policy.num_evictable = value

    def use_slots(self, slots: KeySlots) -> None:
        self.policy.use_slots(slots)

    def insert(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        self.policy.insert(keys)

    def touch(self, keys: Sequence[OffloadKey], now: float = 0.0) -> bool | None:
        return self.policy.touch(keys) if keys else None  # a call without keys only tells the time

    def evict(self, keys: Sequence[OffloadKey]) -> None:
        self.policy.evict(keys)

    def remove(self, keys: Sequence[OffloadKey]) -> None:
        self.policy.remove(keys)

    def candidates(self, incoming: Sequence[OffloadKey] = ()) -> Iterator[OffloadKey]:
        return self.policy.candidates(incoming)

    def settle(self, keys: Sequence[OffloadKey]) -> None:
        self.policy.settle(keys)

    def line_up(self, keys: Sequence[OffloadKey]) -> None:
        self.policy.line_up(keys)

    def clear(self) -> None:
        self.policy.clear()

    def __len__(self) -> int:
        return len(self.policy)

    def __contains__(self, key: object) -> bool:
        return key in self.policy

    def check_invariants(self) -> None:
        self.policy.check_invariants()


def empty_like(policy: EvictionPolicy) -> EvictionPolicy:
    """Return an empty policy of the same kind and capacity."""
    kind = type(policy.policy if isinstance(policy, TimelessPolicy) else policy)
    return with_time(kind(policy.capacity))


def with_time(policy: EvictionPolicy) -> EvictionPolicy:
    """Return `policy`, or an adapter around it unless its `insert` and `touch` are known to take the time."""
    try:
        for method in (policy.insert, policy.touch):
            inspect.signature(method).bind((), 0.0)
    except (TypeError, ValueError):  # ValueError: compiled code may have no signature
        return TimelessPolicy(policy)
    return policy
