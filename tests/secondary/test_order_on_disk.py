"""On disk, too, a request evicts nothing of its own, and its blocks take their places tail-first when it ends."""

from itertools import islice

import pytest
from fault_rigs import make_rig

from kvtier.events import TierState
from kvtier.secondary.disk import DiskTierManager
from kvtier.testing.stores import make_key
from kvtier.types import LookupResult, ReqContext


@pytest.fixture(params=[1, 2], ids=["one directory", "two"])
def rig(request, tmp_path):
    rig = make_rig(num_blocks=64, block_bytes=65536)
    paths = [str(tmp_path / f"disk{index}") for index in range(request.param)]
    options = {"path": paths[0] if len(paths) == 1 else paths, "capacity": "4MiB"}
    tier = DiskTierManager.class_for(options)(rig.spec, rig.arena.view, "disk", **options)
    rig.attach(tier)
    tier.start()
    rig.wait(lambda: all(stripe.state is TierState.UP for stripe in stripes(rig)), "all of it is up")
    yield rig
    rig.close()


def begin(rig, name, **hint):
    rig.request = ReqContext(name, kv_transfer_params={"kvtier": hint} if hint else None)
    rig.tier.on_new_request(rig.request)


def stripes(rig):
    return getattr(rig.tier, "_stripes", [rig.tier])


def tables(rig):
    return [stripe._table for stripe in stripes(rig)]


def fill(rig):
    """Other blocks until all slots are taken."""
    begin(rig, "fills")
    number = 100
    while any(table.num_free for table in tables(rig)):
        rig.store([number])
        number += 1
    rig.tier.on_request_finished(rig.request)


def test_the_next_evictions_shorten_a_finished_chain_and_do_not_cut_it(rig):
    begin(rig, "first")
    rig.store(range(4))
    rig.tier.on_request_finished(rig.request)
    begin(rig, "second")
    rig.load([1, 2, 3])  # block 0 was in memory
    rig.tier.touch([make_key(number) for number in range(4)], rig.request)
    rig.store([4, 5])
    rig.tier.on_request_finished(rig.request)
    order = {number: place for table in tables(rig) for place, number in enumerate(numbers(table))}
    for table in tables(rig):
        assert numbers(table) == sorted(numbers(table), reverse=True)
    assert set(order) == set(range(6))


def numbers(table):
    known = {make_key(number): number for number in range(100)}
    return [known[key] for key in islice(table.policy.candidates(), 100)]


def test_a_store_evicts_nothing_that_its_request_has_found(rig):
    begin(rig, "first")
    rig.store(range(4))
    rig.tier.on_request_finished(rig.request)
    fill(rig)
    rig.store(range(60, 64))  # while one directory was filled up, the other one evicted
    begin(rig, "second")
    rig.load(range(60, 64))
    num_slots = sum(table.num_slots for table in tables(rig))
    for number in range(1000, 1000 + 2 * num_slots, 8):
        rig.store(range(number, number + 8))
    assert all(rig.lookup(number) is LookupResult.HIT for number in range(60, 64))


def test_a_block_counts_one_use_for_a_request(rig, monkeypatch):
    begin(rig, "first")
    rig.store(range(4))
    rig.tier.on_request_finished(rig.request)
    used = []
    for table in tables(rig):
        held = set(table.slot_of)
        monkeypatch.setattr(table.policy, "touch", lambda keys, now, held=held: used.extend(held.intersection(keys)))
    begin(rig, "second")
    rig.load(range(4))
    rig.tier.touch([make_key(number) for number in range(4)], rig.request)
    rig.store(range(4))
    rig.tier.touch([make_key(number) for number in range(4)], rig.request)
    assert sorted(used) == sorted(make_key(number) for number in range(4))


def test_a_block_that_a_hint_keeps_stays(rig):
    begin(rig, "keeps", retain="1h")
    rig.store(range(60, 64))
    rig.tier.on_request_finished(rig.request)
    assert rig.tier.get_stats()["kept_blocks"] == 4
    num_slots = sum(table.num_slots for table in tables(rig))
    for number in range(1000, 1000 + 2 * num_slots, 8):
        begin(rig, f"stores {number}")
        rig.store(range(number, number + 8))
        rig.tier.on_request_finished(rig.request)
    assert all(rig.lookup(number) is LookupResult.HIT for number in range(60, 64))
