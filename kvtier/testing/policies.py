"""The conformance suite for eviction policies. Derive a test class from it for your own policy:

class TestMine(PolicySuite):
    def make_policy(self, capacity):
        return MyPolicy(capacity)
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Sequence
from itertools import islice
from random import Random
from typing import ClassVar

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.abc import EvictionPolicy
from kvtier.eviction.timeless import with_time
from kvtier.keys import OffloadKey, make_offload_key
from kvtier.primary.table import BlockTable

Steps = Sequence[tuple[str, Sequence[int]]]
"""Calls, each with the numbers of its keys. Keys that a call may not name are left out."""

_STEPS = st.lists(
    st.tuples(
        st.sampled_from(("insert", "insert", "touch", "evict", "remove", "settle", "clear")),
        st.lists(st.integers(0, 11), unique=True, max_size=6),
    ),
    min_size=8,  # without it most histories are too short to fill a policy
    max_size=40,
)


class PolicySuite:
    """Derive from it, define `make_policy`, and let pytest collect the class.

    Attributes:
        tail_first: whether, of the keys of one `insert`, `touch` or `settle`, the last are evicted first. False for a
            policy that ignores recency.
    """

    tail_first: ClassVar[bool] = True

    def make_policy(self, capacity: int) -> EvictionPolicy:
        """Return a new, empty policy for at most `capacity` keys."""
        raise NotImplementedError

    def _make(self, capacity: int) -> EvictionPolicy:
        return with_time(self.make_policy(capacity))

    def test_a_new_policy_holds_nothing(self) -> None:
        """Empty: no length, no member, no candidate."""
        policy = self._make(4)
        assert policy.capacity == 4
        check_holds(policy, [], absent=keys_of(0, 1))

    def test_holds_exactly_what_was_inserted(self) -> None:
        """Every inserted key is held, no other."""
        policy = self._make(8)
        policy.insert(keys_of(0, 1, 2), 1.0)
        check_holds(policy, keys_of(0, 1, 2), absent=keys_of(3))
        policy.insert(keys_of(3), 2.0)
        check_holds(policy, keys_of(0, 1, 2, 3), absent=keys_of(4))

    def test_empty_calls_change_nothing(self) -> None:
        """A call may name no key at all."""
        policy = self._make(4)
        policy.insert(keys_of(0, 1), 0.5)
        order = list(policy.candidates())
        policy.insert((), 1.0)
        policy.touch((), 2.0)
        for call in (policy.evict, policy.remove, policy.settle):
            call(())
        assert list(policy.candidates()) == order
        check_holds(policy, keys_of(0, 1))

    def test_candidates_change_nothing(self) -> None:
        """Iterated again, half way or with other incoming keys, the order is the same."""
        policy = self._make(6)
        policy.insert(keys_of(0, 1, 2, 3), 1.0)
        policy.touch(keys_of(1), 2.0)
        policy.evict(list(islice(policy.candidates(), 1)))
        incoming = keys_of(*range(8))
        missing = [key for key in incoming if key not in policy]
        plain, primed = list(policy.candidates()), list(policy.candidates(missing))
        list(islice(policy.candidates(missing), 2))
        assert list(policy.candidates()) == plain
        assert list(policy.candidates(missing)) == primed
        assert Counter(primed) <= Counter(plain)
        check_holds(policy, plain)

    def test_touch_ignores_keys_not_held(self) -> None:
        """A touch neither adds a key nor fails, and counts for the others of its call."""
        policy = self._make(4)
        policy.insert(keys_of(0, 1, 2), 1.0)
        policy.touch(keys_of(7, 1, 8), 2.0)
        policy.settle(keys_of(9, 2))
        check_holds(policy, keys_of(0, 1, 2), absent=keys_of(7, 8, 9))

    def test_evicted_and_removed_keys_are_gone(self) -> None:
        """Neither is held; both may come back."""
        policy = self._make(4)
        policy.insert(keys_of(0, 1, 2, 3), 1.0)
        policy.remove(keys_of(2))
        victim = next(policy.candidates())
        policy.evict([victim])
        left = [key for key in keys_of(0, 1, 3) if key != victim]
        check_holds(policy, left, absent=[*keys_of(2), victim])
        policy.insert([*keys_of(2), victim], 2.0)
        check_holds(policy, [*left, *keys_of(2), victim])

    def test_removed_keys_leave_no_trace(self) -> None:
        """A policy that held and removed keys behaves like one that never saw them."""
        marked, fresh = self._make(4), self._make(4)
        marked.insert(keys_of(10, 11, 12), 1.0)
        marked.touch(keys_of(11), 2.0)
        marked.remove(keys_of(11, 10, 12))
        for policy in (marked, fresh):
            for now, numbers in enumerate(((0, 1), (10, 2), (11,), (12, 3, 4)), 4):
                admit(policy, keys_of(*numbers), now)
        assert list(marked.candidates(keys_of(5))) == list(fresh.candidates(keys_of(5)))

    def test_clear_forgets_everything(self) -> None:
        """After `clear` a policy behaves like a new one."""
        used, fresh = self._make(4), self._make(4)
        for number in range(24):
            admit(used, keys_of(*{number % 3, number % 8}), number)
        used.clear()
        check_holds(used, [], absent=keys_of(*range(8)))
        for number in range(24):
            for policy in (used, fresh):
                admit(policy, keys_of(*{number % 3, number % 8}), number)
            assert list(used.candidates(keys_of(99))) == list(fresh.candidates(keys_of(99)))

    def test_equal_histories_give_equal_orders(self) -> None:
        """No randomness and no dependence on object identity."""
        orders = []
        for _ in range(2):
            policy = self._make(6)
            for number in range(60):
                admit(policy, keys_of(number * number % 11, 11 + number % 4), number)
            orders.append(list(policy.candidates(keys_of(99))))
        assert orders[0] == orders[1]

    def test_tail_goes_before_head(self) -> None:
        """Within the keys of one call the last are the better victims."""
        if not self.tail_first:
            return
        policy = self._make(8)
        policy.insert(keys_of(0, 1, 2, 3), 1.0)
        assert list(policy.candidates()) == keys_of(3, 2, 1, 0)
        policy.touch(keys_of(0, 1, 2, 3), 2.0)
        assert list(policy.candidates()) == keys_of(3, 2, 1, 0)
        policy.remove(keys_of(0, 1, 2, 3))
        for number in (4, 5, 6):
            policy.insert(keys_of(number), float(number))
        policy.settle(keys_of(4, 5, 6))
        assert list(policy.candidates()) == keys_of(6, 5, 4)

    def test_churn_keeps_memory_bounded(self) -> None:
        """The memory of evicted keys is bounded by a small multiple of the capacity."""
        policy = self._make(16)
        size = 0
        for round_number in range(240):
            admit(policy, keys_of(*range(round_number * 8, round_number * 8 + 8)), 2 * round_number)
            admit(policy, keys_of(*range(round_number * 4, round_number * 4 + 2)), 2 * round_number + 1)
            if round_number == 80:
                size = _reachable_keys(policy)
        assert len(policy) == 16
        assert _reachable_keys(policy) <= max(size, 8 * policy.capacity) + policy.capacity

    @settings(
        max_examples=100,
        deadline=None,
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
    )
    @given(capacity=st.integers(1, 8), steps=_STEPS)
    def test_any_history_agrees_with_a_set(self, capacity: int, steps: Steps) -> None:
        """After each of some random calls, the policy holds the same keys as a set."""
        self.run_history(capacity, steps)

    def test_requests_with_pinned_blocks_never_make_it_raise(self) -> None:
        """Pinned blocks stay while their neighbours are evicted, so chains have holes that later requests fill."""
        for seed in range(8):
            random, now, pins = Random(seed), 0.0, deque[list[int]]()
            policy = self._make(24)
            table = BlockTable(policy.capacity, policy)
            chains = [keys_of(*range(100 * number, 100 * number + 12)) for number in range(6)]
            for _ in range(200):
                now += random.choice((0.001, 0.1, 3.0, 50.0))
                keys = random.choice(chains)[: random.randint(1, 12)]
                table.touch([key for key in keys if key in table], now)
                slots = table.apply(table.plan(keys), now)
                table.publish(slots)
                pins.append(random.sample(slots, min(random.randint(0, 3), len(slots))))
                table.pin(pins[-1])
                if len(pins) > 5:
                    table.unpin(pins.popleft())
                if random.random() < 0.8:
                    table.settle(keys)
                assert table.policy is policy, f"seed {seed}: it raised, and LRU took its place"
                table.check_invariants()

    def run_history(self, capacity: int, steps: Steps) -> None:
        """Make the calls, and compare with a set after each. Use it to keep a history as a test of its own."""
        policy, held = self._make(capacity), set[OffloadKey]()
        for now, (call, numbers) in enumerate(steps):
            self._apply(policy, held, call, keys_of(*numbers), now)
            check_holds(policy, sorted(held), absent=[key for key in keys_of(*range(12)) if key not in held])

    def _apply(
        self, policy: EvictionPolicy, held: set[OffloadKey], call: str, keys: list[OffloadKey], now: float
    ) -> None:
        """Make one call on the policy and on the set."""
        if call == "insert":
            missing = [key for key in keys if key not in held][: policy.capacity]
            held.difference_update(make_room(policy, missing))
            missing = missing[: policy.capacity - len(policy)]
            policy.insert(missing, now)
            held.update(missing)
        elif call == "evict":
            victims = list(islice(policy.candidates(), len(keys)))
            policy.evict(victims)
            held.difference_update(victims)
        elif call == "remove":
            named = [key for key in keys if key in held]
            policy.remove(named)
            held.difference_update(named)
        elif call == "clear":
            policy.clear()
            held.clear()
        elif call == "touch":
            policy.touch(keys, now)
        else:
            policy.settle(keys)


def keys_of(*numbers: int) -> list[OffloadKey]:
    """Return one key per number; equal numbers give equal keys."""
    return [make_offload_key(number.to_bytes(8, "big"), 0) for number in numbers]


def make_room(policy: EvictionPolicy, incoming: Sequence[OffloadKey]) -> list[OffloadKey]:
    """Evict enough keys for `incoming`, as a tier does; return the victims."""
    wanted = len(policy) + len(incoming) - policy.capacity
    victims = list(islice(policy.candidates(incoming), max(0, wanted)))
    policy.evict(victims)
    return victims


def admit(policy: EvictionPolicy, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
    """Use `keys` as a tier does for a request at time `now`: touch the held ones, insert others if there is room."""
    missing = [key for key in keys if key not in policy]
    policy.touch([key for key in keys if key in policy], now)
    make_room(policy, missing)
    policy.insert(missing[: policy.capacity - len(policy)], now)
    policy.check_invariants()


def check_holds(policy: EvictionPolicy, keys: Sequence[OffloadKey], absent: Sequence[OffloadKey] = ()) -> None:
    """Assert that the policy holds exactly `keys`, by all of its methods, and that its invariants hold."""
    assert len(policy) == len(keys)
    assert all(key in policy for key in keys)
    assert not any(key in policy for key in absent)
    assert Counter(policy.candidates()) == Counter(keys)
    assert Counter(policy.candidates(absent)) <= Counter(keys)
    policy.check_invariants()


def _reachable_keys(policy: EvictionPolicy) -> int:
    """Count the bytes objects that can be reached from the policy's attributes."""
    seen: set[int] = set()
    count, todo = 0, list[object]([policy])
    while todo:
        found = todo.pop()
        if id(found) in seen or isinstance(found, type | str | int | float) or callable(found):
            continue
        seen.add(id(found))
        if isinstance(found, bytes):
            count += 1
        elif isinstance(found, dict):
            todo.extend(found.keys())
            todo.extend(found.values())
        elif sys.getsizeof(found) and hasattr(found, "__iter__") and found is not policy:
            todo.extend(found)
        todo.extend(vars(found).values() if hasattr(found, "__dict__") else ())
    return count
