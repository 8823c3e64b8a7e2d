"""Filesystems that fill up, become read-only, go away and come back, under a tier that works; real mounts, by root."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from disk_rigs import disk_tier, make_rig, start, striped_tier
from requirements import need_mounts

from kvtier.abc import StoreContext
from kvtier.errors import StoreUnavailableError
from kvtier.events import BlocksFailed, TierState
from kvtier.eviction.lru import LRUPolicy
from kvtier.namespace import Namespace
from kvtier.secondary.filesystem import FilesystemTierManager
from kvtier.stores import mounts
from kvtier.stores.filesystem.store import FilesystemStore
from kvtier.stores.mounts import check_mounted, mount_point_of
from kvtier.testing.stores import make_key, make_payload
from kvtier.types import FailureCause, LookupResult

ALL = list(range(20))


@pytest.fixture
def rig():
    rig = make_rig()
    yield rig
    rig.close()


@pytest.mark.root
def test_a_full_disk_goes_on_with_what_fits(small_disk, rig):
    disk = small_disk("size=4200k")
    (disk.path / "filler").write_bytes(bytes(3800 * 1024))
    start(rig, disk.path / "tier", capacity=4 << 20)
    for first in range(0, 200, 20):
        rig.store(range(first, first + 20))
    assert FailureCause.NO_SPACE in {event.cause for event in rig.recorder.of(BlocksFailed)}
    held = [number for number in range(200) if rig.lookup(number) is LookupResult.HIT]
    assert len(held) >= 20
    assert rig.load(held[:30])[1] == held[:30]
    rig.tier.shutdown()
    start(rig, disk.path / "tier", capacity=4 << 20)
    assert rig.load(held[:30])[1] == held[:30]


class NeverAnswers(LRUPolicy):
    """Knows no victim when it is asked for one."""

    def candidates(self, incoming=()):
        raise RuntimeError("no candidates")


@pytest.mark.root
def test_a_full_disk_goes_on_though_its_policy_fails(small_disk, caplog):
    disk = small_disk("size=4200k")
    (disk.path / "filler").write_bytes(bytes(3800 * 1024))
    rig = make_rig(policies={"own": NeverAnswers})
    start(rig, disk.path / "tier", capacity=4 << 20, policy="own")
    for first in range(0, 200, 20):
        rig.store(range(first, first + 20))
    assert FailureCause.NO_SPACE in {event.cause for event in rig.recorder.of(BlocksFailed)}
    assert rig.store([1000]).success
    assert caplog.text.count("LRU takes its place") == 1
    rig.close()


@pytest.mark.root
def test_a_filesystem_that_became_read_only_is_left_alone_until_it_is_written_again(small_disk, rig, caplog):
    disk = small_disk()
    tier = start(rig, disk.path / "tier")
    rig.store(ALL)
    tier._standing.breaker._backoff = 1.0  # no process has files open meanwhile: the system would refuse
    tier._standing.breaker._longest_backoff = 1.0
    os.kill(tier.io_pid, 9)
    rig.wait(lambda: tier.io_pid is None, "it is down")
    disk.remount("ro,size=32m")
    rig.wait(lambda: "Read-only" in tier.state_reason, "it says why")
    assert not rig.store([50]).success
    assert not rig.load([1])[1]
    disk.remount("rw,size=32m")
    rig.wait_up()
    assert rig.load(ALL)[1] == ALL
    assert rig.store([50]).success
    assert sum("Read-only" in message for message in caplog.messages) == 1


@pytest.mark.root
def test_an_unmounted_disk_is_not_replaced_by_the_one_below(small_disk, rig):
    disk = small_disk()
    place = disk.path / "tier"
    tier = start(rig, place)
    rig.store(ALL)
    os.kill(tier.io_pid, 9)
    disk.unmount()
    rig.wait(lambda: tier.state is TierState.DOWN and "not mounted" in tier.state_reason, "it says why")
    assert str(disk.path) in tier.state_reason
    assert not place.exists(), "a slab was made on the disk below"
    disk.mount_again()
    rig.wait_up()
    assert rig.store(ALL).success
    assert rig.load(ALL)[1] == ALL


@pytest.mark.root
def test_an_unmounted_stripe_is_dropped_and_used_again(small_disk, rig, tmp_path):
    disk = small_disk()
    tier = striped_tier(rig, [tmp_path / "good", disk.path], job_deadline=3.0)
    tier._least_run = 1
    tier.start()
    rig.wait(lambda: tier.get_stats()["stripes_up"] == 2, "both are up")
    assert rig.store(ALL).success
    os.kill(tier.io_pids[1], 9)
    disk.unmount()
    rig.wait(lambda: "not mounted" in tier.state_reason, "it is dropped")
    assert tier.state is TierState.UP
    assert os.listdir(disk.path) == []
    assert rig.load(ALL)[1] == ALL[:10]
    assert rig.store(ALL).success
    disk.mount_again()
    rig.wait(lambda: tier.get_stats()["stripes_up"] == 2, "it is used again")
    assert rig.load(ALL)[1] == ALL


def test_a_mount_point_of_the_systems_table_must_be_mounted(tmp_path):
    table = tmp_path / "fstab"
    place = tmp_path / "with space"
    place.mkdir()
    escaped = str(place).replace(" ", "\\040")
    table.write_text(f"# comment\n\nUUID=1 / ext4 defaults 0 1\nUUID=2 {escaped} xfs nofail 0 2\nshort\n")
    for path in (place, place / "kv", place / "a" / "b"):
        with pytest.raises(StoreUnavailableError, match="not mounted now"):
            check_mounted(path, fstab=table)
    check_mounted(tmp_path / "elsewhere", fstab=table)
    check_mounted(place, fstab=tmp_path / "none")


def test_mount_points_are_found(tmp_path):
    assert is_mounted(mount_point_of(str(tmp_path / "not" / "yet")))
    assert mount_point_of("/proc/self") == "/proc"
    assert mount_point_of("/proc/../proc/./self/../..") == "/"
    for name, target in (("away", "/proc/self"), ("near", "away/fd"), ("circle", "circle")):
        (tmp_path / name).symlink_to(target)
    assert mount_point_of(str(tmp_path / "away" / "fd")) == "/proc"
    assert mount_point_of(str(tmp_path / "near")) == "/proc"
    assert is_mounted(mount_point_of(str(tmp_path / "circle" / "tier")))


def is_mounted(place):
    """Return whether the kernel says so; a chroot's root is in no table."""
    return place == "/" or mounts.MountTable().kind_at(place) is not None


