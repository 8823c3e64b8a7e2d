"""Whole engines that share a server: hits from each other, and a bad server delays a request no longer than agreed."""

import pytest
from proxy import Faults, Proxy
from whole_engine import WholeEngine, make_keys

from kvtier.events import TierState
from kvtier.testing.patience import wait_for

LOAD_DEADLINE = 5.0


@pytest.fixture
def engines():
    made = []

    def make(url, **tier):
        shared = {"type": "resp", "url": url, **tier}
        made.append(WholeEngine(None, tier=shared, load_deadline=LOAD_DEADLINE).start())
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
