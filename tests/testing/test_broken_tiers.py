"""Tiers that break their contract fail the suite."""

import pytest
import xxhash

from kvtier.secondary.example import ExampleSecondaryTierManager
from kvtier.testing.patience import PATIENCE_SECONDS
from kvtier.testing.tiers import TierSuite
from kvtier.types import JobResult, LookupResult


class AnswersTwice(ExampleSecondaryTierManager):
    def get_finished_jobs(self):
        results = list(super().get_finished_jobs())
        return results + results


class NeverAnswers(ExampleSecondaryTierManager):
    def get_finished_jobs(self):
        return []


class AnswersUnknownJobs(ExampleSecondaryTierManager):
    def get_finished_jobs(self):
        results = list(super().get_finished_jobs())
        return [*results, JobResult(10_000, True)] if results else results


class WrongBytes(ExampleSecondaryTierManager):
    def submit_load(self, job_metadata):
        super().submit_load(job_metadata)
        for slot in job_metadata.block_ids:
            self._rows[int(slot)][17] ^= 1


class SwapsBlocks(ExampleSecondaryTierManager):
    def submit_load(self, job_metadata):
        job_metadata.block_ids = job_metadata.block_ids[::-1]
        super().submit_load(job_metadata)


class Raises(ExampleSecondaryTierManager):
    def submit_store(self, job_metadata):
        raise RuntimeError("broken")


class SaysSuccessForUnknownKeys(ExampleSecondaryTierManager):
    def get_finished_jobs(self):
        return [JobResult(result.job_id, True) for result in super().get_finished_jobs()]


class HidesPartialSuccess(ExampleSecondaryTierManager):
    def get_finished_jobs(self):
        return [JobResult(result.job_id, result.success) for result in super().get_finished_jobs()]


class RemembersEpochs(ExampleSecondaryTierManager):
    def start_epoch(self, epoch):
        pass


class ChecksNothing(ExampleSecondaryTierManager):
    def submit_load(self, job_metadata):
        for key, (payload, _) in list(self._blocks.items()):
            self._blocks[key] = (payload, xxhash.xxh3_128_digest(payload))
        super().submit_load(job_metadata)


class ForgetsOnTouch(ExampleSecondaryTierManager):
    def touch(self, keys, req_context):
        self._blocks.clear()


class WritesElsewhere(ExampleSecondaryTierManager):
    def submit_load(self, job_metadata):
        super().submit_load(job_metadata)
        self._rows[63][:] = bytes(len(self._rows[63]))
        self._rows[63][0] = job_metadata.job_id % 256


class NeverSaysNo(ExampleSecondaryTierManager):
    def lookup(self, key, req_context):
        return LookupResult.HIT


class NeverSays(ExampleSecondaryTierManager):
    def lookup(self, key, req_context):
        return LookupResult.RETRY


class AnswersInBooleans(ExampleSecondaryTierManager):
    def lookup(self, key, req_context):
        return key in self._blocks


class TakesNothing(ExampleSecondaryTierManager):
    def can_store(self, num_blocks):
        return False


class AlwaysBusy(ExampleSecondaryTierManager):
    def has_pending_work(self):
        return True


class DrainLosesResults(ExampleSecondaryTierManager):
    def drain_jobs(self):
        self._results.clear()


BROKEN = {
    AnswersTwice: "test_many_jobs_are_each_answered_once",
    NeverAnswers: "test_what_was_stored_is_loaded_again",
    AnswersUnknownJobs: "test_what_was_stored_is_loaded_again",
    WrongBytes: "test_what_was_stored_is_loaded_again",
    SwapsBlocks: "test_what_was_stored_is_loaded_again",
    Raises: "test_what_was_stored_is_loaded_again",
    SaysSuccessForUnknownKeys: "test_unknown_keys_fail_and_others_still_succeed",
    HidesPartialSuccess: "test_unknown_keys_fail_and_others_still_succeed",
    RemembersEpochs: "test_a_new_epoch_forgets",
    ChecksNothing: "test_corrupted_bytes_never_succeed",
    ForgetsOnTouch: "test_touching_unknown_keys_is_harmless",
    WritesElsewhere: "test_a_load_changes_no_other_slot",
    NeverSaysNo: "test_an_unknown_key_is_a_miss",
    NeverSays: "test_an_unknown_key_is_a_miss",
    AnswersInBooleans: "test_an_unknown_key_is_a_miss",
    TakesNothing: "test_it_takes_stores_when_it_has_nothing_to_do",
    AlwaysBusy: "test_requests_come_and_go",
    DrainLosesResults: "test_a_drain_leaves_no_job_unanswered",
}


def suite_for(tier_class, patience_seconds=PATIENCE_SECONDS):
    class Suite(TierSuite):
        patience = patience_seconds

        def make_tier(self, offloading_spec, primary_kv_view):
            return tier_class(offloading_spec, primary_kv_view, "broken")

        def plant(self, tier, key, raw):
            tier._blocks[key] = (raw, tier._blocks[key][1])

        def peek(self, tier, key):
            return tier._blocks[key][0]

    return Suite()


@pytest.mark.parametrize("tier_class", BROKEN, ids=lambda tier_class: tier_class.__name__)
def test_a_broken_tier_fails_the_suite(tier_class):
    suite = suite_for(tier_class, patience_seconds=0.1)
    suite.setup_method()
    try:
        with pytest.raises((AssertionError, RuntimeError)):
            getattr(suite, BROKEN[tier_class])()
    finally:
        suite.teardown_method()


def test_every_test_of_the_suite_passes_for_a_sound_tier():
    names = [name for name in dir(TierSuite) if name.startswith("test_")]
    assert set(BROKEN.values()) <= set(names)
    for name in names:
        suite = suite_for(ExampleSecondaryTierManager)
        suite.setup_method()
        try:
            getattr(suite, name)()
        finally:
            suite.teardown_method()