LINE = "{number} {parent} 8:1 /root {place} rw,relatime shared:1 - {kind} /dev/sda1 rw\n"


class Tables:
    """A kernel's table of mounts, written by a test, and no /etc/fstab."""

    def __init__(self, folder):
        self.mounts, self.fstab = folder / "mountinfo", folder / "none"

    def write(self, *lines):
        """Replace the table by (number, parent, place, kind)."""
        text = "".join(
            LINE.format(**dict(zip(("number", "parent", "place", "kind"), line, strict=True))) for line in lines
        )
        self.mounts.write_bytes(os.fsencode(text))

    def mount_point_of(self, path):
        return mount_point_of(path, self.mounts)

    def kind_at(self, place):
        return mounts.MountTable(self.mounts).kind_at(place)

    def check_mounted(self, path, mount_point):
        check_mounted(Path(path), mount_point, mounts=self.mounts, fstab=self.fstab)


@pytest.fixture
def tables(tmp_path):
    return Tables(tmp_path)


def test_what_a_path_reaches_is_what_lies_on_top(tables):
    root, lower, upper = (10, 9, "/", "ext4"), (20, 10, "/mnt", "xfs"), (30, 20, "/mnt", "nfs4")
    inner, hidden = (40, 30, "/mnt/in", "tmpfs"), (50, 20, "/mnt/in", "btrfs")
    tables.write(root, hidden, inner, upper, lower)
    assert tables.mount_point_of("/mnt/in/kv") == "/mnt", "nothing is asked of what lies below a server's filesystem"
    assert tables.kind_at("/mnt/in") == "tmpfs"
    tables.write(root, lower, upper, hidden)
    assert tables.kind_at("/mnt/in") is None, "a mount that no path reaches any more"
    with pytest.raises(StoreUnavailableError, match="not mounted now"):
        tables.check_mounted("/mnt/in/kv", "/mnt/in")
    tables.write(root, lower, (40, 20, "/mnt/in", "tmpfs"))
    tables.check_mounted("/mnt/in/kv", "/mnt/in")
    tables.write((10, 10, "/", "rootfs"), (11, 10, "/", "overlay"), (12, 11, "/var/cache", "ext4"))
    assert tables.mount_point_of("/var/cache/kv") == "/var/cache"
    tables.write((12, 11, "/var/cache", "ext4"))  # a chroot whose own root is no mount
    assert tables.mount_point_of("/var/cache/kv") == "/var/cache"
    assert tables.mount_point_of("/var/kv") == "/"


