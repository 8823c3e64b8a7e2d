"""The shipped suite on the tier, over each executor and a real S3; and what engines that share a bucket see."""

from dataclasses import replace

import pytest
from object_buckets import Raw, settings_for

from kvtier.abc import TierContext
from kvtier.errors import ConfigError
from kvtier.events import TierState
from kvtier.namespace import Namespace
from kvtier.secondary.object import ObjectTierManager
from kvtier.stores.integrity.header import HEADER_BYTES
from kvtier.stores.object.catalogue import Catalogue
from kvtier.stores.object.client import connect
from kvtier.testing.stores import flip_bit, make_key, make_payload
from kvtier.testing.tier_rig import SuiteSpec, TierRig
from kvtier.testing.tiers import TierSuite
from kvtier.types import LookupResult

HIT, MISS = LookupResult.HIT, LookupResult.MISS
TEST_OPTIONS = {"capacity": "64MiB", "refresh": 0.2}


class Bucket:
    """What lies in the bucket of a tier, as a catalogue of its own finds it."""

    def __init__(self, options, block_bytes=8192):
        settings = settings_for(**{**options, "capacity": 1 << 26})
        self.raw = Raw(connect(settings), settings.root)
        self.block_bytes = block_bytes

    def catalogue(self, namespace):
        catalogue = Catalogue(self.raw.root, namespace.fingerprint.hex(), HEADER_BYTES + self.block_bytes)
        for path, size in self.raw.sizes().items():
            catalogue.add(path, size)
        return catalogue

    def peek(self, namespace, key):
        return self.raw.peek(self.catalogue(namespace), key, self.block_bytes)

    def plant(self, namespace, key, raw):
        self.raw.plant(self.catalogue(namespace), key, raw, namespace.fingerprint.hex(), self.block_bytes)


class OnPlace(TierSuite):
    def setup_method(self):
        """The server comes as a fixture, after this."""

    def teardown_method(self):
        pass

    def begin(self, place):
        self.options = {**place.options, **TEST_OPTIONS}
        self.bucket = Bucket(place.options)
        TierSuite.setup_method(self)

    def make_tier(self, offloading_spec, primary_kv_view):
        return ObjectTierManager(offloading_spec, primary_kv_view, "object", **self.options)

    def plant(self, tier, key, raw):
        self.bucket.plant(tier._namespace, key, raw)

    def peek(self, tier, key):
        return self.bucket.peek(tier._namespace, key)


class TestOnMoto(OnPlace):
    @pytest.fixture(autouse=True)
    def _server(self, moto_s3):
        self.begin(moto_s3)
        yield
        TierSuite.teardown_method(self)

    def test_a_pin_tells_which_blocks_the_bucket_still_has(self):
        rig, keys = self.rig, [make_key(number) for number in range(3)]
        assert rig.store(range(2)).success
        answer = rig.tier.pin(keys)
        rig.wait(lambda: answer.value is not None, "the pin")
        assert answer.value == frozenset(keys[:2])

    def test_blocks_outlive_the_tier(self):
        rig = self.rig
        assert rig.store(range(20)).success
        rig.tier.shutdown()
        rig.attach(self.make_tier(rig.spec, rig.arena.view))
        rig.tier.start()
        rig.wait_up()
        assert rig.load(range(20))[1] == list(range(20))

    def test_it_says_how_full_it_is(self):
        rig = self.rig
        rig.store(range(20))
        rig.wait(lambda: rig.tier.get_stats().get("blocks") == 20, "the tier counts its blocks")
        stats = rig.tier.get_stats()
        assert stats["bytes"] == 20 * (HEADER_BYTES + rig.block_bytes)
        assert stats["capacity_bytes"] == 64 << 20


class TestOnThreads(TestOnMoto):
    def make_tier(self, offloading_spec, primary_kv_view):
        return super().make_tier(SuiteSpec(replace(offloading_spec.tier_context, arena_fd=None)), primary_kv_view)


class TestInline(TestOnMoto):
    def make_tier(self, offloading_spec, primary_kv_view):
        return super().make_tier(SuiteSpec(replace(offloading_spec.tier_context, inline_io=True)), primary_kv_view)


class TestOnSwift(OnPlace):
    @pytest.fixture(autouse=True)
    def _server(self, swift_s3):
        self.begin(swift_s3)
        yield
        TierSuite.teardown_method(self)


@pytest.fixture
def make_rig(swift_s3):
    """Makes engines that share a bucket; `identity` is whose blocks they take for theirs."""
    rigs = []

    def make(identity=None, **options):
        rig = TierRig(TierContext(namespace=Namespace(identity or {"model": "shared", "rank": 0})))
        rigs.append(rig)
        rig.attach(
            ObjectTierManager(rig.spec, rig.arena.view, "object", **{**swift_s3.options, **TEST_OPTIONS, **options})
        )
        rig.tier.start()
        rig.wait_up()
        return rig

    yield make
    for rig in rigs:
        rig.close()


def wait_for_hits(rig, numbers):
    rig.wait(
        lambda: all(rig.tier.lookup(make_key(number), rig.request) is HIT for number in numbers),
        "what another engine stored is found",
    )


def test_what_one_engine_stores_another_loads_in_both_directions(make_rig):
    left, right = make_rig(), make_rig()
    assert left.store(range(10)).success
    assert right.store(range(10, 20)).success
    wait_for_hits(right, range(10))
    wait_for_hits(left, range(10, 20))
    assert right.load(range(10))[1] == list(range(10))
    assert left.load(range(10, 20))[1] == list(range(10, 20))


