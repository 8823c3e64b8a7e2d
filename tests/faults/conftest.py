"""Filesystems to break: over FUSE, failing on demand, and small ones in memory; skipped loudly where impossible."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from requirements import lacking, need_mounts, need_program

from kvtier.testing.patience import PATIENCE_SECONDS


class FaultyDisk:
    """A mounted FUSE filesystem; `fail` and `heal` change what it does from the next operation on.

    Attributes:
        path: where it is mounted.
        backing: the directory below it, past all faults.
    """

    def __init__(self, place):
        self.path, self.backing, self._control = place / "disk", place / "backing", place / "control.json"
        self.path.mkdir()
        self.backing.mkdir()
        self.heal()
        script = Path(__file__).with_name("faulty_filesystem.py")
        command = [sys.executable, str(script), str(self.path), str(self.backing), str(self._control)]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not os.path.ismount(self.path):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                lacking(f"FUSE does not mount here: {self._process.stderr.read().strip()[-200:]}")
            os.sched_yield()

    def fail(self, **plan):
        """Do as the plan says, in the words of faulty_filesystem.py."""
        fresh = self._control.with_suffix(".new")
        fresh.write_text(json.dumps(plan))
        fresh.replace(self._control)

    def heal(self):
        self.fail()

    def close(self):
        subprocess.run(["fusermount3", "-u", "-z", str(self.path)], capture_output=True, check=False)
        self._process.kill()
        self._process.wait()


@pytest.fixture
def faulty_disk(tmp_path):
    """A FaultyDisk; needs Debian's fuse3, mfusepy, and the right to mount."""
    need_program("fusermount3")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("NOT TESTED: no right to use /dev/fuse here")
    disk = FaultyDisk(tmp_path)
    yield disk
    disk.close()


class SmallDisk:
    """A tmpfs, which `remount` changes while it is in use."""

    def __init__(self, options):
        self.path = Path(tempfile.mkdtemp(prefix="kvtier-mount-"))
        done = self._mount("-t", "tmpfs", "-o", options, "kvtier-test", str(self.path))
        if done.returncode:
            self.path.rmdir()
            pytest.skip(f"may not mount here: {done.stderr.strip()}")

    def _mount(self, *arguments):
        return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)

    def remount(self, options):
        done = self._mount("-o", f"remount,{options}", str(self.path))
        assert not done.returncode, done.stderr

    def unmount(self):
        subprocess.run(["umount", "-l", str(self.path)], check=True)

    def mount_again(self, options="size=32m"):
        assert not self._mount("-t", "tmpfs", "-o", options, "kvtier-test", str(self.path)).returncode

    def close(self):
        if os.path.ismount(self.path):
            self.unmount()
        shutil.rmtree(self.path, ignore_errors=True)


@pytest.fixture
def small_disk():
    """Return a function that mounts a tmpfs with options; needs root and the right to mount."""
    need_mounts()
    disks = []

    def make(options="size=32m"):
        disks.append(SmallDisk(options))
        return disks[-1]

    yield make
    for disk in disks:
        disk.close()
