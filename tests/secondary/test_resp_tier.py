"""The shipped suite on the tier, over each executor and a cluster; and what engines that share a server see."""

from dataclasses import replace

import pytest

from kvtier.abc import TierContext
from kvtier.errors import ConfigError
from kvtier.events import TierState
from kvtier.namespace import Namespace
from kvtier.secondary.resp import RespTierManager
from kvtier.testing.stores import flip_bit, make_key, make_payload
from kvtier.testing.tier_rig import SuiteSpec, TierRig
from kvtier.testing.tiers import TierSuite
from kvtier.types import LookupResult

HIT, MISS = LookupResult.HIT, LookupResult.MISS


def name_of(tier, key):
    return f"kvtier:{tier._namespace.fingerprint.hex()}:{key.hex()}".encode()


class TestResp(TierSuite):
    @pytest.fixture(autouse=True)
    def _server(self, valkey):
        self.options = {"url": valkey.url}
        self.client = valkey.client()
        super().setup_method()
        yield
        super().teardown_method()
        self.client.close()

    def setup_method(self):
        """The server comes as a fixture, after this."""

    def teardown_method(self):
        pass

    def make_tier(self, offloading_spec, primary_kv_view):
        return RespTierManager(offloading_spec, primary_kv_view, "resp", **self.options)

    def plant(self, tier, key, raw):
        self.client.set(name_of(tier, key), raw)

    def peek(self, tier, key):
        return self.client.get(name_of(tier, key))

    def test_blocks_outlive_the_tier(self):
        rig = self.rig
        assert rig.store(range(20)).success
        rig.tier.shutdown()
        rig.attach(self.make_tier(rig.spec, rig.arena.view))
        rig.tier.start()
        rig.wait_up()
        assert rig.load(range(20))[1] == list(range(20))

    def test_it_says_how_full_its_servers_are(self):
        rig = self.rig
        rig.store(range(20))
        rig.wait(lambda: rig.tier.get_stats().get("bytes", 0) > 0, "the servers have said it")
        stats = rig.tier.get_stats()
        assert "blocks" not in stats, "nobody counts them"
        assert "capacity_bytes" not in stats, "these have no limit"


class TestRespOnThreads(TestResp):
    def make_tier(self, offloading_spec, primary_kv_view):
        return super().make_tier(SuiteSpec(replace(offloading_spec.tier_context, arena_fd=None)), primary_kv_view)


class TestRespInline(TestResp):
    def make_tier(self, offloading_spec, primary_kv_view):
        return super().make_tier(SuiteSpec(replace(offloading_spec.tier_context, inline_io=True)), primary_kv_view)


class TestRespCluster(TestRespOnThreads):
    @pytest.fixture(autouse=True)
    def _server(self, valkey_cluster):
        from redis.cluster import ClusterNode, RedisCluster

        nodes = [ClusterNode(*node.address) for node in valkey_cluster.nodes]
        self.options = {"url": valkey_cluster.urls, "cluster": True}
        self.client = RedisCluster(startup_nodes=nodes)
        TierSuite.setup_method(self)
        yield
        TierSuite.teardown_method(self)
        self.client.close()


@pytest.fixture
def make_rig(valkey):
    """Makes engines that share the server; `identity` is whose blocks they take for theirs."""
    rigs = []

    def make(identity=None, *, process=False, **options):
        context = TierContext(namespace=Namespace(identity or {"model": "shared", "rank": 0}))
        rig = TierRig(context)
        if not process:
            rig.spec = SuiteSpec(replace(rig.spec.tier_context, arena_fd=None))
        rig.attach(RespTierManager(rig.spec, rig.arena.view, "resp", **{"url": valkey.url, **options}))
        rig.tier.start()
        rigs.append(rig)
        rig.wait_up()
        return rig

    yield make
    for rig in rigs:
        rig.close()


def test_what_one_engine_stores_another_loads_in_both_directions(make_rig):
    left, right = make_rig(), make_rig()
    assert left.store(range(10)).success
    assert right.store(range(10, 20)).success
    assert right.load(range(10))[1] == list(range(10))
    assert left.load(range(10, 20))[1] == list(range(10, 20))


def test_two_engines_at_the_same_time(make_rig):
    """Both store the same blocks, and load what the other stores, with all jobs in flight at once."""
    rigs = [make_rig(process=True), make_rig(process=True)]
    rounds = 8
    for turn in range(rounds):
        numbers = [turn * 8 + index for index in range(8)]
        jobs = []
        for rig in rigs:
            for slot, number in enumerate(numbers):
                rig.fill(slot, make_payload(number, rig.block_bytes))
            jobs.append(rig.submit([make_key(number) for number in numbers], range(8), load=False))
        former = [number - 8 for number in numbers] if turn else []
        loads = [rig.submit([make_key(number) for number in former], range(32, 32 + len(former)), True) for rig in rigs]
        for rig, job, load in zip(rigs, jobs, loads, strict=True):
            assert rig.finish(job).success
            assert rig.finish(load).success
            for slot, number in enumerate(former, start=32):
                assert rig.read(slot) == make_payload(number, rig.block_bytes)
    for rig in rigs:
        assert rig.load(range(24))[1] == list(range(24))


