"""The shipped suite on real files; and what hosts that share a directory do to each other."""

import errno
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from file_blocks import FileBlocks

from kvtier.abc import StoreContext
from kvtier.errors import StoreUnavailableError
from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.stores.filesystem import janitor as janitor_module
from kvtier.stores.filesystem import store as store_module
from kvtier.stores.filesystem.directory import SharedDirectory, shard_of
from kvtier.stores.filesystem.janitor import Janitor, group_digits
from kvtier.stores.filesystem.store import FilesystemStore
from kvtier.testing.stores import StoreSuite, make_key, make_payload, run_threads
from kvtier.types import FailureCause

BLOCK = 8192
ON_DISK = 16384
"""What a block of that size takes at most: the seal begins a page of its own, and so may the folder that it is in."""


def open_store(path, context=None, capacity=64 << 20, **options):
    context = context or StoreContext(Namespace({"model": "files"}), BLOCK)
    return FilesystemStore.open({"path": str(path), "capacity": capacity, **options}, context)


def write(store, numbers):
    return store.write([make_key(number) for number in numbers], [memoryview(make_payload(n, BLOCK)) for n in numbers])


def read(store, numbers):
    """Return the numbers of the blocks that are served; fail for a wrong byte."""
    buffers = [memoryview(bytearray(BLOCK)) for _ in numbers]
    served = store.read_into([make_key(number) for number in numbers], buffers)
    for number, good, buffer in zip(numbers, served, buffers, strict=True):
        assert not good or bytes(buffer) == make_payload(number, BLOCK), f"wrong bytes for {number}"
    return [number for number, good in zip(numbers, served, strict=True) if good]


def blocks_in(path):
    """Return the files of blocks; folders may come and go meanwhile."""
    found = [Path(parent, name) for parent, _, names in os.walk(path) for name in names if not name.startswith(".")]
    return [file for file in found if len(file.relative_to(path).parts) == 3]


def bytes_in(path):
    """Return the bytes that a directory takes from its filesystem, as `du` counts them."""
    return sum(one.lstat().st_blocks * 512 for one in [Path(path), *Path(path).rglob("*")])


class TestFiles(FileBlocks, StoreSuite):
    keeps_failed_buffers = False  # a payload is verified where it belongs

    def open_store(self, medium, context):
        return open_store(medium / "shared", context)


class TestOddLength(TestFiles):
    block_bytes = 5000


@pytest.fixture
def shared(tmp_path):
    return tmp_path / "shared"


