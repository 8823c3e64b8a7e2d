"""A device that the kernel makes slow (cgroup v1, blkio throttling): whoever waits for it feels it, nobody else."""

import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from disk_rigs import QUICK, Asleep, make_rig, start, submit_store

from kvtier.events import TierState
from kvtier.secondary.settings import Deadlines
from kvtier.testing.stores import make_key
from kvtier.testing.tier_rig import TierRig
from kvtier.types import LookupResult

CONTROLLER = Path("/sys/fs/cgroup/blkio")
BLOCK_BYTES = 64 << 10
ALL = list(range(16))
SLOW = 1 << 20
"""Bytes a second: all blocks take a second, where the device itself takes milliseconds."""


class ThrottledDevice:
    """A control group whose processes get only so many bytes a second of one device."""

    def __init__(self, path):
        device = os.stat(path).st_dev
        place = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
        if not place.exists():
            pytest.skip(f"{path} is on no block device")
        if (place / "partition").exists():
            place = place.resolve().parent
        self._device = (place / "dev").read_text().strip()
        self._group = CONTROLLER / f"kvtier-test-{os.getpid()}"
        try:
            self._group.mkdir()
            self.limit(SLOW)
        except OSError as error:
            self.close()
            pytest.skip(f"no blkio throttling of control groups (v1) here: {error}")

    def limit(self, bytes_per_second):
        """Allow so many bytes a second each way; 0: any number."""
        for name in ("read_bps_device", "write_bps_device"):
            (self._group / f"blkio.throttle.{name}").write_text(f"{self._device} {bytes_per_second}")

    def hold(self, pid):
        """Slow a process down."""
        (self._group / "cgroup.procs").write_text(str(pid))

    def close(self):
        with suppress(OSError):
            self.limit(0)
            for pid in (self._group / "cgroup.procs").read_text().split():
                (CONTROLLER / "cgroup.procs").write_text(pid)
            self._group.rmdir()


@pytest.fixture
def device(tmp_path):
    if os.geteuid() != 0 or not CONTROLLER.is_dir():
        pytest.skip(f"needs root and {CONTROLLER} (cgroup v1)")
    device = ThrottledDevice(tmp_path)
    yield device
    device.close()


@pytest.fixture
def rig(device) -> TierRig:
    rig = make_rig(num_blocks=64, block_bytes=BLOCK_BYTES)
    yield rig
    device.limit(0)  # what is queued in the kernel may end: a process waits for it even when killed
    rig.close()


@pytest.mark.root
def test_a_slow_device_delays_its_own_jobs_only(rig, device, tmp_path):
    tier = start(rig, tmp_path / "tier", capacity=4 << 20)
    assert rig.store(ALL).success
    device.hold(tier.io_pid)
    jobs = [
        rig.submit([make_key(number) for number in ALL], range(40, 40 + len(ALL)), load=True),
        submit_store(rig, range(100, 100 + len(ALL))),
    ]
    asleep = Asleep()
    while not rig.results.keys() >= set(jobs):
        with asleep:
            assert tier.lookup(make_key(1), rig.request) is LookupResult.HIT
            rig.poll()
        time.sleep(0.001)  # the rest of a scheduler's step
    for job in jobs:
        assert rig.results[job].success
        assert rig.results[job].transfer_time > 0.4, "the device was not slow"
    assert asleep.longest < 0.15, "a scheduler's step waited for the device"
    device.limit(0)
    assert rig.load(ALL)[1] == ALL
    assert tier.state is TierState.UP


@pytest.mark.root
def test_a_device_slower_than_its_deadline_is_done_without_until_it_is_quick_again(rig, device, tmp_path):
    deadlines = Deadlines(job=0.5, overtaken_job=2.0, start=20.0, drain=0.5)
    tier = start(rig, tmp_path / "tier", capacity=4 << 20, settings=replace(QUICK, deadlines=deadlines))
    assert rig.store(ALL).success
    device.limit(32 << 10)
    device.hold(tier.io_pid)
    job = rig.submit([make_key(number) for number in ALL], range(40, 40 + len(ALL)), load=True)
    rig.wait(lambda: tier.state is TierState.DOWN, "it is given up")
    assert tier.lookup(make_key(1), rig.request) is LookupResult.MISS
    assert job not in rig.results, "a slot was released that the device may still write"
    device.limit(0)
    assert not rig.finish(job).success
    rig.wait_up()
    assert rig.load(ALL)[1] == ALL
    rig.assert_each_job_answered_once()
