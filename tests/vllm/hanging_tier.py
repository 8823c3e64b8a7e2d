"""Tiers out of the tree that misbehave, named by `module_path`."""

from kvtier.abc import SecondaryTierManager
from kvtier.types import JobResult, LookupResult


class HangingTier(SecondaryTierManager):
    """Says that it has every block, and never brings one."""

    verifies_payloads = True

    def lookup(self, key, req_context):
        return LookupResult.HIT

    def submit_store(self, job_metadata):
        self._stored = [*getattr(self, "_stored", []), job_metadata.job_id]

    def submit_load(self, job_metadata):
        pass

    def get_finished_jobs(self):
        stored, self._stored = getattr(self, "_stored", []), []
        return [JobResult(job_id, success=True) for job_id in stored]

    def drain_jobs(self):
        pass


class SilentTier(HangingTier):
    """Never says whether it has a block."""

    def lookup(self, key, req_context):
        return LookupResult.RETRY


class RaisingTier(HangingTier):
    """Raises in every method."""

    def lookup(self, key, req_context):
        raise RuntimeError("lookup")

    submit_store = submit_load = get_finished_jobs = drain_jobs = lookup
