"""The shipped suite on the tier `filesystem`, over each executor; and what engines that share a directory see."""

import itertools
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from kvtier.abc import TierContext
from kvtier.errors import ConfigError
from kvtier.events import BlocksFailed
from kvtier.namespace import Namespace
from kvtier.secondary.filesystem import FilesystemTierManager
from kvtier.testing.stores import flip_bit, make_key, make_payload
from kvtier.testing.tier_rig import SuiteSpec, TierRig
from kvtier.testing.tiers import TierSuite
from kvtier.types import FailureCause, LookupResult


def file_of(path, tier, key):
    (file,) = Path(path, tier._namespace.fingerprint.hex()).glob(f"*/{key.hex()}")
    return file


class TestFilesystem(TierSuite):
    def setup_method(self):
        self.directory = Path(tempfile.mkdtemp(prefix="kvtier-shared-"))
        super().setup_method()

    def teardown_method(self):
        super().teardown_method()
        shutil.rmtree(self.directory, ignore_errors=True)

    def make_tier(self, offloading_spec, primary_kv_view):
        return FilesystemTierManager(
            offloading_spec, primary_kv_view, "filesystem", path=str(self.directory), capacity="1MiB", threads=2
        )

    def plant(self, tier, key, raw):
        file_of(self.directory, tier, key).write_bytes(raw)

    def peek(self, tier, key):
        return file_of(self.directory, tier, key).read_bytes()

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
        rig.wait(lambda: rig.tier.get_stats().get("capacity_bytes") == 1 << 20, "the capacity is known")
        fresh = itertools.count()
        rig.wait(lambda: (rig.store([next(fresh)]), rig.tier.get_stats().get("blocks", 0) >= 10)[1], "it has looked")
        stats = rig.tier.get_stats()
        assert stats["blocks"] <= next(fresh)
        assert stats["blocks"] * rig.block_bytes < stats["bytes"] <= 1 << 20


class TestFilesystemInline(TestFilesystem):
    def make_tier(self, offloading_spec, primary_kv_view):
        return super().make_tier(SuiteSpec(replace(offloading_spec.tier_context, inline_io=True)), primary_kv_view)


class Recorder:
    def __init__(self):
        self.events = []

    def on_event(self, event):
        self.events.append(event)


@pytest.fixture
def make_rig(tmp_path):
    """Makes engines that share a directory; `identity` is whose blocks they take for theirs."""
    rigs = []

    def make(**identity):
        recorder = Recorder()
        namespace = Namespace({"model": "shared", "rank": 0, **identity})
        rig = TierRig(TierContext(namespace=namespace, observer=recorder))
        rig.recorder = recorder
        path = str(tmp_path / "shared")
        rig.attach(FilesystemTierManager(rig.spec, rig.arena.view, "filesystem", path=path, capacity="16MiB"))
        rig.tier.start()
        rigs.append(rig)
        rig.wait_up()
        return rig

    yield make
    for rig in rigs:
        rig.close()


def test_two_engines_share_in_both_directions_and_the_same_block_at_once(make_rig):
    rigs = [make_rig(), make_rig()]
    assert rigs[0].store(range(100, 110)).success
    assert rigs[1].load(range(100, 110))[1] == list(range(100, 110))
    assert rigs[1].store(range(110, 120)).success
    assert rigs[0].load(range(110, 120))[1] == list(range(110, 120))
    for turn in range(6):
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


def test_blocks_of_another_identity_are_invisible(make_rig):
    ours = make_rig()
    assert ours.store([1, 2]).success
    for other in ({"model": "another"}, {"revision": "2"}, {"dtype": "float16"}, {"layout": "other"}, {"rank": 1}):
        theirs = make_rig(**other)
        assert theirs.lookup(1) is LookupResult.MISS
        assert theirs.load([1, 2])[1] == []


def test_whatever_stands_in_a_blocks_place_is_a_miss_counted_by_cause(make_rig, tmp_path):
    ours, theirs = make_rig(), make_rig(model="another")
    ours.store(range(8))
    theirs.store(range(8))
    files = [file_of(tmp_path / "shared", ours.tier, make_key(number)) for number in range(8)]
    raw = [file.read_bytes() for file in files]
    files[0].write_bytes(raw[1])  # another key's
    files[1].write_bytes(raw[1][:4000])  # half
    files[2].write_bytes(b"")
    files[3].write_bytes(make_payload(99, len(raw[3])))  # garbage
    files[4].write_bytes(flip_bit(raw[4], 5000))
    files[5].write_bytes(file_of(tmp_path / "shared", theirs.tier, make_key(5)).read_bytes())
    files[6].write_bytes(raw[6][:-124] + b"\x7f" + raw[6][-123:])  # another version of the format
    files[7].unlink()
    result, loaded = ours.load(range(8))
    assert not result.success
    assert loaded == []
    causes = {event.cause: 0 for event in ours.recorder.events if isinstance(event, BlocksFailed)}
    assert causes.keys() == {
        FailureCause.CORRUPT,
        FailureCause.FOREIGN,
        FailureCause.OLD_FORMAT,
        FailureCause.ABSENT,
    }
    assert not any(file.exists() for file in files)
    assert ours.store(range(8)).success
    assert ours.load(range(8))[1] == list(range(8))


def test_an_old_file_is_a_miss_after_a_reset(make_rig, tmp_path):
    """The file that was stored before the weights changed, put back where the new one belongs."""
    rig = make_rig()
    assert rig.store([1]).success
    old = file_of(tmp_path / "shared", rig.tier, make_key(1)).read_bytes()
    rig.tier.drain_jobs()
    rig.tier.start_epoch(b"new weights" * 2)
    rig.wait_up()
    assert rig.store([1]).success
    file_of(tmp_path / "shared", rig.tier, make_key(1)).write_bytes(old)
    assert rig.load([1])[1] == []


def test_the_option_that_is_wrong_is_named(tmp_path):
    rig = TierRig(TierContext(namespace=Namespace({"model": "m"})))
    good = {"path": str(tmp_path), "capacity": "1GiB"}
    for wrong in (
        {"path": ""},
        {"capacity": "much"},
        {"capacity": 1000},
        {"min_free": -1},
        {"threads": 0},
        {"job_deadline": 0.0},
    ):
        with pytest.raises(ConfigError) as caught:
            FilesystemTierManager(rig.spec, rig.arena.view, "filesystem", **{**good, **wrong})
        assert caught.value.key == next(iter(wrong))
    rig.close()
