"""A disk that is full while the tier writes to it."""

import contextlib
import os
import shutil
import subprocess

import pytest
from vllm_engine import Engine, prompt, wait_until_up

from kvtier.testing.patience import wait_for

pytestmark = pytest.mark.root

BLOCK = 128
MIB = 1 << 20
PROMPTS = [prompt(seed, 5 * BLOCK + 20) for seed in range(1100, 1104)]


@pytest.fixture
def small_disk(tmp_path):
    """Mount a filesystem of 16 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.getuid() or not shutil.which("mount"):
        pytest.skip("A FULL DISK WAS NOT TESTED: mounting a small filesystem needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"A FULL DISK WAS NOT TESTED: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(file, left):
    """Take all of a filesystem's space but `left` bytes."""
    status = os.statvfs(file.parent)
    with file.open("wb") as handle:
        os.posix_fallocate(handle.fileno(), 0, status.f_bavail * status.f_frsize - left)


def test_the_engine_serves_while_the_disk_is_full_and_stores_again_when_it_is_not(
    model, baseline, small_disk, tmp_path
):
    expected, stuffing = baseline(*PROMPTS), small_disk / "stuffing"
    keys = {"secondary_tiers": [{"type": "disk", "path": str(small_disk / "disk"), "capacity": "8MiB"}]}
    with Engine(model, tmp_path / "log", kvtier=keys) as engine:
        engine.wait_until_started()
        fill(stuffing, 3 * MIB // 8)

        def step(name):
            engine.generate(prompt(1, 20))
            return engine.metrics().get(name, 0)

        assert [engine.generate(asked)[0] for asked in PROMPTS[:3]] == expected[:3]
        wait_for(lambda: step("kvtier_failed_blocks.no_space.disk") > 0, what="a failed store")
        wait_for(lambda: step("kvtier_jobs.disk") == 0, what="answers to all jobs")
        engine.reset()
        assert [engine.generate(asked)[0] for asked in PROMPTS[:3]] == expected[:3]
        assert engine.external_hits() == 3 * 5 * BLOCK
        stuffing.unlink()
        before = step("kvtier_written_blocks.disk")
        seeds = iter(range(1200, 1300))
        wait_for(
            lambda: engine.generate(prompt(next(seeds), BLOCK + 9)) and step("kvtier_written_blocks.disk") > before,
            what="a store after there was space again",
        )
        assert engine.generate(PROMPTS[3])[0] == expected[3]
        assert not [name for name in engine.metrics() if name.startswith("kvtier_errors")]
    with contextlib.suppress(FileNotFoundError):
        stuffing.unlink()
    with Engine(model, tmp_path / "log-again", kvtier=keys) as engine:
        wait_until_up(engine)
        assert [engine.generate(asked)[0] for asked in PROMPTS] == expected
        assert engine.external_hits() > 0
