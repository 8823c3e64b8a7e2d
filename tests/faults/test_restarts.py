"""What a restart keeps: recency, capacity in real bytes, and blocks, whatever the clock says and the policy is."""

import os
import time

import pytest
from disk_rigs import make_rig, start

from kvtier.eviction.lru import LRUPolicy
from kvtier.namespace import Namespace
from kvtier.types import LookupResult

BLOCK = 8192


@pytest.fixture
def rig():
    rig = make_rig(policies={"own": LRUPolicy})
    yield rig
    rig.close()


def restart(rig, path, **options):
    rig.tier.shutdown()
    return start(rig, path, **options)


def held(rig, numbers):
    return [number for number in numbers if rig.lookup(number) is LookupResult.HIT]


def real_bytes(path):
    return sum(one.lstat().st_blocks * 512 for one in [path, *path.rglob("*")])


@pytest.mark.parametrize("policy", ["lru", "arc", "own"])
def test_recency_survives_a_restart_approximately(rig, tmp_path, policy):
    """What was written last stays, what was written first goes first: records are numbered, uses are not on disk."""
    path = tmp_path / "tier"
    tier = start(rig, path, policy=policy)
    capacity = int(tier.get_stats()["capacity_blocks"])
    for number in range(capacity):
        assert rig.store([number]).success
    restart(rig, path, policy=policy)
    assert held(rig, range(capacity)) == list(range(capacity))
    for number in range(1000, 1000 + capacity // 4):
        assert rig.store([number]).success
    left = held(rig, range(capacity))
    assert len(left) == capacity - capacity // 4
    newest_half = set(range(capacity // 2, capacity))
    assert len(newest_half & set(left)) >= 0.9 * len(newest_half), "the most recent half was evicted"
    assert rig.load(left[:30])[1] == left[:30]


def test_capacity_is_exact_in_real_bytes_across_restarts(rig, tmp_path):
    path = tmp_path / "tier"
    sizes = [1 << 20, 600_000, 2 << 20, 1_234_567, 300_000, 1 << 20]
    fresh, kept = 0, []
    start(rig, path, capacity=sizes[0])
    for before, capacity in zip([0, *sizes], sizes, strict=False):
        tier = restart(rig, path, capacity=capacity)
        os.sync()
        assert real_bytes(path) <= capacity
        now = held(rig, kept)
        assert now == kept or capacity < before, "a larger capacity keeps everything"
        assert len(now) == len(kept) or capacity < before
        for first in range(0, len(now), 30):
            assert rig.load(now[first : first + 30])[1] == now[first : first + 30]
        for _ in range(0, int(tier.get_stats()["capacity_blocks"]), 25):
            rig.store(range(fresh, fresh + 25))
            fresh += 25
            assert real_bytes(path) <= capacity
        kept = held(rig, range(fresh))
        assert len(kept) == tier.get_stats()["capacity_blocks"]
        assert len(kept) * BLOCK > 0.8 * capacity


def test_another_namespace_gives_way_within_the_capacity(tmp_path):
    path = tmp_path / "tier"
    for model in ("first", "second", "third"):
        rig = make_rig(model=model)
        try:
            start(rig, path, capacity=600_000)
            for first in range(0, 90, 30):
                rig.store(range(first, first + 30))
                assert real_bytes(path) <= 600_000
            assert len(held(rig, range(90))) > 50
        finally:
            rig.close()


def test_a_clock_that_went_backwards_costs_nothing(rig, tmp_path):
    """Files from the future, and a last use after now: records are numbered, no decision compares a time with now."""
    path = tmp_path / "tier"
    start(rig, path)
    rig.store(range(30))
    rig.tier.shutdown()
    future = time.time() + 10 * 365 * 86400
    for one in [path, *path.rglob("*")]:
        os.utime(one, (future, future))
    start(rig, path)
    assert rig.load(range(30))[1] == list(range(30))
    rig.store(range(100, 120))
    rig.tier.shutdown()
    other = make_rig(model="another")
    try:
        start(other, path)
        assert other.store(range(20)).success
        assert other.load(range(20))[1] == list(range(20))
    finally:
        other.close()
    start(rig, path)
    assert rig.load([*range(100, 120), *range(8)])[1] == [*range(100, 120), *range(8)]
    assert Namespace({"model": "faults"}).fingerprint.hex() in os.listdir(path)
