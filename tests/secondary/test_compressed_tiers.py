"""Tiers whose blocks are compressed: the shipped suite over each executor, what they save, and what they refuse."""

import os
import shutil
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from compressed_blocks import bfloat16

from kvtier.abc import TierContext
from kvtier.errors import ConfigError
from kvtier.namespace import Namespace
from kvtier.registry import check_tier
from kvtier.secondary.filesystem import FilesystemTierManager
from kvtier.testing.stores import flip_bit, make_key
from kvtier.testing.tier_rig import SuiteSpec, TierRig, succeeded
from kvtier.testing.tiers import TierSuite
from kvtier.tier_config import parse_tier

CONTEXT = TierContext(namespace=Namespace({"model": "compressed", "dtype": "torch.bfloat16"}))


class TestFilesystem(TierSuite):
    """With blocks of noise, as the suite has them."""

    compress = "zstd"

    def setup_method(self):
        self.directory = Path(tempfile.mkdtemp(prefix="kvtier-compressed-"))
        super().setup_method()

    def teardown_method(self):
        super().teardown_method()
        shutil.rmtree(self.directory, ignore_errors=True)

    def make_tier(self, offloading_spec, primary_kv_view):
        options = {"path": str(self.directory), "capacity": "1MiB", "threads": 2, "compress": self.compress}
        return FilesystemTierManager(offloading_spec, primary_kv_view, "filesystem", **options)

    def plant(self, tier, key, raw):
        self._file_of(tier, key).write_bytes(raw)

    def peek(self, tier, key):
        return self._file_of(tier, key).read_bytes()

    def _file_of(self, tier, key):
        (file,) = self.directory.joinpath(tier._namespace.fingerprint.hex()).glob(f"*/{key.hex()}")
        return file


class TestFilesystemAuto(TestFilesystem):
    compress = "auto"


class TestFilesystemOnThreads(TestFilesystem):
    def make_tier(self, offloading_spec, primary_kv_view):
        context = replace(offloading_spec.tier_context, arena_fd=None)
        return super().make_tier(SuiteSpec(context), primary_kv_view)


@pytest.fixture
def rig():
    rig = TierRig(CONTEXT)
    yield rig
    rig.close()


def attach(rig, path, **options):
    options = {"path": str(path / "shared"), "capacity": "16MiB", "threads": 2, **options}
    rig.attach(FilesystemTierManager(rig.spec, rig.arena.view, "filesystem", **options))
    rig.tier.start()
    rig.wait_up()


def store(rig, numbers):
    for slot, number in enumerate(numbers):
        rig.fill(slot, bfloat16(number, rig.block_bytes))
    return rig.finish(rig.submit([make_key(number) for number in numbers], range(len(numbers)), load=False))


def load(rig, numbers):
    """Return the numbers of the blocks that are loaded; fail for a wrong byte."""
    keys = [make_key(number) for number in numbers]
    result = rig.finish(rig.submit(keys, range(32, 32 + len(numbers)), load=True))
    loaded = [(slot, number) for slot, number in enumerate(numbers, 32) if succeeded(result, make_key(number))]
    assert all(rig.read(slot) == bfloat16(number, rig.block_bytes) for slot, number in loaded)
    return [number for _, number in loaded]


def saved(rig):
    stats = rig.tier.get_stats()
    return tuple(stats.get(name, 0) for name in ("compressed_blocks", "unwritten_bytes", "unread_bytes"))


def test_it_says_what_it_saves_and_goes_on_counting_after_the_process_was_killed(rig, tmp_path):
    attach(rig, tmp_path, compress="zstd")
    assert store(rig, range(20)).success
    rig.wait(lambda: saved(rig)[0] == 20, "the stores are counted")
    files = [file for file in tmp_path.joinpath("shared").rglob("*") if len(file.name) == 2 * len(make_key(1))]
    _, unwritten, _ = saved(rig)
    assert unwritten == 20 * (rig.block_bytes + 128) - sum(file.stat().st_size for file in files)
    assert unwritten > 0.2 * 20 * rig.block_bytes
    assert load(rig, range(10)) == list(range(10))
    rig.wait(lambda: saved(rig)[2] > 0, "the loads are counted")
    before = saved(rig)
    os.kill(rig.tier.io_pid, signal.SIGKILL)
    rig.wait(lambda: rig.tier.state.name != "UP", "the death is noticed")
    assert saved(rig) == before
    rig.wait_up()
    assert load(rig, range(20)) == list(range(20))
    rig.wait(lambda: saved(rig)[2] > before[2], "the loads of the new process are added")
    assert saved(rig)[:2] == before[:2]


def test_files_take_less_of_the_capacity(tmp_path):
    rig = TierRig(CONTEXT, block_bytes=64 << 10)
    try:
        attach(rig, tmp_path, compress="zstd", capacity="8MiB")
        for first in range(0, 100, 20):
            assert store(rig, range(first, first + 20)).success
        used = sum(one.lstat().st_blocks * 512 for one in tmp_path.joinpath("shared").rglob("*"))
        assert used < 0.9 * 100 * rig.block_bytes
    finally:
        rig.close()


def test_a_flipped_bit_is_a_miss(rig, tmp_path):
    attach(rig, tmp_path, compress="zstd")
    assert store(rig, range(5)).success
    (file,) = tmp_path.joinpath("shared").rglob(make_key(2).hex())
    file.write_bytes(flip_bit(file.read_bytes(), 12345))
    assert load(rig, range(5)) == [0, 1, 3, 4]


def test_engines_with_and_without_compression_share_what_both_can_read(rig, tmp_path):
    attach(rig, tmp_path)
    assert store(rig, range(5)).success
    rig.tier.shutdown()
    attach(rig, tmp_path, compress="auto")
    assert load(rig, range(5)) == list(range(5))
    assert store(rig, range(5, 10)).success
    rig.tier.shutdown()
    attach(rig, tmp_path, compress="zstd")
    assert load(rig, range(10)) == list(range(10))


@pytest.mark.parametrize("wrong", ["lz4", True, None, 1])
def test_other_words_are_refused(tmp_path, wrong):
    entry = {"type": "filesystem", "path": str(tmp_path), "capacity": "1GiB", "compress": wrong}
    with pytest.raises(ConfigError, match=r'compress.*one of "off", "zstd", "auto"'):
        check_tier(parse_tier(entry, "secondary_tiers[0]"))


def test_it_needs_its_package_only_if_it_is_asked_for(rig, tmp_path, monkeypatch):
    monkeypatch.setattr("kvtier.stores.compression.options.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'kvtier\[zstd\]'"):
        attach(rig, tmp_path, compress="zstd")
    attach(rig, tmp_path)
    assert store(rig, range(2)).success
