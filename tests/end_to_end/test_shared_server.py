"""Whole engines that share a server: hits from each other, and a bad server delays a request no longer than agreed."""

import pytest
from proxy import Faults, Proxy
from whole_engine import BLOCK_BYTES, WholeEngine, make_keys

from kvtier import KVCacheGroup, Namespace, OffloadingConfig, create_spec
from kvtier.events import TierState
from kvtier.testing.patience import wait_for

LOAD_DEADLINE = 0.5


class SharingEngine(WholeEngine):
    """The same engine, its blocks in a server instead of on a disk."""

    def __init__(self, url, num_blocks=16, **tier):
        extra = {
            "spec_name": "TieringOffloadingSpec",
            "cpu_bytes_to_use": num_blocks * BLOCK_BYTES,
            "secondary_tiers": [{"type": "resp", "url": url, **tier}],
            "load_deadline": LOAD_DEADLINE,
            "probe_deadline": 0.2,
        }
        config = OffloadingConfig(
            extra_config=extra,
            groups=(KVCacheGroup(16, ("layer",)),),
            engine_block_bytes=BLOCK_BYTES,
            namespace=Namespace({"model": "whole"}),
            engine_id="sharing",
        )
        self.spec = create_spec(config)
        self.manager = self.spec.get_manager()
        self.arena = self.spec.arena
        self.table = self.manager._primary.table
        self._requests = 0


@pytest.fixture
def engines():
    made = []

    def make(url, **tier):
        made.append(SharingEngine(url, **tier).start())
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def test_what_one_engine_computed_the_other_restores(engines, valkey):
    one, other = engines(valkey.url), engines(valkey.url)
    for first, second, prefix in ((one, other, "a"), (other, one, "b")):
        keys = make_keys(8, prefix)
        first.store(keys)
        first.idle()
        assert second.restore(keys) == 8
        second.idle()


def test_a_server_that_hangs_costs_a_request_its_deadline_and_no_more(engines, valkey):
    proxy = Proxy(valkey.address)
    try:
        engine = engines(proxy.url, timeout=1.0, job_deadline=5.0)
        keys = make_keys(8, "c")
        engine.store(keys)
        engine.idle()
        engine.store(make_keys(16, "something else"))  # the primary has forgotten them
        engine.idle()
        for faults in (Faults(swallow=True), Faults(rate=2000)):
            proxy.faults = faults
            assert engine.restore(keys) == 0
            engine.idle()
            proxy.heal()
            # Up again and asked anew: what could not be fetched was not there, for a while.
            wait_for(lambda: engine.step() or engine.state() is TierState.UP, "the tier is up")
            wait_for(lambda: engine.restore(keys) == 8, "the blocks are found again")
            engine.store(make_keys(16, f"forget {faults.rate}"))
            engine.idle()
    finally:
        proxy.close()
