import random
from itertools import islice

import pytest

from kvtier.eviction import shadows
from kvtier.eviction.auto import FOLLOWED, AutoPolicy, ShadowedPolicy
from kvtier.eviction.contest import PolicySwitch
from kvtier.eviction.lru import LRUPolicy
from kvtier.eviction.s3fifo import S3FIFOPolicy
from kvtier.eviction.succession import MOVED_AT_ONCE, Succession
from kvtier.testing.policies import PolicySuite

from .changing import chain, scans, sessions
from .replay import held_prefix, replay

CAPACITY = 512
TWO = {"lru": LRUPolicy, "s3fifo": S3FIFOPolicy}


class TestAuto(PolicySuite):
    def make_policy(self, capacity):
        return AutoPolicy(capacity)


class TestSuccession(PolicySuite):
    def make_policy(self, capacity):
        return Succession(LRUPolicy(capacity), FOLLOWED["arc"](capacity))


@pytest.fixture
def unlimited(monkeypatch):
    """Shadows that never rest: what is tested is the choice, not the budget."""
    monkeypatch.setattr(shadows, "FIRST_CREDIT", 1 << 30)


def changing(first, then, seed=1):
    rng = random.Random(seed)
    return [*first(rng, 1500), *then(rng, 1500)]


def test_it_changes_with_the_traffic_and_beats_each_policy_alone(unlimited):
    requests = changing(scans, sessions)
    switches: list[PolicySwitch] = []
    policy = ShadowedPolicy(CAPACITY, "lru", TWO, may_switch=True)
    policy.on_switch = switches.append
    found = replay(policy, requests)
    policy.check_invariants()
    assert [(switch.former, switch.chosen) for switch in switches] == [("lru", "s3fifo"), ("s3fifo", "lru")]
    assert all(switch.chosen_rate > switch.former_rate for switch in switches)
    best = max(replay(kind(CAPACITY), requests).hit_percent for kind in TWO.values())
    assert found.hit_percent > best + 1


def test_an_engine_may_name_all_blocks_of_a_request_before_it_stores_some(unlimited):
    policy, rng = AutoPolicy(64), random.Random(2)
    for number in range(300):
        keys = chain(rng.randrange(30) if rng.random() < 0.5 else f"once {number}", 6)
        policy.touch(keys)
        missing = [key for key in keys if key not in policy]
        victims = (key for key in policy.candidates(missing) if key not in keys)
        policy.evict(list(islice(victims, max(0, len(policy) + len(missing) - 64))))
        policy.insert(missing)
        policy.check_invariants()
    stats = policy.stats()
    assert stats["shadow_blocks.prefix"] == pytest.approx(stats["shadow_blocks.lru"], abs=16) != 0


def test_it_ends_near_the_best_of_all(unlimited):
    requests = changing(scans, sessions)

    def end_of(policy):
        replay(policy, requests[:2300])
        return replay(policy, requests[2300:]).hit_percent

    assert end_of(AutoPolicy(CAPACITY)) > max(end_of(FOLLOWED[name](CAPACITY)) for name in ("lru", "prefix")) - 3


def test_equal_requests_give_equal_switches(unlimited):
    requests = changing(scans, sessions, seed=2)[:700]
    counts = set()
    for _ in range(2):
        policy = AutoPolicy(CAPACITY)
        counts.add((replay(policy, requests), policy.name, tuple(policy.stats().items())))
    assert len(counts) == 1


def test_a_policy_with_shadows_chooses_as_without(unlimited):
    requests = changing(scans, sessions)[:500]
    policy = ShadowedPolicy(CAPACITY, "arc")
    assert replay(policy, requests) == replay(FOLLOWED["arc"](CAPACITY), requests)
    stats = policy.stats()
    assert {name.partition(".")[2] for name in stats} == {*FOLLOWED, "half", "double"}
    assert all(stats[f"shadow_blocks.{name}"] > 0 for name in FOLLOWED)
    assert stats["shadow_hits.half"] < stats["shadow_hits.double"]


def test_an_insert_replays_one_batch_in_one_shadow(unlimited, monkeypatch):
    calls = []
    work = shadows.Shadows.work
    monkeypatch.setattr(shadows.Shadows, "work", lambda self: calls.append(1) or work(self))
    policy = AutoPolicy(20_000)
    most = 0
    for keys in scans(random.Random(3), 1000):
        calls.clear()
        policy.touch(keys[: held_prefix(policy, keys)])
        policy.insert([key for key in keys if key not in policy])
        most = max(most, len(calls))
    assert most == 1


def test_cleared_it_starts_over(unlimited):
    policy = ShadowedPolicy(CAPACITY, "lru", TWO, may_switch=True)
    replay(policy, scans(random.Random(1), 1200))
    assert policy.name == "s3fifo"
    policy.clear()
    assert (policy.name, len(policy), policy.is_moving) == ("lru", 0, False)
    policy.check_invariants()


def test_the_new_policy_gets_the_keys_in_the_order_of_the_old_one():
    old = LRUPolicy(200)
    old.insert(chain("a", 150))
    old.touch(chain("a", 20))
    order = list(old.candidates())
    both = Succession(old, LRUPolicy(200))
    for number in range(40):
        if not both.is_over:
            both.insert([])
        both.check_invariants()
        assert len(both) == 150, number
    assert both.is_over
    assert list(both.new.candidates()) == order


def test_a_succession_ends_however_much_is_inserted():
    capacity = 640
    both = Succession(LRUPolicy(capacity), FOLLOWED["prefix"](capacity))
    both.old.insert(chain("old", capacity))
    for number in range(2 * capacity // MOVED_AT_ONCE):
        keys = chain(number, 100)
        victims = list(islice(both.candidates(keys), len(keys)))
        both.evict(victims)
        both.insert(keys)
        both.touch(keys[:50])
        both.check_invariants()
        assert len(both) == capacity
        if both.is_over:
            break
    assert both.is_over