def test_both_store_the_same_blocks_at_once(make_rig):
    rigs = [make_rig(), make_rig()]
    for turn in range(3):
        numbers = [turn * 8 + index for index in range(8)]
        jobs = []
        for rig in rigs:
            for slot, number in enumerate(numbers):
                rig.fill(slot, make_payload(number, rig.block_bytes))
            jobs.append(rig.submit([make_key(number) for number in numbers], range(8), load=False))
        for rig, job in zip(rigs, jobs, strict=True):
            assert rig.finish(job).success
    for rig in rigs:
        assert rig.load(range(24))[1] == list(range(24))


def test_blocks_of_another_identity_are_invisible(make_rig):
    identity = {"model": "m", "revision": "1", "dtype": "bfloat16", "layout": "a", "rank": 0}
    ours = make_rig(identity)
    assert ours.store([1, 2]).success
    for key, value in {"model": "n", "revision": "2", "dtype": "float16", "layout": "b", "rank": 1}.items():
        other = make_rig({**identity, key: value})
        assert other.lookup(1) is MISS, key
        assert other.load([1, 2])[1] == [], key
        other.tier.shutdown()
    assert ours.load([1, 2])[1] == [1, 2]


def test_a_bucket_that_lies_yields_misses_only(make_rig, swift_s3):
    rig = make_rig()
    bucket, namespace = Bucket(swift_s3.options), rig.tier._namespace
    numbers = list(range(1, 6))
    for number in numbers:
        assert rig.store([number]).success
    raw = {number: bucket.peek(namespace, make_key(number)) for number in numbers}
    bucket.plant(namespace, make_key(1), raw[2])  # another key's value
    bucket.plant(namespace, make_key(2), raw[2][: len(raw[2]) // 2])  # half a value
    bucket.plant(namespace, make_key(3), bytes(len(raw[3])))  # nothing
    bucket.plant(namespace, make_key(4), make_payload(99, len(raw[4])))  # garbage
    bucket.plant(namespace, make_key(5), flip_bit(raw[5], 5000))
    result, loaded = rig.load(numbers)
    assert not result.success
    assert loaded == []
    assert rig.store(numbers).success
    assert rig.load(numbers)[1] == numbers


def test_an_old_value_is_a_miss_after_a_reset(make_rig, swift_s3):
    rig = make_rig()
    bucket = Bucket(swift_s3.options)
    rig.store([1])
    old = bucket.peek(rig.tier._namespace, make_key(1))
    rig.tier.drain_jobs()
    rig.tier.start_epoch(b"new weights" * 2)
    rig.wait_up()
    rig.store([1])
    bucket.plant(rig.tier._namespace, make_key(1), old)
    assert rig.load([1])[1] == []


def test_the_option_that_is_wrong_is_named():
    rig = TierRig(TierContext(namespace=Namespace({"model": "m"})))
    good = {"url": "s3://bucket/prefix", "capacity": "10GiB"}
    for options, key in [
        ({"url": "http://host"}, "url"),
        ({"url": "s3://"}, "url"),
        ({"url": "s3://bucket/a b"}, "url"),
        ({"url": "s3://bucket/" + "x" * 201}, "url"),
        ({"url": "s3://key:hunter2@bucket"}, "url"),
        ({"url": "s3://bucket?secret=hunter2"}, "url"),
        ({"endpoint": "host:80"}, "endpoint"),
        ({"endpoint": "http://host"}, "endpoint"),
        ({"endpoint": "https://me:hunter2@host"}, "endpoint"),
        ({"url": "gs://bucket", "endpoint": "https://host"}, "endpoint"),
        ({"url": "az://box", "region": "here"}, "region"),
        ({"url": "az://box", "path_style": True}, "path_style"),
        ({"url": "gs://box", "profile": "me"}, "profile"),
        ({"tls_ca_file": "/no/such/file"}, "tls_ca_file"),
        ({"capacity": "1MiB"}, "capacity"),
        ({"capacity": 0}, "capacity"),
        ({"pack_size": 10}, "pack_size"),
        ({"pack_size": "8MiB"}, "pack_size"),
        ({"ttl": 1.0}, "ttl"),
        ({"refresh": 0.0}, "refresh"),
        ({"timeout": 0.0}, "timeout"),
        ({"connect_timeout": -1.0}, "connect_timeout"),
        ({"requests": 0}, "requests"),
        ({"threads": 0}, "threads"),
        ({"job_deadline": 0.0}, "job_deadline"),
    ]:
        with pytest.raises(ConfigError) as caught:
            ObjectTierManager(rig.spec, rig.arena.view, "object", **{**good, **options})
        assert caught.value.key == key, options
        assert "hunter2" not in str(caught.value) + repr(caught.value.__dict__)
    rig.close()


@pytest.mark.parametrize("url", ["s3://bucket", "gs://bucket/a/b", "az://container/c"])
def test_every_provider_is_configured_alike(url):
    rig = TierRig(TierContext(namespace=Namespace({"model": "m"})))
    ObjectTierManager(rig.spec, rig.arena.view, "object", url=url, capacity="1GiB")
    rig.close()


def test_a_tier_without_a_server_starts_down_and_says_why(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    rig = TierRig(TierContext(namespace=Namespace({"model": "m"})))
    options = {"endpoint": "http://127.0.0.1:1", "allow_http": True, "region": "us-east-1", "timeout": 1.0}
    rig.attach(ObjectTierManager(rig.spec, rig.arena.view, "object", url="s3://b", capacity="1GiB", **options))
    rig.tier.start()
    rig.wait(lambda: rig.tier.state is TierState.DOWN, "the tier is down")
    assert "127.0.0.1:1" in rig.tier.state_reason
    assert "hunter2" not in rig.tier.state_reason
    assert rig.lookup(1) is MISS
    rig.close()
