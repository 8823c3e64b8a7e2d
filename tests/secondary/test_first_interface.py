"""Tiers as they were written before: they pass today's suite once they are adapted."""

import pytest

from kvtier.abc import SecondaryTierManager
from kvtier.errors import ConfigError
from kvtier.primary.arena import arena_rows
from kvtier.secondary.example import ExampleSecondaryTierManager
from kvtier.secondary.first_interface import FirstInterfaceTier, adapt_tier, adapt_tier_class
from kvtier.testing.stores import make_key
from kvtier.testing.tiers import TierSuite
from kvtier.types import JobResult, LookupResult, Medium, ReqContext


class EarlyTier:
    """Knows nothing of kvtier's base class; answers one poll late."""

    medium = Medium.CPU

    def __init__(self, vllm_config, primary_kv_view, tier_type, limit=1000):
        self.vllm_config, self.tier_type, self.limit = vllm_config, tier_type, limit
        self._rows = arena_rows(primary_kv_view)
        self._blocks, self._late, self._ready = {}, [], []
        self.asked = set()

    def lookup(self, key, req_context):
        if key not in self.asked:
            self.asked.add(key)
            return None
        return key in self._blocks

    def submit_store(self, job_metadata):
        for key, slot in zip(job_metadata.keys, job_metadata.block_ids, strict=True):
            self._blocks[key] = bytes(self._rows[int(slot)])
        self._late.append(JobResult(job_metadata.job_id, True))

    def submit_load(self, job_metadata):
        done = []
        for key, slot in zip(job_metadata.keys, job_metadata.block_ids, strict=True):
            if key in self._blocks:
                self._rows[int(slot)][:] = self._blocks[key]
                done.append(key)
        self._late.append(JobResult(job_metadata.job_id, len(done) == len(job_metadata.keys), done))

    def get_finished(self):
        ready, self._ready, self._late = self._ready, self._late, []
        return ready


class EarlyTierOnTodaysBase(SecondaryTierManager):
    """Inherits today's base class, and is abstract for want of today's names."""

    def __init__(self, offloading_spec, primary_kv_view, tier_type):
        super().__init__(offloading_spec, primary_kv_view, tier_type)
        self.inner = EarlyTier(None, primary_kv_view, tier_type)

    def lookup(self, key, req_context):
        return self.inner.lookup(key, req_context)

    def submit_store(self, job_metadata):
        self.inner.submit_store(job_metadata)

    def submit_load(self, job_metadata):
        self.inner.submit_load(job_metadata)

    def get_finished(self):
        return self.inner.get_finished()


class TestEarlyTier(TierSuite):
    def make_tier(self, offloading_spec, primary_kv_view):
        offloading_spec.vllm_config = "the engine's"
        return adapt_tier_class(EarlyTier)(offloading_spec, primary_kv_view, "early", limit=7)

    def test_it_was_made_as_it_asks(self):
        tier = self.rig.tier
        assert isinstance(tier, FirstInterfaceTier)
        assert (tier.tier.vllm_config, tier.tier.limit, tier.tier_type) == ("the engine's", 7, "early")
        assert (tier.medium, tier.locality, tier.verifies_payloads) == (Medium.CPU, None, False)

    def test_none_is_ask_again(self):
        request = ReqContext("r")
        answers = [self.rig.tier.lookup(make_key(1), request) for _ in range(2)]
        assert answers == [LookupResult.RETRY, LookupResult.MISS]


class TestEarlyTierOnTodaysBase(TierSuite):
    def make_tier(self, offloading_spec, primary_kv_view):
        return adapt_tier_class(EarlyTierOnTodaysBase)(offloading_spec, primary_kv_view, "early")


def test_todays_tiers_stay_what_they_are():
    assert adapt_tier_class(ExampleSecondaryTierManager) is ExampleSecondaryTierManager
    tier = ExampleSecondaryTierManager(None, memoryview(bytearray(4096)).cast("B", (1, 4096)), "example")
    assert adapt_tier(tier, tier.primary_kv_view) is tier


def test_what_is_no_tier_is_refused():
    class NoTier:
        def lookup(self, key, req_context):
            return False

    with pytest.raises(ConfigError, match="submit_store"):
        adapt_tier_class(NoTier)


def test_a_tier_that_never_answers_is_drained_for_a_bounded_time():
    class Silent(EarlyTier):
        def get_finished(self):
            return []

    rig_view = memoryview(bytearray(4096)).cast("B", (1, 4096))
    tier = adapt_tier(Silent(None, rig_view, "silent"), rig_view, drain_seconds=0.05)
    job = type("Job", (), {"job_id": 1, "keys": [make_key(1)], "block_ids": [0]})()
    tier.submit_store(job)
    tier.drain_jobs()
    assert list(tier.get_finished_jobs()) == []


def test_results_may_be_pairs():
    class Pairs(EarlyTier):
        def get_finished(self):
            return [(result.job_id, result.success) for result in super().get_finished()] + [(99, False)]

    view = memoryview(bytearray(4096)).cast("B", (1, 4096))
    tier = adapt_tier(Pairs(None, view, "pairs"), view)
    assert list(tier.get_finished_jobs()) == [JobResult(99, False)]
