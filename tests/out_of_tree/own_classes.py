"""Classes that a user might name by `module_path` and `spec_module_path`."""

from kvtier.abc import OffloadingSpec, SecondaryTierManager
from kvtier.errors import ConfigError, StoreUnavailableError
from kvtier.eviction.lru import LRUPolicy
from kvtier.secondary.keyed import KeyedTierManager
from kvtier.types import JobResult, LookupResult


class OwnTier(SecondaryTierManager):
    """Holds nothing, takes options of several types."""

    def __init__(self, offloading_spec, primary_kv_view, tier_type, *, path: str, ways: int = 4, mood: str = "good"):
        super().__init__(offloading_spec, primary_kv_view, tier_type)
        if mood == "bad":
            raise ConfigError("mood", mood, "good only")
        self.path, self.ways, self.started, self.ended = path, ways, 0, 0
        self._results = []

    def start(self):
        self.started += 1

    def shutdown(self):
        self.ended += 1

    def lookup(self, key, req_context):
        return LookupResult.MISS

    def submit_store(self, job_metadata):
        self._results.append(JobResult(job_metadata.job_id, False))

    submit_load = submit_store

    def get_finished_jobs(self):
        results, self._results = self._results, []
        return results

    def drain_jobs(self):
        pass


class LastingTier(OwnTier):
    """Outlives the engine."""

    persistent = True


class OpenTier(OwnTier):
    """Takes anything."""

    def __init__(self, offloading_spec, primary_kv_view, tier_type, **options):
        super().__init__(offloading_spec, primary_kv_view, tier_type, path="somewhere")
        self.options = options


class CrashingTier(OwnTier):
    """Its constructor has a fault."""

    def __init__(self, offloading_spec, primary_kv_view, tier_type):
        raise ZeroDivisionError("a defect")


class UnavailableTier(OpenTier):
    """Cannot start."""

    def start(self):
        raise StoreUnavailableError("nobody home")


class StubbornTier(OpenTier):
    """Finds at its start that an option is wrong."""

    def start(self):
        raise ConfigError("host", "x", "another host")


class FirstInterfaceTier:
    """Written before there were job results: no base class, `vllm_config`, `get_finished`."""

    def __init__(self, vllm_config, primary_kv_view, tier_type="first", *, size: int = 1):
        self.vllm_config, self.primary_kv_view = vllm_config, primary_kv_view
        self.tier_type, self.size = tier_type, size

    def lookup(self, key, req_context=None):
        return False

    def submit_store(self, job_metadata):
        pass

    def submit_load(self, job_metadata):
        pass

    def get_finished(self):
        return []


class OwnPolicy(LRUPolicy):
    """A policy under another name."""


class OwnSpec(OffloadingSpec):
    """Takes whatever it gets."""

    def __init__(self, *given):
        self.given = given

    def get_manager(self):
        raise NotImplementedError

    def get_worker(self, kv_caches):
        raise NotImplementedError


class NoSpec:
    """Nothing that kvtier asks for."""


not_a_class = 3


class LeavingTier(OpenTier):
    """Ends the process, or would."""

    def start(self):
        raise SystemExit(3)


class HalfStartedTier(OpenTier):
    """Fails after it has begun, and again at its end."""

    ends = 0

    def start(self):
        raise OSError("half way")

    def shutdown(self):
        type(self).ends += 1
        raise OSError("never began")


class ForgetfulTier(OwnTier):
    """Its constructor does not call its base's."""

    def __init__(self, offloading_spec, primary_kv_view, tier_type):
        self._results = []


class ImpatientTier(OpenTier):
    """Says what cannot be."""

    probe_deadline = -1


class TierOfNothing(KeyedTierManager):
    """Its store is in a module that is nowhere."""

    def __init__(self, offloading_spec, primary_kv_view, tier_type):
        super().__init__(offloading_spec, primary_kv_view, tier_type, store="no_such_module:Store", options={})


class ClientlessTier(KeyedTierManager):
    """Its store's module needs a package that is not there."""

    def __init__(self, offloading_spec, primary_kv_view, tier_type):
        super().__init__(offloading_spec, primary_kv_view, tier_type, store="clientless:Store", options={})
