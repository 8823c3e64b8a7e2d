"""The policy suite catches policies that break their contract, each in one way."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import pytest

from kvtier.errors import InvariantError
from kvtier.eviction.arc import ARCPolicy
from kvtier.eviction.lru import LRUPolicy
from kvtier.keys import OffloadKey
from kvtier.testing.policies import PolicySuite, keys_of


class ForgetsAKey(LRUPolicy):
    def insert(self, keys: Sequence[OffloadKey]) -> None:
        super().insert(keys[:2])


class ForgetsWhenTouched(LRUPolicy):
    def touch(self, keys: Sequence[OffloadKey]) -> None:
        self.evict([key for key in keys if key in self])


class YieldsAKeyTwice(LRUPolicy):
    def candidates(self, incoming: Sequence[OffloadKey] = ()) -> Iterator[OffloadKey]:
        held = list(super().candidates(incoming))
        return iter(held[:1] + held)


class YieldsAForeignKey(LRUPolicy):
    def candidates(self, incoming: Sequence[OffloadKey] = ()) -> Iterator[OffloadKey]:
        yield from incoming
        yield from super().candidates(incoming)


class HidesAKey(LRUPolicy):
    def candidates(self, incoming: Sequence[OffloadKey] = ()) -> Iterator[OffloadKey]:
        return iter(list(super().candidates(incoming))[:2])


class RotatesInCandidates(LRUPolicy):
    def candidates(self, incoming: Sequence[OffloadKey] = ()) -> Iterator[OffloadKey]:
        held = list(super().candidates(incoming))
        self.touch(held[:1])
        return iter(held)


class HoldsWhatIsTouched(LRUPolicy):
    def touch(self, keys: Sequence[OffloadKey]) -> None:
        self.insert([key for key in keys if key not in self])
        super().touch(keys)


class RaisesOnUnknownTouch(LRUPolicy):
    def touch(self, keys: Sequence[OffloadKey]) -> None:
        if not all(map(self.__contains__, keys)):
            raise KeyError("a key that is not held")
        super().touch(keys)


class HeadFirst(LRUPolicy):
    def insert(self, keys: Sequence[OffloadKey]) -> None:
        super().insert(keys[::-1])


class UnboundedGhosts(LRUPolicy):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._ghosts: OrderedDict[OffloadKey, None] = OrderedDict()

    def evict(self, keys: Sequence[OffloadKey]) -> None:
        super().evict(keys)
        self._ghosts.update(dict.fromkeys(keys))

    def remove(self, keys: Sequence[OffloadKey]) -> None:
        super().evict(keys)


class RemembersTheRemoved(ARCPolicy):
    def remove(self, keys: Sequence[OffloadKey]) -> None:
        self.evict(keys)


class KeepsGhostsWhenCleared(ARCPolicy):
    def clear(self) -> None:
        self._t1.clear()
        self._t2.clear()


class MiscountsItself(LRUPolicy):
    def __len__(self) -> int:
        return super().__len__() + 1


class BreaksItsInvariants(LRUPolicy):
    def check_invariants(self) -> None:
        if len(self) > 3:
            raise InvariantError("more than three")


BROKEN = [
    ForgetsAKey,
    ForgetsWhenTouched,
    YieldsAKeyTwice,
    YieldsAForeignKey,
    HidesAKey,
    RotatesInCandidates,
    HoldsWhatIsTouched,
    RaisesOnUnknownTouch,
    HeadFirst,
    UnboundedGhosts,
    RemembersTheRemoved,
    KeepsGhostsWhenCleared,
    MiscountsItself,
    BreaksItsInvariants,
]

HISTORIES = {"test_any_history_agrees_with_a_set", "test_requests_with_pinned_blocks_never_make_it_raise"}


def failed_tests(policy_class: type[LRUPolicy | ARCPolicy]) -> list[str]:
    """Run the tests of single calls; return the names of those that failed."""

    class Suite(PolicySuite):
        def make_policy(self, capacity: int) -> LRUPolicy | ARCPolicy:
            return policy_class(capacity)

    failed = []
    for name in [name for name in dir(Suite) if name.startswith("test_") and name not in HISTORIES]:
        try:
            getattr(Suite(), name)()
        except (AssertionError, KeyError):
            failed.append(name)
    return failed


@pytest.mark.parametrize("policy_class", BROKEN)
def test_a_broken_policy_fails(policy_class: type[LRUPolicy | ARCPolicy]) -> None:
    assert failed_tests(policy_class)


@pytest.mark.parametrize("policy_class", [LRUPolicy, ARCPolicy])
def test_a_sound_policy_passes(policy_class: type[LRUPolicy | ARCPolicy]) -> None:
    assert failed_tests(policy_class) == []


def test_histories_find_what_single_calls_do_not() -> None:
    class ForgetsSomeSettledKeys(LRUPolicy):
        def settle(self, keys: Sequence[OffloadKey]) -> None:
            super().settle(keys)
            self.evict([key for key in keys[:1] if key in self and key not in keys_of(4)])

    class Suite(PolicySuite):
        def make_policy(self, capacity: int) -> ForgetsSomeSettledKeys:
            return ForgetsSomeSettledKeys(capacity)

    assert failed_tests(ForgetsSomeSettledKeys) == []
    with pytest.raises(AssertionError):
        Suite().run_history(4, [("insert", [0, 1, 2]), ("touch", [2]), ("settle", [1, 2])])
    with pytest.raises(InvariantError):
        Suite().test_requests_with_pinned_blocks_never_make_it_raise()
