"""The shipped suite on every tier, over each of the three executors."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import xxhash

from kvtier.secondary.disk import DiskTierManager
from kvtier.secondary.example import ExampleSecondaryTierManager
from kvtier.secondary.memory_tier import MemoryTierManager
from kvtier.testing.stores import make_key, make_payload
from kvtier.testing.tier_rig import SuiteSpec
from kvtier.testing.tiers import TierSuite


def on_threads(spec):
    """The same engine with an arena that nobody else can map."""
    return SuiteSpec(replace(spec.tier_context, arena_fd=None))


def inline(spec):
    return SuiteSpec(replace(spec.tier_context, inline_io=True))


class TestExample(TierSuite):
    def make_tier(self, offloading_spec, primary_kv_view):
        return ExampleSecondaryTierManager(offloading_spec, primary_kv_view, "example", custom_param=3)

    def plant(self, tier, key, raw):
        tier._blocks[key] = (raw, tier._blocks[key][1])

    def peek(self, tier, key):
        return tier._blocks[key][0]

    def test_it_counts_its_blocks(self):
        self.rig.store([1, 2])
        assert self.rig.tier.get_num_blocks() == 2
        assert xxhash.xxh3_128_digest(self.peek(self.rig.tier, make_key(1)))


class TestMemory(TierSuite):
    def make_tier(self, offloading_spec, primary_kv_view):
        return MemoryTierManager(offloading_spec, primary_kv_view, "memory", capacity="1MiB")

    def test_it_says_how_full_it_is(self):
        rig = self.rig
        rig.store(range(20))
        rig.wait(lambda: rig.tier.get_stats().get("blocks") == 20, "the tier counts its blocks")
        stats = rig.tier.get_stats()
        assert stats["capacity_bytes"] == 1 << 20
        assert 20 * rig.block_bytes < stats["bytes"] <= stats["capacity_bytes"]
        for first in range(20, 180, 40):
            rig.store(range(first, first + 40))
        rig.wait(lambda: rig.tier.get_stats()["bytes"] > 19 / 20 * (1 << 20), "it is full")
        assert rig.tier.get_stats()["bytes"] <= 1 << 20


class TestMemoryOnThreads(TestMemory):
    def make_tier(self, offloading_spec, primary_kv_view):
        return super().make_tier(on_threads(offloading_spec), primary_kv_view)


class TestMemoryInline(TestMemory):
    def make_tier(self, offloading_spec, primary_kv_view):
        return super().make_tier(inline(offloading_spec), primary_kv_view)


class TestDisk(TierSuite):
    def setup_method(self):
        self.directory = Path(tempfile.mkdtemp(prefix="kvtier-disk-"))
        super().setup_method()

    def teardown_method(self):
        super().teardown_method()
        shutil.rmtree(self.directory)

    def make_tier(self, offloading_spec, primary_kv_view):
        return DiskTierManager(
            offloading_spec, primary_kv_view, "disk", path=str(self.directory), capacity="1MiB", threads=2
        )

    def _find(self, payload):
        for path in self.directory.rglob("*"):
            if path.is_file() and (offset := path.read_bytes().find(payload)) >= 0:
                return path, offset
        return None

    def plant(self, tier, key, raw):
        path, offset = self._find(make_payload(1, self.rig.block_bytes))
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(raw)

    def peek(self, tier, key):
        assert key == make_key(1)
        payload = make_payload(1, self.rig.block_bytes)
        return payload if self._find(payload) else None

    def test_blocks_outlive_the_tier(self):
        rig = self.rig
        assert rig.store(range(20)).success
        rig.tier.shutdown()
        rig.attach(self.make_tier(rig.spec, rig.arena.view))
        rig.tier.start()
        rig.wait_up()
        assert rig.load(range(20))[1] == list(range(20))
        assert rig.tier.get_stats()["blocks"] == 20


class TestDiskOnThreads(TestDisk):
    def make_tier(self, offloading_spec, primary_kv_view):
        return super().make_tier(on_threads(offloading_spec), primary_kv_view)


class TestDiskInline(TestDisk):
    def make_tier(self, offloading_spec, primary_kv_view):
        return super().make_tier(inline(offloading_spec), primary_kv_view)
