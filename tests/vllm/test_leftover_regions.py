"""What engines that were killed left in shared memory."""

import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from region_rig import config

from kvtier.adapters.vllm.device import RegionTieringSpec, region_path, sweep_leftovers


@pytest.fixture
def folder():
    """A folder of shared memory that only this test looks at."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        yield Path(made)


def test_only_regions_that_nobody_holds_are_swept(folder):
    left, opened, mapped, readable = (folder / f"vllm_offload_{name}.mmap" for name in "abcd")
    others = [folder / "vllm_offload_e.other", folder / "psm_1234", folder / "vllm_offload_f.mmap"]
    for path in (left, opened, mapped, readable, *others[:2]):
        path.write_bytes(bytes(8192))
    others[2].symlink_to(others[1])
    with opened.open("r+b"), readable.open("rb"), mapped.open("r+b") as file:
        mapping = mmap.mmap(file.fileno(), 0)
        file.close()
        assert sweep_leftovers(folder) == [left]
        assert sweep_leftovers(folder) == []
        mapping.close()
    assert sorted(sweep_leftovers(folder)) == [opened, mapped, readable]
    assert sorted(folder.iterdir()) == sorted(others)


@pytest.mark.root
def test_another_users_regions_are_not_swept(folder):
    if os.getuid() != 0:
        pytest.skip("NOT TESTED: another user's regions (needs root)")
    path = folder / "vllm_offload_a.mmap"
    path.write_bytes(bytes(8192))
    os.chown(path, 65534, 65534)
    assert sweep_leftovers(folder) == []
    os.chown(path, 0, 0)
    assert sweep_leftovers(folder) == [path]


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from region_rig import RegionTieringSpec, config
spec = RegionTieringSpec(config(sys.argv[2]))
spec.arena.row(0)[:4] = b"left"
print("made", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_engine_left_is_swept_at_the_next_start(engine_id):
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), engine_id]
    path = region_path(engine_id)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert "made\n" in iter(child.stdout.readline, "")
        with RegionTieringSpec(config(f"{engine_id}-another")) as another:
            assert another.arena
            assert path.exists(), "its engine lives"
        child.kill()
    assert path.exists(), "killed before its workers had attached"
    with RegionTieringSpec(config(engine_id)) as again:
        assert not any(again.arena.row(0)[:4])
    assert not path.exists()