IDENTITY = {
    "model": "m",
    "revision": "1",
    "dtype": "bfloat16",
    "layout": "NHD",
    "tokens_per_block": 16,
    "world_size": 2,
    "rank": 0,
}
OTHERS = {"model": "n", "revision": "2", "dtype": "float16", "layout": "HND", "tokens_per_block": 32, "rank": 1}


def test_blocks_of_another_identity_are_invisible(make_rig):
    ours = make_rig(IDENTITY)
    assert ours.store([1, 2]).success
    for key, value in OTHERS.items():
        other = make_rig({**IDENTITY, key: value})
        assert other.lookup(1) is MISS, key
        assert other.load([1, 2])[1] == [], key
        assert other.store([3]).success
        assert ours.lookup(3) is MISS, key
        other.tier.shutdown()
    assert ours.load([1, 2])[1] == [1, 2]


def test_a_store_that_lies_yields_misses_only(make_rig, valkey):
    rig = make_rig()
    client = valkey.client()
    numbers = list(range(1, 7))
    assert rig.store(numbers).success
    names = {number: name_of(rig.tier, make_key(number)) for number in numbers}
    raw = {number: client.get(name) for number, name in names.items()}
    other = make_rig({"model": "another"})
    other.store([6])
    client.set(names[1], raw[2])  # another key's value
    client.set(names[2], raw[2][: len(raw[2]) // 2])  # half a value
    client.set(names[3], bytes(len(raw[3])))  # nothing
    client.set(names[4], make_payload(99, len(raw[4])))  # garbage
    client.set(names[5], flip_bit(raw[5], 5000))
    client.set(names[6], client.get(name_of(other.tier, make_key(6))))  # another model's value of the same key
    result, loaded = rig.load(numbers)
    assert not result.success
    assert loaded == []
    assert client.exists(*names.values()) == 0
    assert rig.store(numbers).success
    assert rig.load(numbers)[1] == numbers
    client.close()


def test_an_old_value_is_a_miss_after_a_reset(make_rig, valkey):
    """The value that was stored before the weights changed, put back where the new one belongs."""
    rig = make_rig()
    client = valkey.client()
    rig.store([1])
    old = client.get(name_of(rig.tier, make_key(1)))
    rig.tier.drain_jobs()
    rig.tier.start_epoch(b"new weights" * 2)
    rig.wait_up()
    rig.store([1])
    client.set(name_of(rig.tier, make_key(1)), old)
    assert rig.load([1])[1] == []
    client.close()


def test_the_option_that_is_wrong_is_named():
    rig = TierRig(TierContext(namespace=Namespace({"model": "m"})))
    for options, key in [
        ({"url": "http://host"}, "url"),
        ({"url": []}, "url"),
        ({"url": "redis://host:99999"}, "url"),
        ({"url": "redis://host/x"}, "url"),
        ({"url": ["redis://a", "redis://b"]}, "url"),
        ({"url": "redis://host/1", "cluster": True}, "url"),
        ({"url": "unix:///run/v", "cluster": True}, "cluster"),
        ({"url": "redis://host", "tls_ca_file": "/ca"}, "tls_ca_file"),
        ({"url": "rediss://host", "tls_ca_file": "/no/such/file"}, "tls_ca_file"),
        ({"url": "redis://host", "username": "me"}, "username"),
        ({"url": "redis://host", "password_env": "KVTIER_NO_SUCH_VARIABLE"}, "password_env"),
        ({"url": "redis://host", "password_file": "/no/such/file"}, "password_file"),
        ({"url": "redis://host", "prefix": "{a}"}, "prefix"),
        ({"url": "redis://host", "ttl": 0.0}, "ttl"),
        ({"url": "redis://host", "timeout": 0.0}, "timeout"),
        ({"url": "redis://host", "connect_timeout": -1.0}, "connect_timeout"),
        ({"url": "redis://host", "connections": 0}, "connections"),
        ({"url": "redis://host", "job_deadline": 0.0}, "job_deadline"),
    ]:
        with pytest.raises(ConfigError) as caught:
            RespTierManager(rig.spec, rig.arena.view, "resp", **options)
        assert caught.value.key == key, options
    rig.close()


@pytest.mark.parametrize("url", ["redis://me:hunter2@host", "redis://:hunter2@host:x", "redis://hunter2@host"])
def test_a_password_in_the_url_is_refused_and_not_shown(url):
    rig = TierRig(TierContext(namespace=Namespace({"model": "m"})))
    with pytest.raises(ConfigError) as caught:
        RespTierManager(rig.spec, rig.arena.view, "resp", url=url)
    assert "hunter2" not in str(caught.value) + repr(caught.value) + repr(caught.value.__dict__)
    rig.close()


@pytest.mark.parametrize("cluster", [False, True])
def test_a_tier_without_a_server_starts_down_and_says_why(caplog, cluster):
    rig = TierRig(TierContext(namespace=Namespace({"model": "m"})))
    rig.attach(RespTierManager(rig.spec, rig.arena.view, "resp", url="redis://127.0.0.1:1", cluster=cluster))
    rig.tier.start()
    rig.wait(lambda: rig.tier.state is TierState.DOWN, "the tier is down")
    assert "127.0.0.1:1" in rig.tier.state_reason
    assert "refused" in rig.tier.state_reason
    assert "Exception" not in rig.tier.state_reason
    assert rig.lookup(1) is MISS
    rig.close()
