"""A policy whose methods take keys only stands wherever one that is told the time does."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from kvtier.abc import EvictionPolicy
from kvtier.eviction.lru import LRUPolicy
from kvtier.eviction.timeless import TimelessPolicy, with_time
from kvtier.keys import OffloadKey
from kvtier.primary.manager import CPUPrimaryTierOffloadingManager
from kvtier.testing.policies import PolicySuite, keys_of
from kvtier.tiering.manager import TieringOffloadingManager
from kvtier.types import ReqContext


class FifoPolicy(EvictionPolicy):
    """As users wrote policies before these were told the time."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._queue: dict[OffloadKey, None] = {}

    def insert(self, keys: Sequence[OffloadKey]) -> None:
        self._queue.update(dict.fromkeys(keys))

    def touch(self, keys: Sequence[OffloadKey]) -> None:
        pass

    def evict(self, keys: Sequence[OffloadKey]) -> None:
        self.remove(keys)

    def remove(self, keys: Sequence[OffloadKey]) -> None:
        for key in keys:
            del self._queue[key]

    def candidates(self, incoming: Sequence[OffloadKey] = ()) -> Iterator[OffloadKey]:
        return iter(self._queue)

    def clear(self) -> None:
        self._queue.clear()

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, key: object) -> bool:
        return key in self._queue


class ColdPolicy(LRUPolicy):
    """Takes the time in one method only."""

    def touch(self, keys: Sequence[OffloadKey]) -> None:
        pass


class LooksAtTheFirstKey(LRUPolicy):
    """Was always told a key before empty calls came with the time."""

    def insert(self, keys: Sequence[OffloadKey]) -> None:
        super().insert(keys)

    def touch(self, keys: Sequence[OffloadKey]) -> None:
        assert keys[0] is not None
        super().touch(keys)


class CompiledPolicy(LRUPolicy):
    """A method of compiled code may have no signature that Python can read; `max` has none, either."""

    touch = max


class TestTimeless(PolicySuite):
    tail_first = False

    def make_policy(self, capacity: int) -> FifoPolicy:
        return FifoPolicy(capacity)


def test_only_a_policy_that_takes_no_time_is_adapted() -> None:
    lru = LRUPolicy(4)
    assert with_time(lru) is lru
    assert isinstance(with_time(FifoPolicy(4)), TimelessPolicy)
    assert isinstance(with_time(ColdPolicy(4)), TimelessPolicy)
    assert isinstance(with_time(CompiledPolicy(4)), TimelessPolicy)


@pytest.mark.parametrize("kind", [FifoPolicy, LooksAtTheFirstKey, CompiledPolicy])
def test_a_manager_runs_with_it(kind: type[EvictionPolicy]) -> None:
    view = memoryview(np.zeros((4, 1), dtype=np.uint8))
    policy = kind(4)
    primary = CPUPrimaryTierOffloadingManager(4, view, policy)
    manager = TieringOffloadingManager(primary)
    for number in range(3):
        context = ReqContext(str(number))
        manager.on_new_request(context)
        stored = manager.prepare_store(keys_of(2 * number, 2 * number + 1), context)
        assert stored is not None
        manager.complete_store(stored.keys_to_store, context)
        manager.on_request_finished(context)
        manager.check_invariants()
    assert sorted(stored.evicted_keys) == keys_of(0, 1), "the first in go first"
    assert isinstance(primary.table.policy, TimelessPolicy)
    assert primary.table.policy.policy is policy, "no policy takes its place"
