"""Retention: the suite around a policy that nobody gives a hint, and what hints do to the order of victims."""

import random
from itertools import islice

import pytest

from kvtier import key_tables
from kvtier.eviction.lru import LRUPolicy
from kvtier.eviction.prefix import PrefixPolicy
from kvtier.eviction.retention import MAX_ENDED, RetentionPolicy
from kvtier.eviction.s3fifo import S3FIFOPolicy
from kvtier.hints import NO_HINT, Hint, Priority
from kvtier.primary.retention import Retention
from kvtier.primary.table import BlockTable
from kvtier.primary.transit import Declining
from kvtier.primary.uses import RequestUses
from kvtier.testing.clock import ManualClock
from kvtier.testing.policies import PolicySuite, keys_of

KEEP = Hint(retain=600)
HIGH, LOW = Hint(priority=Priority.HIGH), Hint(priority=Priority.LOW)


class TestWithoutHints(PolicySuite):
    def make_policy(self, capacity: int) -> RetentionPolicy:
        return RetentionPolicy(LRUPolicy(capacity))


class TestUnderOneHint(PolicySuite):
    def make_policy(self, capacity: int) -> RetentionPolicy:
        policy = RetentionPolicy(LRUPolicy(capacity), share=0.5)
        policy.serve(HIGH, "all", 0.0)
        return policy


class Served:
    """A policy that is told which request each call is for."""

    def __init__(self, capacity=20, share=0.25, inner=LRUPolicy):
        self.policy, self.now = RetentionPolicy(inner(capacity), share), 0.0

    def _serve(self, hint, request):
        self.policy.serve(hint, request, self.now)

    def insert(self, *numbers, hint=NO_HINT, request="r"):
        self._serve(hint, request)
        self.policy.insert(keys_of(*numbers))
        self.policy.check_invariants()

    def touch(self, *numbers, hint=NO_HINT, request="r"):
        self._serve(hint, request)
        self.policy.touch(keys_of(*numbers))
        self.policy.check_invariants()

    def settle(self, *numbers, hint=NO_HINT, request="r"):
        self._serve(hint, request)
        self.policy.settle(keys_of(*numbers))
        self.policy.check_invariants()

    def victims(self, hint=NO_HINT):
        """Return who gives way for a block that comes, in order."""
        self._serve(hint, "asks")
        self.policy.check_invariants()
        known = {key: number for number, key in enumerate(keys_of(*range(100)))}
        return [known[key] for key in self.policy.candidates(keys_of(99))]


def test_low_priority_gives_way_first_and_high_priority_last():
    served = Served()
    served.insert(0, 1, hint=HIGH)
    served.insert(2, 3)
    served.insert(4, 5, hint=LOW)
    assert served.victims() == [5, 4, 3, 2, 1, 0]


def test_a_kept_block_is_no_victim_until_its_time_is_over_and_then_the_first():
    served = Served()
    served.insert(0, 1, hint=KEEP)
    served.insert(2)
    served.insert(3, hint=LOW)
    assert served.victims() == [3, 2]
    served.now = 599
    assert served.victims() == [3, 2]
    served.now = 602
    assert served.victims() == [1, 0, 3, 2]


def test_a_use_by_its_caller_begins_the_time_anew():
    served = Served()
    served.insert(0, 1, hint=KEEP)
    served.now = 500
    served.touch(0, hint=KEEP)
    served.now = 900
    assert served.victims() == [1]
    served.settle(0, hint=KEEP)
    served.now = 1400
    assert served.victims() == [1]
    served.now = 1600
    assert served.victims() == [1, 0]


def test_no_more_than_a_share_is_kept_the_head_first():
    served = Served(capacity=20, share=0.25)
    served.insert(*range(8), hint=KEEP)
    assert served.policy.num_kept == 5
    assert served.victims() == [7, 6, 5]
    served.insert(10, hint=Hint(retain=600, priority=Priority.HIGH))
    assert served.victims() == [7, 6, 5, 10]


def test_priority_lasts_as_long_as_the_time_that_comes_with_it():
    served = Served(share=0)
    served.insert(0, hint=Hint(retain=600, priority=Priority.HIGH))
    served.insert(1)
    assert served.victims() == [1, 0]
    served.now = 602
    assert served.victims() == [0, 1]


def test_what_others_use_stays_the_policys_when_the_time_is_over():
    served = Served()
    served.insert(0, 1, hint=KEEP)
    served.touch(0)
    served.insert(2)
    served.now = 602
    assert served.victims() == [1, 2, 0]


def test_a_use_raises_a_block_and_never_lowers_it():
    served = Served()
    served.insert(0, 1, 2, hint=LOW)
    served.touch(0)
    served.touch(1, hint=HIGH)
    served.insert(3)
    served.touch(3, hint=LOW)
    served.touch(1, hint=LOW)
    assert served.victims() == [2, 0, 3, 1]


def test_an_ended_session_frees_what_only_it_has_used():
    served, session = Served(), Hint(session="s", retain=600)
    served.insert(0)
    served.insert(1, 2, 3, hint=session)
    served.touch(0, 1, 2, 3, hint=session, request="second turn")
    served.touch(1, request="somebody else")
    served.insert(9)
    assert served.victims() == [9]
    served.settle(0, 1, 2, 3, hint=Hint(session="s", ended=True), request="last turn")
    assert served.victims() == [3, 2, 9]
    served.now = 602
    assert served.victims() == [3, 2, 9, 1, 0]