@pytest.mark.parametrize("name", ["a b", "a\tb", "a\nb", "a\\b", "a\x0bb\x1cb", "a\u2028\xa0b", "a\udcff b", " - x"])
def test_a_table_has_any_name_of_a_mount_point(tables, name):
    escaped = "".join(f"\\{ord(letter):03o}" if letter in " \t\n\\" else letter for letter in f"/mnt/{name}")
    tables.write((10, 9, "/", "ext4"), (20, 10, escaped, "xfs"), (30, 10, "/mnt/other", "tmpfs"))
    assert tables.mount_point_of(f"/mnt/{name}/kv") == f"/mnt/{name}"
    assert tables.mount_point_of("/mnt/other/kv") == "/mnt/other"
    tables.check_mounted(f"/mnt/{name}/kv", f"/mnt/{name}")


@pytest.mark.parametrize("text", [None, "", "garbage\n", "1 2 3\n - \n"])
def test_a_kernel_that_does_not_say_what_is_mounted_is_no_reason_to_stay_down(tables, text):
    if text is not None:
        tables.mounts.write_text(text)
    assert tables.mount_point_of("/srv/kv") == "/"
    tables.check_mounted("/srv/kv", "/srv")


@pytest.fixture
def bind():
    """Return functions that mount a folder at another place and take it away; needs root and the right to mount."""
    need_mounts()
    mounted = []

    def make(source, target):
        done = subprocess.run(["mount", "--bind", source, target], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"may not mount here: {done.stderr.strip()}")
        mounted.append(target)

    def take_away():
        subprocess.run(["umount", "-l", str(mounted.pop())], check=True)

    yield make, take_away
    while mounted:
        take_away()


@pytest.mark.root
@pytest.mark.parametrize("kind", ["disk", "filesystem"])
def test_a_directory_mounted_from_its_own_filesystem_is_used_and_waited_for(tmp_path, rig, bind, kind):
    """As containers do with volumes of one disk, and systemd with ReadWritePaths= and CacheDirectory=."""
    make, take_away = bind
    volume, place = tmp_path / "volume", tmp_path / "a place"
    volume.mkdir()
    place.mkdir()
    make(volume, place)
    assert mount_point_of(str(place / "kv")) == str(place)
    if kind == "disk":
        tier = start(rig, place / "kv")
    else:
        tier = FilesystemTierManager(rig.spec, rig.arena.view, "filesystem", path=str(place / "kv"), capacity="16MiB")
        rig.attach(tier)
        tier.start()
        rig.wait_up()
    os.kill(tier.io_pid, 9)
    take_away()
    rig.wait(lambda: tier.state is TierState.DOWN and "not mounted" in tier.state_reason, "it says why")
    assert os.listdir(place) == []
    make(volume, place)
    rig.wait_up()


