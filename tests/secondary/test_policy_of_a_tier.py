"""The eviction policy of a slotted tier: any built-in one without a registry, and what `auto` says."""

import pytest
from fault_rigs import Recorder, make_rig

from kvtier.events import PolicySwitched, TierState
from kvtier.eviction.built_in import BUILT_IN_POLICIES
from kvtier.eviction.contest import PolicySwitch
from kvtier.registry import POLICIES
from kvtier.secondary.disk import DiskTierManager


@pytest.fixture
def rig():
    recorder = Recorder()
    rig = make_rig(observer=recorder)
    rig.recorder = recorder
    yield rig
    rig.close()


def test_auto_is_built_in_and_its_switches_are_events(rig, tmp_path):
    tier = DiskTierManager(
        rig.spec, rig.arena.view, "disk", path=str(tmp_path / "tier"), capacity="2MiB", eviction_policy="auto"
    )
    rig.attach(tier)
    tier.start()
    rig.wait(lambda: tier.state is TierState.UP, "it is up")
    assert rig.store(range(8)).success
    tier._table.policy.on_switch(PolicySwitch("prefix", "s3fifo", 0.25, 0.5))
    assert [event for event in rig.recorder.events if isinstance(event, PolicySwitched)] == [
        PolicySwitched("disk", "prefix", "s3fifo", 0.25, 0.5)
    ]


def test_every_registered_policy_is_built_in():
    assert {name: POLICIES.load(name) for name in BUILT_IN_POLICIES} == BUILT_IN_POLICIES
    assert {"lru", "arc", "auto"} <= BUILT_IN_POLICIES.keys()
