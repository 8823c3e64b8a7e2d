"""Tiers whose blocks a secret guards, or encrypts: the shipped suite, and what shows of the secret."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from kvtier.abc import TierContext
from kvtier.errors import ConfigError
from kvtier.events import TierState
from kvtier.namespace import Namespace
from kvtier.secondary.disk import DiskTierManager, StripedDiskTierManager
from kvtier.secondary.filesystem import FilesystemTierManager
from kvtier.secondary.keyed import KeyedTierManager
from kvtier.secondary.object import ObjectTierManager
from kvtier.secondary.resp import RespTierManager
from kvtier.testing.stores import make_payload
from kvtier.testing.tier_rig import SuiteSpec, TierRig
from kvtier.testing.tiers import TierSuite

SECRET = "correct horse battery staple"
NAMESPACE = Namespace({"model": "guarded"})
RECORD_BYTES = 128


class TestDiskEncrypted(TierSuite):
    encrypt = True

    def setup_method(self):
        self.directory = Path(tempfile.mkdtemp(prefix="kvtier-disk-"))
        (self.directory / "secret").write_text(SECRET)
        super().setup_method()

    def teardown_method(self):
        super().teardown_method()
        shutil.rmtree(self.directory)

    def make_tier(self, offloading_spec, primary_kv_view):
        spec = SuiteSpec(replace(offloading_spec.tier_context, inline_io=True))
        options = {"secret_file": str(self.directory / "secret"), "encrypt": self.encrypt}
        path = str(self.directory / "slab")
        return DiskTierManager(spec, primary_kv_view, "disk", path=path, capacity="1MiB", **options)

    def _place(self, key):
        """Return the data file and the offset of a block, by its record."""
        (headers,) = self.directory.glob("slab/*/headers")
        records = headers.read_bytes()
        slot = next(start for start in range(0, len(records), RECORD_BYTES) if records[start + 52 :].startswith(key))
        return headers.with_name("data-00000"), slot // RECORD_BYTES * self.rig.block_bytes

    def plant(self, tier, key, raw):
        path, offset = self._place(key)
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(raw)

    def peek(self, tier, key):
        path, offset = self._place(key)
        return path.read_bytes()[offset : offset + self.rig.block_bytes]

    def test_blocks_outlive_the_tier_and_cannot_be_read_on_the_disk(self):
        rig = self.rig
        assert rig.store(range(20)).success
        rig.tier.shutdown()
        (data,) = self.directory.glob("slab/*/data-00000")
        raw = data.read_bytes()
        assert [make_payload(number, rig.block_bytes) in raw for number in range(20)] == [not self.encrypt] * 20
        rig.attach(self.make_tier(rig.spec, rig.arena.view))
        rig.tier.start()
        rig.wait_up()
        assert rig.load(range(20))[1] == list(range(20))


class TestDiskWithSecret(TestDiskEncrypted):
    encrypt = False


def make_disk(rig, folder, **options):
    return DiskTierManager(rig.spec, rig.arena.view, "disk", path=str(folder / "slab"), capacity="16MiB", **options)


def make_striped(rig, folder, **options):
    path = [str(folder / "one"), str(folder / "two")]
    return StripedDiskTierManager(rig.spec, rig.arena.view, "disk", path=path, capacity="16MiB", **options)


def make_own(rig, folder, **options):
    options = {"capacity": 16 << 20, **options}
    return KeyedTierManager(rig.spec, rig.arena.view, "own", store="kvtier.stores.memory:MemoryStore", options=options)


@pytest.mark.parametrize("make_tier", [make_disk, make_striped, make_own])
def test_a_process_reads_the_secret_itself_and_shows_it_nowhere(tmp_path, caplog, make_tier):
    caplog.set_level(0)
    (tmp_path / "secret").write_text(SECRET)
    rig = TierRig(TierContext(namespace=NAMESPACE))
    tier = make_tier(rig, tmp_path, secret_file=str(tmp_path / "secret"), encrypt=True)
    rig.attach(tier)
    tier.start()
    rig.wait_up()
    assert rig.store(range(8)).success
    assert rig.load(range(8))[1] == list(range(8))
    for stripe in getattr(tier, "_stripes", [tier]):
        for name in ("cmdline", "environ"):
            with open(f"/proc/{stripe.io_pid}/{name}", "rb") as file:
                assert SECRET.encode() not in file.read()
        assert SECRET not in repr(vars(stripe)) + repr(stripe._options)
    assert SECRET not in caplog.text
    rig.close()


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "secret").write_text(SECRET)
    return {"secret_file": str(tmp_path / "secret"), "encrypt": True}


def stored_by(tier_class, tier_type, options, held):
    """Let a tier store blocks and load them; return what `held()` says is there, one after the other."""
    rig = TierRig(TierContext(namespace=NAMESPACE, inline_io=True))
    rig.attach(tier_class(rig.spec, rig.arena.view, tier_type, **options))
    rig.tier.start()
    rig.wait_up()
    assert rig.store(range(8)).success
    assert rig.load(range(8))[1] == list(range(8))
    stored = b"".join(held())
    assert len(stored) == 8 * (RECORD_BYTES + rig.block_bytes)
    assert not any(make_payload(number, rig.block_bytes) in stored for number in range(8))
    rig.close()


def test_a_bucket_holds_what_only_the_secret_reads(moto_s3, secret):
    from object_buckets import Raw

    raw = Raw.of(**moto_s3.options)
    options = {**moto_s3.options, "capacity": "64MiB", **secret}
    stored_by(ObjectTierManager, "object", options, lambda: map(raw.read, raw.paths()))


def test_a_server_holds_what_only_the_secret_reads(valkey, secret):
    with valkey.client() as client:
        stored_by(RespTierManager, "resp", {"url": valkey.url, **secret}, lambda: map(client.get, client.keys()))


def test_files_hold_what_only_the_secret_reads(tmp_path, secret):
    path = tmp_path / "shared"
    files = path.glob("*/*/*")
    options = {"path": str(path), "capacity": "16MiB", **secret}
    stored_by(FilesystemTierManager, "filesystem", options, lambda: (file.read_bytes() for file in files))


def test_a_secret_that_goes_away_keeps_the_tier_down_and_says_why(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    rig = TierRig(TierContext(namespace=NAMESPACE, inline_io=True))
    rig.attach(make_disk(rig, tmp_path, secret_file=str(secret), encrypt=True))
    secret.unlink()
    rig.tier.start()
    rig.wait(lambda: rig.tier.state is TierState.DOWN, "the tier is down")
    assert "the secret's file cannot be read" in rig.tier.state_reason
    assert not (tmp_path / "slab").exists()
    rig.close()


@pytest.mark.parametrize("make_tier", [make_disk, make_striped])
@pytest.mark.parametrize(
    ("options", "key"),
    [({"encrypt": True}, "encrypt"), ({"secret_file": "/no/such/file", "encrypt": True}, "secret_file")],
)
def test_the_option_that_is_wrong_is_named(tmp_path, make_tier, options, key):
    rig = TierRig(TierContext(namespace=NAMESPACE))
    with pytest.raises(ConfigError) as caught:
        make_tier(rig, tmp_path, **options)
    assert caught.value.key == key
    rig.close()
