"""vLLM's own tracker of KV events, under its scheduler and over kvtier: it keeps nothing for blocks that have left."""

import random
from types import SimpleNamespace

import pytest
from scheduler_driver import BLOCK, Driver, kvtier_manager
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.events import OffloadingEventsTracker

from kvtier.adapters.vllm.compat import KNOWS_FAILED_STORES

HOST_BLOCKS = 24
SCRIPTED = {"type": "ScriptedTier", "module_path": "kvtier.testing.scripted_tier"}


class Rig:
    """A driver whose connector has a tracker, over a manager that reports events and a tier that the test controls."""

    def __init__(self, model, with_window, **options):
        tiers = {"secondary_tiers": [SCRIPTED], "prefill_rate": 1.0}
        self.manager = kvtier_manager(HOST_BLOCKS, events=True, **(tiers | options))
        self.inner = self.manager._core.manager
        self.tier = self.inner._tiers.guards[0].tier
        self.driver = Driver(model, self.manager, with_window)
        config = SimpleNamespace(enable_kv_cache_events=True, self_describing_kv_events=True)
        self.tracker = self.driver.connector._events_tracker = OffloadingEventsTracker(config)
        self.published = []
        self.take_events, self.driver.connector.take_events = self.driver.connector.take_events, self.publish

    def publish(self):
        """Take the events as vLLM's scheduler does after each step."""
        events = list(self.take_events())
        self.published += events
        return events

    def run(self, prompts):
        self.driver.run(prompts)
        for _ in range(4):  # vLLM stores the last blocks of a request a step after its end
            self.driver.step()

    def keys_of_absent_blocks(self):
        """Return the keys that the tracker knows although they are not in host memory."""
        return [key for key in self.tracker._pending_event_metadata if key not in self.inner._table.slot_of]

    def close(self):
        self.inner.check_invariants()
        self.manager.shutdown()


@pytest.fixture(params=[False, True], ids=["full", "window"])
def rig(request, model):
    made = []

    def make(**options):
        made.append(Rig(model, request.param, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def prompts(seed=0, count=30):
    """Return prompts of six blocks; thirty of them do not find room on the device, nor in host memory."""
    rng = random.Random(seed)
    return [[rng.randrange(3, 500) for _ in range(6 * BLOCK + 5)] for _ in range(count)]


def test_promotions_that_arrive_and_evictions(rig):
    rig = rig()
    rig.run(prompts() * 2)
    assert rig.tier.loads
    assert any(isinstance(event, BlockStored) for event in rig.published)
    assert any(isinstance(event, BlockRemoved) for event in rig.published)
    assert rig.keys_of_absent_blocks() == []


def test_promotions_that_fail(rig):
    rig = rig()
    rig.run(prompts())
    rig.tier.fail = set(rig.tier.blocks)
    rig.run(prompts())
    assert rig.tier.loads
    assert rig.keys_of_absent_blocks() == []


def test_promotions_that_do_not_fit(rig):
    rig = rig(promotion_budget=0.01)
    rig.run(prompts() * 2)
    assert rig.inner.get_stats()["gave_up.budget"]
    assert rig.keys_of_absent_blocks() == []


def test_requests_that_give_up(rig):
    rig = rig(load_deadline=0.001)
    rig.run(prompts())
    rig.tier.auto = False
    rig.run(prompts())
    assert rig.inner.get_stats()["gave_up.deadline"]
    rig.tier.drain_jobs()
    rig.run(prompts(seed=1, count=4))
    assert rig.keys_of_absent_blocks() == []


def test_stores_that_fail(rig):
    rig = rig()
    rig.run(prompts(count=2))
    rig.manager._core.control.count_failure(0)
    rig.run(prompts(seed=1, count=2))
    left = rig.keys_of_absent_blocks()
    assert left == [] if KNOWS_FAILED_STORES else len(left) <= HOST_BLOCKS
    stored, removed = (
        {one for event in rig.published if isinstance(event, kind) for one in event.block_hashes}
        for kind in (BlockStored, BlockRemoved)
    )
    assert removed <= stored, "nothing is removed that was never there"