@pytest.fixture
def opened():
    """Return a function that opens stores and closes them in the end."""
    stores = []

    def make(*arguments, **options):
        stores.append(open_store(*arguments, **options))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def test_only_the_owner_may_look(shared, opened):
    store = opened(shared)
    write(store, range(20))
    for path in [shared, *shared.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_directory_that_others_may_open_is_closed_to_them(shared, opened):
    shared.mkdir(mode=0o755)
    opened(shared)
    assert stat.S_IMODE(shared.stat().st_mode) == 0o700


def test_a_directory_with_something_else_in_it_is_refused(shared):
    shared.mkdir()
    (shared / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreUnavailableError, match=re.escape("holds something else ('thesis.tex')")):
        open_store(shared)


def test_a_directory_of_another_version_is_refused(shared):
    shared.mkdir()
    (shared / "kvtier.json").write_text('{"version": 2}')
    with pytest.raises(StoreUnavailableError, match="another version"):
        open_store(shared)


def test_a_parent_that_is_missing_is_not_made(tmp_path):
    with pytest.raises(StoreUnavailableError, match="creates only the last directory"):
        open_store(tmp_path / "not mounted" / "shared")


def test_a_file_in_place_of_the_directory_is_called_that(shared):
    shared.write_text("a file")
    with pytest.raises(StoreUnavailableError, match="is not a directory"):
        open_store(shared)


@pytest.mark.root
def test_a_directory_of_another_owner_is_refused(shared, opened):
    shared.mkdir()
    os.chown(shared, 65534, 65534)
    with pytest.raises(StoreUnavailableError, match="belongs to user 65534"):
        open_store(shared)
    os.chown(shared, 0, 0)
    store = opened(shared)
    write(store, [1, 2])
    os.chown(store.path_of(make_key(1)), 65534, 65534)
    assert read(store, [1, 2]) == [2]
    assert store._failures.take() == {FailureCause.FOREIGN: 1}


def test_a_filesystem_that_could_never_hold_the_capacity_is_refused(shared):
    with pytest.raises(StoreUnavailableError, match="too small for"):
        open_store(shared, capacity=1 << 60)


def test_another_directory_in_its_place_is_noticed(shared, opened):
    store = opened(shared)
    write(store, [1])
    shutil.rmtree(shared)
    assert read(store, [1]) == []
    with pytest.raises(StoreUnavailableError, match="removed while in use"):
        write(store, [1])
    assert not shared.exists(), "made again where perhaps another filesystem belongs"


def test_folders_that_somebody_removes_are_made_again(shared, opened):
    store = opened(shared)
    write(store, range(4))
    shutil.rmtree(store.path_of(make_key(1)).parents[1])
    assert write(store, range(4)) == [True] * 4
    assert read(store, range(4)) == [0, 1, 2, 3]


def test_strange_files_are_misses(shared, opened):
    store = opened(shared)
    write(store, range(6))
    paths = [store.path_of(make_key(number)) for number in range(6)]
    for path in paths[:4]:
        path.unlink()
    paths[0].symlink_to(paths[4])
    os.mkfifo(paths[1])
    paths[2].mkdir()
    paths[3].write_bytes(os.urandom(BLOCK + 128))
    assert read(store, range(6)) == [4, 5]
    assert store._failures.take() == {FailureCause.CORRUPT: 1, FailureCause.FOREIGN: 3}
    assert [os.path.lexists(path) for path in paths] == [True, True, True, False, True, True], "what is not ours stays"
    assert write(store, range(6)) == [True, True, False, True, True, True], "a folder is in the way"
    assert read(store, range(6)) == [0, 1, 3, 4, 5]


def test_the_existence_of_many_on_a_quick_and_on_a_slow_filesystem(shared, opened):
    store = opened(shared)
    write(store, range(0, 200, 3))
    keys = [make_key(number) for number in range(200)]
    expected = [number % 3 == 0 for number in range(200)]
    assert store.contains(keys) == expected
    store.slow_probe_seconds = 0.0
    assert store.contains(keys) == expected
    assert store.contains([OffloadKey(bytes(36))]) == [False]


def test_keys_fall_into_shards_evenly():
    counts = {}
    for number in range(40_000):
        shard = shard_of(OffloadKey(number.to_bytes(32, "big") + bytes(4)))
        counts[shard] = counts.get(shard, 0) + 1
    assert len(counts) == 4096
    assert max(counts.values()) < 35
    assert all(re.fullmatch("[0-9a-f]{3}", shard) for shard in counts)


@pytest.mark.parametrize(
    ("capacity", "block_bytes", "digits"),
    [
        (64 << 20, BLOCK, 0),
        (2 << 30, BLOCK, 1),
        (32 << 30, 2 << 20, 2),
        (20 << 40, 2 << 20, 3),
        (64 << 30, 16 << 20, 1),
    ],
)
def test_a_group_holds_blocks_enough(capacity, block_bytes, digits):
    assert group_digits(capacity, block_bytes) == digits


@pytest.mark.parametrize("blocks", [64, 150])
def test_the_capacity_is_never_exceeded_and_the_newest_stay(shared, opened, blocks):
    capacity = blocks * ON_DISK
    store = opened(shared, capacity=capacity)
    for start in range(0, 3 * blocks, 10):
        assert all(write(store, range(start, start + 10)))
        assert bytes_in(shared) <= capacity
    assert bytes_in(shared) >= 0.8 * capacity
    newest = list(range(3 * blocks - blocks // 2, 3 * blocks))
    assert read(store, newest) == newest
    assert read(store, range(blocks)) == []


def test_what_is_read_is_kept(shared, opened):
    store = opened(shared, capacity=100 * ON_DISK)
    write(store, range(80))
    for file in blocks_in(shared):
        os.utime(file, (1_000_000_000, 1_000_000_000))
    assert read(store, range(10)) == list(range(10))
    write(store, range(100, 160))
    assert read(store, range(10)) == list(range(10))
    assert read(store, range(100, 160)) == list(range(100, 160))


def test_other_namespaces_count_and_give_way(shared, opened):
    old = opened(shared, StoreContext(Namespace({"model": "old"}), BLOCK), capacity=100 * ON_DISK)
    write(old, range(80))
    for file in blocks_in(shared):
        os.utime(file, (1_000_000_000, 1_000_000_000))
    new = opened(shared, capacity=100 * ON_DISK)
    for start in range(0, 200, 10):
        write(new, range(start, start + 10))
        assert bytes_in(shared) <= 100 * ON_DISK
    assert read(old, range(80)) == []
    new._janitor.look("")
    assert [folder for folder in shared.iterdir() if folder.is_dir() and any(folder.iterdir())] == [
        new.path_of(make_key(1)).parents[1]
    ]


def test_leftovers_of_dead_writers_are_reaped_and_strangers_files_are_not(shared, opened):
    store = opened(shared)
    write(store, [1])
    folder = store.path_of(make_key(1)).parent
    left, fresh, strange = folder / ".dead-1.new", folder / ".alive-1.new", folder / "notes.txt"
    for file in (left, fresh, strange):
        file.write_bytes(b"x")
    for file in (left, strange, store.path_of(make_key(1))):
        os.utime(file, (1_000_000_000, 1_000_000_000))
    store._janitor.look("")
    assert [file.exists() for file in (left, fresh, strange)] == [False, True, True]
    assert read(store, [1]) == [1]


def janitor(shared, capacity, namespace="another"):
    directory = SharedDirectory.open(shared, Namespace({"model": namespace}))
    return Janitor(directory, capacity, 0, BLOCK)


def test_a_sweep_covers_every_group_once_an_hour_whoever_runs_it(shared, opened, monkeypatch):
    store = opened(shared)
    write(store, range(30))
    store._janitor._ending.set()
    many = [janitor(shared, 1 << 50) for _ in range(2)]
    assert many[0].num_groups == 4096
    looked = []
    for one in many:
        monkeypatch.setattr(one, "look", looked.append)
    os.utime(shared / "swept", (1_000_000_000, 1_000_000_000))
    assert [one.sweep() for one in many] == [4096, 0]
    assert sorted(looked) == [f"{number:03x}" for number in range(4096)]
    half_an_hour_ago = many[0]._directory.now() - janitor_module.SWEEP_SECONDS / 2
    os.utime(shared / "swept", (half_an_hour_ago, half_an_hour_ago))
    assert 2047 <= many[1].sweep() < 2100  # a group falls due every 0.44 s meanwhile
    assert many[0].sweep() < 50


def test_a_clock_that_was_set_back_stops_no_sweep_and_keeps_no_block_for_ever(shared, opened):
    """For a while it was 2090; what was written then looks younger than all that is written now."""
    store = opened(shared, capacity=100 * ON_DISK)
    store._janitor._ending.set()
    write(store, range(60))
    left = store.path_of(make_key(1)).parent / ".dead-1.new"
    left.write_bytes(b"x")
    for file in (*blocks_in(shared), left, shared / "swept"):
        os.utime(file, (3_800_000_000, 3_800_000_000))
    write(store, range(100, 160))
    another = janitor(shared, 70 * ON_DISK)
    assert another.sweep() == another.num_groups
    assert another.sweep() == 0
    assert not left.exists()
    assert read(store, range(120, 160)) == list(range(120, 160))


def test_a_sweep_removes_what_is_empty_and_holds_a_smaller_capacity(shared, opened):
    store = opened(shared)
    for number in range(100):
        before = set(blocks_in(shared))
        write(store, [number])
        (written,) = set(blocks_in(shared)) - before
        os.utime(written, (1_500_000_000 + number,) * 2)  # a filesystem's own times have steps of milliseconds
    empty = shared / ("0" * 32) / "123"
    empty.mkdir(parents=True)
    smaller = janitor(shared, 70 * ON_DISK)
    os.utime(shared / "swept", (1_000_000_000, 1_000_000_000))
    assert smaller.sweep() == 1
    assert not empty.parent.exists()
    assert 55 <= len(blocks_in(shared)) <= 62
    assert read(store, [0, 1]) == [], "the oldest go first"
    assert read(store, range(50, 90)) == list(range(50, 90))


def test_two_janitors_at_once_delete_no_more_than_one(shared, opened):
    store = opened(shared)
    write(store, range(200))
    first, second = (janitor(shared, 100 * ON_DISK) for _ in range(2))
    run_threads(lambda number: (first, second)[number].look(""), 2)
    assert 86 <= len(blocks_in(shared)) <= 88


def test_space_that_others_need_is_given_back(shared, opened, monkeypatch):
    store = opened(shared, capacity=200 * ON_DISK, min_free=1)
    write(store, range(100))
    real = os.statvfs(shared)

    class Status:
        f_blocks, f_frsize, f_bavail = real.f_blocks, 1, 1000

    monkeypatch.setattr(store_module.os, "statvfs", lambda path: Status)
    store._janitor._min_free = 150 * ON_DISK + 1000
    store._janitor.look("")
    assert 40 <= len(blocks_in(shared)) <= 50


def test_min_free_refuses_stores_and_counts_them(shared, opened):
    status = os.statvfs(shared.parent)
    free = status.f_bavail * status.f_frsize
    store = opened(
        shared, capacity=1 << 20, min_free=min(free + (1 << 30), status.f_blocks * status.f_frsize - (1 << 20))
    )
    assert write(store, range(5)) == [False] * 5
    assert store._failures.take() == {FailureCause.NO_SPACE: 5}


def test_a_quota_error_at_close_fails_the_block(shared, opened, monkeypatch):
    """NFS sends what was written when the file is closed, and tells only then."""
    store = opened(shared)
    write(store, [1])
    close = os.close

    def close_over_quota(descriptor):
        is_new = os.readlink(f"/proc/self/fd/{descriptor}").endswith(".new")
        close(descriptor)
        if is_new:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(store_module.os, "close", close_over_quota)
    assert write(store, [2, 3]) == [False, False]
    monkeypatch.undo()
    assert store._failures.take() == {FailureCause.NO_SPACE: 2}
    assert not list(shared.rglob("*.new"))
    assert read(store, [1, 2, 3]) in ([1], []), "a block may have given way"
    assert write(store, [2, 3]) == [True, True]


WRITER = """
import sys
sys.path.insert(0, sys.argv[3])
from test_filesystem_store import open_store, read, write
import random
path, seed = sys.argv[1], int(sys.argv[2])
store = open_store(path, capacity=150 * 16384)
chance = random.Random(seed)
print("ready", flush=True)
served = 0
for turn in range(40):
    first = chance.randrange(200)
    assert all(write(store, range(first, first + 8))), store._failures.take()
    served += len(read(store, range(first, first + 40)))
causes = store._failures.take()
store.close()
assert not {cause.value for cause in causes} - {"absent"}, causes
print(served)
"""


def start_writer(shared, seed):
    command = [sys.executable, "-c", WRITER, str(shared), str(seed), str(Path(__file__).parent)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_write_the_same_blocks_and_tidy_up_at_once(shared):
    writers = [start_writer(shared, seed) for seed in range(3)]
    for writer in writers:
        out, error = writer.communicate()
        assert not writer.returncode, error
        assert int(out.split()[-1]) > 40 * 8
    assert bytes_in(shared) <= 1.05 * 150 * ON_DISK
    assert len(blocks_in(shared)) >= 100


def test_writers_that_are_killed_leave_no_half_block(shared, opened):
    for seed in range(3):
        writer = start_writer(shared, seed)
        assert writer.stdout.readline() == "ready\n"
        while len(blocks_in(shared)) < 20 * (seed + 1):
            assert writer.poll() is None
        writer.kill()
        writer.communicate()
    store = opened(shared)
    read(store, range(240))
    assert not set(store._failures.take()) - {FailureCause.ABSENT}
    for file in shared.rglob("*.new"):
        os.utime(file, (1_000_000_000, 1_000_000_000))
    store._janitor.look("")
    assert not list(shared.rglob("*.new"))


def test_a_full_disk_fails_stores_gives_way_and_serves_what_it_holds():
    if os.geteuid() != 0:
        pytest.skip("needs root and mount(8)")
    place = Path(tempfile.mkdtemp(prefix="kvtier-mount-"))
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "kvtier-test", str(place)], capture_output=True)
    if done.returncode:
        place.rmdir()
        pytest.skip(f"may not mount here: {done.stderr}")
    try:
        store = open_store(place / "shared", capacity=(2 << 20) - 4096)
        (place / "stranger").write_bytes(bytes(1 << 20))
        stored = sum(sum(write(store, range(start, start + 8))) for start in range(0, 160, 8))
        causes = store._failures.take()
        assert causes.keys() == {FailureCause.NO_SPACE}
        assert stored + causes[FailureCause.NO_SPACE] == 160
        assert 60 < len(blocks_in(place / "shared")) <= 86
        assert len(read(store, range(160))) == len(blocks_in(place / "shared"))
        assert not list(place.rglob("*.new"))
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        held = read(store, range(160))
        assert held
        store._failures.take()
        assert write(store, [500, 501]) == [False, False]
        assert store._failures.take() == {FailureCause.IO_ERROR: 2}
        store.close()
        again = open_store(place / "shared", capacity=(2 << 20) - 4096)
        assert read(again, held) == held
        again.close()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()
