"""Quotas: the suite for one tenant and for many, and who gives way to whom."""

import gc
import random
from itertools import islice
from weakref import WeakSet

import pytest

from kvtier import key_tables
from kvtier.eviction.arc import ARCPolicy
from kvtier.eviction.lru import LRUPolicy
from kvtier.eviction.prefix import PrefixPolicy
from kvtier.eviction.retention import MAX_ENDED, RetentionPolicy
from kvtier.eviction.s3fifo import S3FIFOPolicy
from kvtier.eviction.tenants import IDLE_SECONDS, MAX_TENANTS, TenantPolicy
from kvtier.eviction.tinylfu import TinyLFUPolicy
from kvtier.hints import NO_HINT, Hint, Priority
from kvtier.testing.policies import PolicySuite, keys_of


def make(capacity, inner=LRUPolicy):
    return TenantPolicy(RetentionPolicy(inner(capacity)), lambda: RetentionPolicy(inner(capacity)))


class TestWithoutTenants(PolicySuite):
    def make_policy(self, capacity: int) -> TenantPolicy:
        return make(capacity)


class TestOneTenant(PolicySuite):
    def make_policy(self, capacity: int) -> TenantPolicy:
        policy = make(capacity)
        policy.serve(Hint(tenant="one"), "all", 0.0)
        return policy


class Tier:
    """Stores blocks of tenants as a table does."""

    def __init__(self, capacity=12, inner=LRUPolicy):
        self.policy, self.now, self.next = make(capacity, inner), 0.0, 0
        self.held = {}

    def store(self, tenant, count, **hint):
        """Store so many new blocks of a tenant."""
        self.now += 1
        self.policy.serve(Hint(tenant=tenant, **hint) if tenant else NO_HINT, "r", self.now)
        keys = keys_of(*range(self.next, self.next + count))
        self.next += count
        victims = list(islice(self.policy.candidates(keys), max(0, len(self.held) + count - self.policy.capacity)))
        self.policy.evict(victims)
        for key in victims:
            del self.held[key]
        keys = keys[: self.policy.capacity - len(self.held)]
        self.policy.insert(keys, self.now)
        self.held.update(dict.fromkeys(keys, tenant))
        self.policy.check_invariants()

    def use(self, tenant):
        self.now += 1
        self.policy.serve(Hint(tenant=tenant), "r", self.now)
        self.policy.touch([key for key, owner in self.held.items() if owner == tenant], self.now)

    def counts(self, *tenants):
        return [sum(owner == tenant for owner in self.held.values()) for tenant in tenants]


def test_a_tenant_alone_takes_everything():
    tier = Tier()
    for _ in range(10):
        tier.store("a", 2)
    assert tier.counts("a") == [12]


def test_who_is_over_its_share_gives_way_to_who_is_below():
    tier = Tier()
    tier.store("a", 12)
    for _ in range(6):
        tier.store("b", 2)
    assert tier.counts("a", "b") == [6, 6]
    for _ in range(20):
        tier.store("b", 2)
        tier.store("b", 1)
    assert tier.counts("a", "b") == [6, 6]
    for _ in range(4):
        tier.store("c", 2)
    assert tier.counts("a", "b", "c") == [4, 4, 4]


def test_unused_shares_go_to_other_tenants():
    tier = Tier()
    tier.store("small", 2)
    for _ in range(20):
        tier.store("large", 3)
        tier.use("small")
    assert tier.counts("small", "large") == [2, 10]


def test_requests_without_a_tenant_have_a_share_together():
    tier = Tier()
    tier.store(None, 12)
    for _ in range(10):
        tier.store("a", 2)
    assert tier.counts(None, "a") == [6, 6]


def test_a_tenant_that_went_away_keeps_no_share():
    tier = Tier()
    tier.store("gone", 6)
    tier.store("here", 6)
    tier.now += IDLE_SECONDS
    for _ in range(3):
        tier.store("here", 2)
    assert tier.counts("gone", "here") == [0, 12]


def test_hints_of_a_tenant_speak_of_its_own_blocks():
    tier = Tier()
    tier.store("a", 2, priority=Priority.HIGH)
    for _ in range(10):
        tier.store("a", 2)
        tier.store("b", 2, priority=Priority.HIGH)
    assert tier.counts("a", "b") == [6, 6]
    assert set(keys_of(0, 1)) <= tier.held.keys()


def test_names_that_a_client_makes_up_cost_a_bounded_number_of_accounts():
    tier = Tier(capacity=MAX_TENANTS * 2)
    for number in range(MAX_TENANTS * 3):
        tier.store(f"tenant {number}", 1)
    assert len(tier.policy) == MAX_TENANTS * 2
    assert tier.policy.num_held("") > 0


