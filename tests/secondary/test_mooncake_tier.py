"""The shipped suite on the tier, over each executor; two engines with one pool; and a tier that lost its master."""

import itertools
import os
import signal
import uuid
from dataclasses import replace

import pytest

from kvtier.abc import TierContext
from kvtier.events import TierState
from kvtier.namespace import Namespace
from kvtier.secondary.mooncake import MooncakeTierManager
from kvtier.testing.patience import wait_for
from kvtier.testing.tier_rig import SuiteSpec, TierRig
from kvtier.testing.tiers import TierSuite


class TestMooncake(TierSuite):
    @pytest.fixture(autouse=True)
    def _pool(self, mooncake_pool, mooncake_values):
        self.values = mooncake_values
        self.options = {"master": mooncake_pool.address, "prefix": uuid.uuid4().hex}
        super().setup_method()
        yield
        super().teardown_method()

    def setup_method(self):
        """The pool comes as a fixture, after this."""

    def teardown_method(self):
        pass

    def make_tier(self, offloading_spec, primary_kv_view):
        return MooncakeTierManager(offloading_spec, primary_kv_view, "mooncake", **self.options)

    def _name(self, tier, key):
        return f"{self.options['prefix']}:{tier._namespace.fingerprint.hex()}:{key.hex()}"

    def plant(self, tier, key, raw):
        self.values.plant(self._name(tier, key), raw)

    def peek(self, tier, key):
        return self.values.peek(self._name(tier, key))


class TestMooncakeOnThreads(TestMooncake):
    def make_tier(self, offloading_spec, primary_kv_view):
        return super().make_tier(SuiteSpec(replace(offloading_spec.tier_context, arena_fd=None)), primary_kv_view)


class TestMooncakeInline(TestMooncake):
    def make_tier(self, offloading_spec, primary_kv_view):
        return super().make_tier(SuiteSpec(replace(offloading_spec.tier_context, inline_io=True)), primary_kv_view)


@pytest.fixture
def make_rig():
    """Makes engines of one pool; `model` is whose blocks they take for theirs."""
    rigs = []

    def make(pool, model="shared", **options):
        rig = TierRig(TierContext(namespace=Namespace({"model": model})))
        rigs.append(rig)
        rig.attach(MooncakeTierManager(rig.spec, rig.arena.view, "mooncake", master=pool.address, **options))
        rig.tier.start()
        rig.wait_up()
        return rig

    yield make
    for rig in rigs:
        rig.close()


def test_each_of_two_engines_hits_the_others_blocks(make_rig, make_pool):
    pool = make_pool()
    left, right, other = make_rig(pool), make_rig(pool), make_rig(pool, model="another")
    assert left.store(range(10)).success
    assert right.store(range(10, 20)).success
    assert right.load(range(10))[1] == list(range(10))
    assert left.load(range(10, 20))[1] == list(range(10, 20))
    assert other.load(range(20))[1] == []


def test_a_killed_io_process_takes_no_block_with_it(make_rig, make_pool):
    """Nor does it take the memory that this host lends."""
    rig = make_rig(make_pool(lent_bytes=0), segment=32 << 20)
    assert rig.store(range(10)).success
    os.kill(rig.tier.io_pid, signal.SIGKILL)
    rig.wait(lambda: rig.tier.state is not TierState.UP, "the tier sees it")
    rig.wait_up()
    assert rig.load(range(10))[1] == list(range(10))


def test_a_lost_host_does_not_take_the_tier_down(make_rig, make_pool):
    """Although job after job fails: here, the master does not notice the loss."""
    pool = make_pool(client_ttl=3600)
    rig = make_rig(pool, segment=32 << 20, host="127.0.0.2")
    wait_for(lambda: len(pool.hosts()) == 2, "both hosts lend memory")
    kept = {host: [] for host in pool.hosts()}
    numbers = itertools.count()
    while min(map(len, kept.values())) < 4:
        number, before = next(numbers), pool.host_of_blocks().keys()
        assert rig.store([number]).success
        (host,) = (host for name, host in pool.host_of_blocks().items() if name not in before)
        kept[host].append(number)
    pool.kill_lender()
    assert [rig.load([number])[1] for number in kept["127.0.0.1"][:4]] == [[]] * 4
    assert rig.tier.state is TierState.UP
    for number in kept["127.0.0.2"]:
        assert rig.load([number])[1] == [number]


def test_a_lost_master_costs_misses_and_the_tier_comes_back(make_rig, make_pool):
    pool = make_pool()
    rig = make_rig(pool)
    assert rig.store(range(10)).success
    pool.kill_master()
    assert rig.load(range(10))[1] == []
    rig.wait(lambda: rig.tier.state is not TierState.UP, "the tier sees it")
    pool.start()
    rig.wait_up()
    rig.wait(lambda: rig.store(range(10, 20)).success, "the lender has joined the new master")
    assert rig.load(range(10, 20))[1] == list(range(10, 20))
