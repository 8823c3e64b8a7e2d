"""Blocks that a caller pins in a tier stay there, however much is stored."""

import pytest
from fault_rigs import make_rig

from kvtier.secondary.disk import DiskTierManager, StripedDiskTierManager
from kvtier.testing.stores import make_key
from kvtier.types import LookupResult

KEPT = range(4)


@pytest.fixture(params=[1, 2])
def tier(request, tmp_path):
    """A disk tier, or a striped one."""
    rig = make_rig(inline_io=True)
    if request.param == 1:
        made = DiskTierManager(rig.spec, rig.arena.view, "disk", path=str(tmp_path / "0"), capacity="1MiB")
    else:
        paths = [str(tmp_path / str(number)) for number in range(request.param)]
        made = StripedDiskTierManager(rig.spec, rig.arena.view, "disk", path=paths, capacity="2MiB")
    rig.attach(made)
    made.start()
    rig.wait_up()
    made.rig = rig
    yield made
    rig.close()


def store_more_than_fits(tier, first):
    for start in range(first, first + 600, 20):
        assert tier.rig.store(range(start, start + 20)).success


def held(tier, numbers):
    return [tier.rig.lookup(number) is LookupResult.HIT for number in numbers]


def test_pinned_blocks_are_no_victims_until_as_many_unpins(tier):
    keys = [make_key(number) for number in KEPT]
    assert tier.rig.store(KEPT).success
    tier.pin([*keys, make_key(99)])
    tier.pin(keys[:1])
    store_more_than_fits(tier, 1000)
    assert tier.rig.load(KEPT)[1] == list(KEPT)
    tier.unpin([*keys, make_key(99)])
    tier.check_invariants()
    store_more_than_fits(tier, 2000)
    assert held(tier, KEPT) == [True, False, False, False]
    tier.unpin(keys[:1])
    tier.unpin(keys)
    store_more_than_fits(tier, 3000)
    assert held(tier, KEPT) == [False] * 4
    tier.check_invariants()


def test_pins_end_when_the_tier_starts_anew(tier):
    keys = [make_key(number) for number in KEPT]
    assert tier.rig.store(KEPT).success
    tier.pin(keys)
    tier.start_epoch(b"another")
    tier.rig.wait_up()
    tier.unpin(keys)
    assert held(tier, KEPT) == [False] * 4
    assert tier.rig.store(KEPT).success
    store_more_than_fits(tier, 4000)
    assert held(tier, KEPT) == [False] * 4
    tier.check_invariants()
