"""Store jobs with blocks of several requests, through a disk tier: each request's blocks are its own."""

import numpy as np
import pytest
from fault_rigs import Recorder, make_rig

from kvtier.secondary.disk import DiskTierManager, StripedDiskTierManager
from kvtier.testing.stores import make_key, make_payload
from kvtier.types import JobMetadata, LookupResult, ReqContext

HIT, MISS = LookupResult.HIT, LookupResult.MISS


class Disk:
    """A tier with room for `num_slots` blocks, by LRU, in order of calls."""

    def __init__(self, rig, folder, num_slots):
        self.rig = rig
        capacity = num_slots * (rig.block_bytes + 256) + (64 << 10)
        self.tier = DiskTierManager(
            rig.spec, rig.arena.view, "disk", path=str(folder), capacity=capacity, eviction_policy="lru"
        )
        rig.attach(self.tier)
        self.tier.start()
        rig.wait_up()
        self.num_slots = int(self.tier.get_stats()["capacity_blocks"])
        self._job_id = 1000

    def store(self, *shares):
        """Store blocks of (request, numbers) in one job; return its result."""
        numbers = [number for _, some in shares for number in some]
        for slot, number in enumerate(numbers):
            self.rig.fill(slot, make_payload(number, self.rig.block_bytes))
        return self.submit([make_key(number) for number in numbers], shares)

    def submit(self, keys, shares):
        self._job_id += 1
        slots = np.arange(len(keys), dtype=np.int32)
        told = tuple((request, len(some)) for request, some in shares)
        self.tier.submit_store(JobMetadata(self._job_id, keys, slots, False, shares[0][0], told))
        return self.rig.finish(self._job_id)

    def held(self, numbers):
        return [number for number in numbers if self.tier.lookup(make_key(number), ReqContext("who")) is HIT]


@pytest.fixture
def disk(tmp_path):
    rig = make_rig(observer=Recorder())
    yield Disk(rig, tmp_path / "tier", 40)
    rig.close()


def begun(disk, name):
    request = ReqContext(name)
    disk.tier.on_new_request(request)
    return request


def test_every_block_of_a_joined_job_comes_back(disk):
    first, second = begun(disk, "first"), begun(disk, "second")
    assert disk.store((first, range(5)), (second, range(5, 12))).success
    result, loaded = disk.rig.load(range(12))
    assert result.success
    assert loaded == list(range(12))


def test_blocks_that_are_there_already_count_whichever_request_brings_them(disk):
    first, second = begun(disk, "first"), begun(disk, "second")
    assert disk.store((first, range(4))).success
    result = disk.store((first, range(2, 6)), (second, [0, 1, 6]))
    assert result.success
    assert result.transfer_bytes == 3 * disk.rig.block_bytes
    assert disk.rig.load(range(7))[1] == list(range(7))


def test_a_block_that_two_requests_bring_is_stored_once(disk):
    first, second = begun(disk, "first"), begun(disk, "second")
    result = disk.store((first, [0, 1, 2]), (second, [0, 1, 3, 4]))
    assert result.success
    assert result.transfer_bytes == 5 * disk.rig.block_bytes
    assert disk.rig.load(range(5))[1] == list(range(5))
    disk.tier.check_invariants()


def test_the_end_of_each_request_orders_its_own_blocks(disk):
    """The tail of a prefix is evicted before its head, though the blocks of two requests came in one job."""
    half = disk.num_slots // 2
    first, second = begun(disk, "first"), begun(disk, "second")
    disk.store((first, range(half)), (second, range(100, 100 + disk.num_slots - half)))
    disk.tier.on_request_finished(second)
    disk.tier.on_request_finished(first)
    assert disk.store((begun(disk, "third"), range(200, 203))).success
    tail = range(100 + disk.num_slots - half - 3, 100 + disk.num_slots - half)
    assert not disk.held(tail)
    assert disk.held(range(half)) == list(range(half))
    assert disk.held([100]) == [100]


def test_a_request_of_a_job_does_not_evict_what_it_has_used(disk):
    first, second = begun(disk, "first"), begun(disk, "second")
    disk.store((first, range(disk.num_slots)))
    disk.rig.wait(lambda: disk.held(range(disk.num_slots)), "they are stored")
    result = disk.store((second, range(300, 302)), (first, range(400, 402)))
    assert not result.success
    assert disk.held(range(300, 302)) == [300, 301]
    assert not disk.held(range(400, 402))


def test_keys_of_another_length_fail_the_whole_job_and_leave_nothing_behind(disk):
    first, second = begun(disk, "first"), begun(disk, "second")
    assert disk.store((first, [1])).success
    keys = [make_key(2), make_key(3), b"x" * 21]
    assert not disk.submit(keys, [(first, keys[:2]), (second, keys[2:])]).success
    assert not disk.held([2, 3])
    disk.tier.check_invariants()
    assert disk.store((first, range(disk.num_slots))).transfer_bytes


def test_stripes_share_a_joined_job_and_each_request_keeps_its_blocks(tmp_path):
    rig = make_rig(observer=Recorder(), num_blocks=16, block_bytes=512 << 10)
    folders = [str(tmp_path / name) for name in ("a", "b")]
    tier = StripedDiskTierManager(rig.spec, rig.arena.view, "disk", path=folders, capacity="64MiB")
    rig.attach(tier)
    tier.start()
    rig.wait(lambda: tier.get_stats()["stripes_up"] == 2, "both stripes are up")
    first, second = ReqContext("first"), ReqContext("second")
    for request in (first, second):
        tier.on_new_request(request)
    for slot in range(16):
        rig.fill(slot, make_payload(slot, rig.block_bytes))
    keys = [make_key(number) for number in range(16)]
    shares = ((first, 7), (second, 9))
    tier.submit_store(JobMetadata(1000, keys, np.arange(16, dtype=np.int32), False, first, shares))
    assert rig.finish(1000).success
    for request in (second, first):
        tier.on_request_finished(request)
    result, loaded = rig.load(range(16), first_slot=0)
    assert result.success
    assert loaded == list(range(16))
    rig.close()