def test_a_session_of_the_same_name_of_another_tenant_ends_nothing():
    served = Served()
    served.insert(0)
    served.insert(1, 2, hint=Hint(session="s", tenant="a"))
    served.settle(1, 2, hint=Hint(session="s", tenant="a"))
    for other in (Hint(session="s", ended=True, tenant="b"), Hint(session="s", ended=True)):
        served.settle(hint=other)
        assert served.victims() == [0, 2, 1]
    served.settle(hint=Hint(session="s", ended=True, tenant="a"))
    assert served.victims() == [2, 1, 0]


def test_a_request_that_ends_its_session_without_a_name_frees_its_own_blocks():
    served, over = Served(), Hint(ended=True)
    served.insert(0)
    served.insert(1, 2, hint=over, request="a")
    served.insert(3, hint=over, request="b")
    served.settle(0, 1, 2, hint=over, request="a")
    assert served.victims() == [2, 1, 3, 0]
    served.touch(1)
    assert served.victims() == [2, 3, 0, 1]


class Declines(LRUPolicy):
    """Values what it has above all that comes."""

    def candidates(self, incoming=()):
        return islice(super().candidates(incoming), 0 if incoming else None)


def test_a_policy_that_declines_what_comes_gives_no_high_priority_block_for_it():
    served = Served(inner=Declines)
    served.insert(0, hint=HIGH)
    served.insert(1)
    served.insert(2, hint=LOW)
    assert served.victims() == [2]
    assert served.victims(hint=HIGH) == [2, 1, 0]


@pytest.mark.parametrize("declining", Declining)
@pytest.mark.parametrize("quotas", [False, True])
@pytest.mark.parametrize("inner", [LRUPolicy, PrefixPolicy])
def test_high_priority_blocks_give_way_if_a_job_uses_what_would_go_before_them(inner, quotas, declining):
    """A policy that ends early because its blocks are in use declines nothing."""
    table, retention = BlockTable(20, inner(20)), Retention(ManualClock(), quotas=quotas)
    high, normal, incoming = (keys_of(*range(start, start + 10)) for start in (0, 10, 20))
    for now, (keys, hint) in enumerate(((high, HIGH), (normal, NO_HINT))):
        retention.serve(table, RequestUses(now, str(now), hint))
        table.publish(table.apply(table.plan(keys), now))
        table.settle(keys)
    table.pin([table.slot_of[normal[-1]]])
    retention.serve(table, RequestUses(2.0, "incoming"))
    assert table.plan(incoming, declining=declining).num_left_out == 0
    assert set(high) <= set(table.pick_victims(20, (), ()))


@pytest.mark.parametrize("inner", [LRUPolicy, S3FIFOPolicy, PrefixPolicy])
@pytest.mark.parametrize(("seed", "most_in_one"), [*((seed, 65_536) for seed in range(6)), (6, 0)])
def test_any_history_keeps_each_block_in_one_place(inner, seed, most_in_one, monkeypatch):
    monkeypatch.setattr(key_tables, "MOST_IN_ONE", most_in_one)
    rng, held = random.Random(seed), {}
    served = Served(capacity=40, share=0.3, inner=inner)
    policy = served.policy
    hints = [NO_HINT, HIGH, LOW, KEEP, Hint(retain=5, priority=Priority.HIGH), Hint(session="a", retain=9)]
    hints += [Hint(session="b"), Hint(session="a", ended=True), Hint(ended=True)]
    for _ in range(600):
        served.now += rng.random() * 3
        policy.serve(rng.choice(hints), rng.choice("xyz"), served.now)
        keys = keys_of(*rng.sample(range(80), rng.randrange(1, 9)))
        call = rng.choice(["insert", "touch", "settle", "remove"])
        if call == "insert":
            keys = [key for key in keys if key not in held]
            wanted = max(0, len(held) + len(keys) - policy.capacity)
            victims = list(islice(policy.candidates(keys), wanted))
            policy.evict(victims)
            for key in victims:
                del held[key]
            keys = keys[: policy.capacity - len(held)]
            policy.insert(keys)
            held.update(dict.fromkeys(keys))
        elif call == "remove":
            keys = [key for key in keys if key in held]
            policy.remove(keys)
            for key in keys:
                del held[key]
        else:
            getattr(policy, call)(keys)
        policy.check_invariants()
        assert len(policy) == len(held)
        assert set(policy.candidates()) == set(held)


def test_what_ends_at_once_in_large_numbers_ends_in_parts():
    served = Served(capacity=8000, share=0.5)
    served.insert(*range(3000), hint=Hint(session="s", retain=600))
    served.insert(*range(3000, 4000), hint=KEEP)
    served.settle(hint=Hint(session="s", ended=True))
    freed = [0, len(list(served.policy.candidates(keys_of(9000))))]
    while freed[-2] < freed[-1]:
        assert freed[-1] - freed[-2] <= MAX_ENDED
        served.touch(9000)
        freed.append(len(list(served.policy.candidates(keys_of(9000)))))
    assert freed[-1] == 3000
    served.now = 602
    kept = [served.policy.num_kept]
    while kept[-1]:
        served.touch(9000)
        kept.append(served.policy.num_kept)
        assert kept[-2] - MAX_ENDED <= kept[-1] < kept[-2]


def test_a_session_that_comes_again_keeps_what_it_brings_then():
    served = Served(capacity=8000)
    served.insert(*range(3000), hint=Hint(session="s"))
    served.settle(hint=Hint(session="s", ended=True))
    served.insert(4000, hint=Hint(session="s"))
    for _ in range(3000 // MAX_ENDED + 1):
        served.touch(9000)
    assert list(served.policy.candidates(keys_of(9000)))[-1] == keys_of(4000)[0]
    served.touch(5, hint=Hint(session="s"))
    served.settle(hint=Hint(session="s", ended=True))
    assert list(served.policy.candidates(keys_of(9000)))[-1] == keys_of(5)[0]