@pytest.mark.root
def test_a_folder_mounted_onto_itself_and_a_mount_over_another(tmp_path, bind):
    make, take_away = bind
    place, other = tmp_path / "place", tmp_path / "other"
    for folder in (place, other):
        (folder / "inner").mkdir(parents=True)
    make(place, place)
    assert mount_point_of(str(place / "kv")) == str(place)
    make(other, place / "inner")
    inner = mount_point_of(str(place / "inner" / "kv"))
    assert inner == str(place / "inner")
    make(other, place)
    with pytest.raises(StoreUnavailableError, match="not mounted now"):
        check_mounted(place / "inner" / "kv", inner)
    take_away()
    check_mounted(place / "inner" / "kv", inner)


def test_a_mount_that_hangs_does_not_hold_up_the_start(faulty_disk, rig, tmp_path):
    """The filesystem of a server that is gone; whoever looks at it waits, which only an I/O process may do."""
    (tmp_path / "link").symlink_to(faulty_disk.path)
    faulty_disk._process.send_signal(signal.SIGSTOP)
    found = []

    def construct():
        path = str(tmp_path / "link" / "tier")
        tier = FilesystemTierManager(rig.spec, rig.arena.view, "filesystem", path=path, capacity="16MiB")
        tier.start()
        found.append((tier, mount_point_of(path), tier.lookup(make_key(1), rig.request)))

    thread = threading.Thread(target=construct, daemon=True)
    thread.start()
    thread.join(10)
    faulty_disk._process.send_signal(signal.SIGCONT)
    assert found, "it waits for the filesystem"
    ((tier, mount_point, result),) = found
    assert (mount_point, result) == (str(faulty_disk.path), LookupResult.MISS)
    tier.shutdown()


def test_only_the_last_directory_is_made(rig, tmp_path):
    tier = disk_tier(rig, tmp_path / "missing" / "tier")
    tier.start()
    rig.wait(lambda: tier.state is TierState.DOWN, "it is down")
    assert "does not exist" in tier.state_reason
    assert not (tmp_path / "missing").exists()
    (tmp_path / "missing").mkdir()
    rig.wait_up()


def test_a_share_of_a_missing_directory_is_made(rig, tmp_path):
    start(rig, tmp_path / "tier" / "dp1")
    assert rig.store(ALL).success
    assert Path(tmp_path / "tier").stat().st_mode & 0o777 == 0o700


WITHOUT_PROC = """
import os, sys
from disk_rigs import make_rig, start
assert not os.listdir("/proc")
rig = make_rig()
start(rig, sys.argv[1])
rig.store([1, 2, 3])
assert rig.load([1, 2, 3])[1] == [1, 2, 3]
rig.close()
"""


@pytest.mark.root
def test_a_disk_works_where_the_kernel_tells_nothing_of_mapped_pages(tmp_path):
    """Without /proc, as in some chroots; kernels built without CONFIG_PROC_PAGE_MONITOR lack the same file."""
    need_mounts()
    hide = 'mount -t tmpfs none /proc && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", hide, "sh", sys.executable, "-c", WITHOUT_PROC, str(tmp_path / "tier")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, env=environment, check=True)


@pytest.mark.root
def test_unreadable_blocks_that_cannot_be_deleted_are_corrupt_all_the_same(small_disk, caplog):
    """As on hosts that mount the directory read-only: to count them as errors of the disk would end the tier."""
    disk = small_disk()
    context = StoreContext(Namespace({"model": "read-only"}), 8192)
    store = FilesystemStore.open({"path": str(disk.path / "shared"), "capacity": 1 << 20}, context)
    keys = [make_key(number) for number in range(3)]
    buffers = [memoryview(bytearray(make_payload(number, 8192))) for number in range(3)]
    assert all(store.write(keys, buffers))
    store.path_of(keys[1]).write_bytes(b"nothing of ours")
    disk.remount("ro")
    assert store.read_into(keys, buffers) == [True, False, True]
    assert context.failures.take() == {FailureCause.CORRUPT: 1}
    assert store.read_into(keys, buffers) == [True, False, True]
    assert caplog.text.count("Read-only file system") == 1
    store.close()