@pytest.mark.parametrize("inner", [LRUPolicy, S3FIFOPolicy])
@pytest.mark.parametrize(("seed", "most_in_one"), [*((seed, 65_536) for seed in range(4)), (4, 0)])
def test_any_history_keeps_each_block_on_one_account(inner, seed, most_in_one, monkeypatch):
    monkeypatch.setattr(key_tables, "MOST_IN_ONE", most_in_one)
    rng, held, policy, now = random.Random(seed), set(), make(40, inner), 0.0
    hints = [NO_HINT, Hint(priority=Priority.HIGH), Hint(retain=9.0), Hint(session="s"), Hint(session="s", ended=True)]
    for _ in range(500):
        now += rng.random() * 20
        said = rng.choice(hints)
        tenant = rng.choice([None, "a", "b", "c"])
        policy.serve(Hint(tenant=tenant, retain=said.retain, priority=said.priority, session=said.session), "r", now)
        keys, call = keys_of(*rng.sample(range(80), 6)), rng.choice(["insert", "touch", "settle", "remove"])
        if call == "insert":
            keys = [key for key in keys if key not in held]
            victims = list(islice(policy.candidates(keys), max(0, len(held) + len(keys) - 40)))
            policy.evict(victims)
            held.difference_update(victims)
            keys = keys[: 40 - len(held)]
            policy.insert(keys, now)
            held.update(keys)
        elif call == "remove":
            policy.remove([key for key in keys if key in held])
            held.difference_update(keys)
        else:
            getattr(policy, call)(keys)
        policy.check_invariants()
        assert set(policy.candidates()) == held


@pytest.mark.parametrize("inner", [LRUPolicy, PrefixPolicy])
def test_all_tenants_together_retain_no_more_than_a_share(inner):
    tier = Tier(capacity=80, inner=inner)
    for tenant in "abcd":
        tier.store(tenant, 20, retain=30 * 86400.0)
    assert tier.policy.num_kept == 20
    tier.store("late", 16)
    assert tier.counts("late") == [16]


def test_retained_blocks_of_a_tenant_that_went_away_are_evicted():
    tier = Tier()
    tier.store("gone", 3, retain=30 * 86400.0)
    tier.store("here", 9)
    tier.store("here", 2)
    assert tier.counts("gone", "here") == [3, 9]
    tier.now += IDLE_SECONDS
    tier.store("here", 2)
    tier.store("here", 1)
    assert tier.counts("gone", "here") == [0, 12]


def test_retained_blocks_beyond_a_tenants_share_are_evicted_last():
    tier = Tier()
    tier.store("a", 1)
    tier.store("a", 3, retain=30 * 86400.0)
    for tenant in "bcdef":
        tier.store(tenant, 2)
        tier.store(tenant, 1)
    assert tier.counts(*"abcdef") == [2] * 6
    assert set(keys_of(1, 2)) <= tier.held.keys()


def test_what_ends_at_once_for_many_tenants_ends_in_parts():
    tier = Tier(capacity=8000)
    for number in range(200):
        tier.store(f"tenant {number}", 10, retain=600 - number)
    kept = [tier.policy.num_kept]
    tier.now = 2000
    while kept[-1]:
        tier.store(None, 1)
        kept.append(tier.policy.num_kept)
        assert kept[-2] - MAX_ENDED <= kept[-1] < kept[-2]


class NobodyLooks(LRUPolicy):
    def candidates(self, incoming=()):
        raise AssertionError("with many blocks this takes long")


def test_the_first_tenant_costs_no_walk_over_all_blocks():
    lru = NobodyLooks(20)
    lru.insert(keys_of(*range(8)))
    policy = TenantPolicy(RetentionPolicy(lru), lambda: RetentionPolicy(LRUPolicy(20)))
    assert (len(policy), policy.num_held("")) == (8, 8)
    policy.serve(Hint(tenant="a"), "r", 1.0)
    policy.touch(keys_of(0, 10), 1.0)
    policy.remove(keys_of(*range(4)))
    assert (len(policy), policy.num_held("")) == (4, 4)
    policy.check_invariants()


class CountedKey:
    """A key that can be counted while something refers to it."""


@pytest.mark.parametrize("inner", [LRUPolicy, ARCPolicy, S3FIFOPolicy, TinyLFUPolicy, PrefixPolicy])
def test_all_tenants_together_remember_little_more_than_one_policy_would(inner):
    policy, keys = make(400, inner), WeakSet()
    for number in range(4000):
        # The first tenants fill the tier one after the other and go away; all the others are active at the same time.
        name = f"early {number // 1000}" if number < 3000 else f"tenant {number % 20}"
        policy.serve(Hint(tenant=name), str(number), 1.0 + number)
        stored = [CountedKey() for _ in range(4)]
        keys.update(stored)
        policy.evict(list(islice(policy.candidates(stored), max(0, len(policy) + 4 - 400))))
        policy.insert(stored, 1.0 + number)
        policy.settle(stored)
    policy.check_invariants()
    gc.collect()
    assert len(keys) <= 6 * 400, "one policy holds 400 and remembers up to four times as many"
