"""The eviction policy of a slotted tier: any built-in one without a registry."""

import pytest
from fault_rigs import Recorder, make_rig

from kvtier.events import TierState
from kvtier.eviction.built_in import BUILT_IN_POLICIES
from kvtier.eviction.prefix import PrefixPolicy
from kvtier.registry import POLICIES
from kvtier.secondary.disk import DiskTierManager


@pytest.fixture
def rig():
    recorder = Recorder()
    rig = make_rig(observer=recorder)
    rig.recorder = recorder
    yield rig
    rig.close()


def test_auto_means_prefix(rig, tmp_path):
    tier = DiskTierManager(
        rig.spec, rig.arena.view, "disk", path=str(tmp_path / "tier"), capacity="2MiB", eviction_policy="auto"
    )
    rig.attach(tier)
    tier.start()
    rig.wait(lambda: tier.state is TierState.UP, "it is up")
    assert rig.store(range(8)).success
    assert isinstance(tier._table.policy, PrefixPolicy)


def test_every_registered_policy_is_built_in():
    assert {name: POLICIES.load(name) for name in BUILT_IN_POLICIES} == BUILT_IN_POLICIES
    assert {"lru", "arc", "auto"} <= BUILT_IN_POLICIES.keys()
