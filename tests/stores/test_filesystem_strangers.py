"""A shared directory's stores and janitors touch nothing but files of their own, wherever their names lead."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from requirements import need_mounts
from test_filesystem_store import BLOCK, ON_DISK, blocks_in, bytes_in, open_store, read, write

from kvtier.abc import StoreContext
from kvtier.errors import StoreError, StoreUnavailableError
from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.testing.stores import make_key
from kvtier.types import FailureCause


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


@pytest.fixture
def victim(tmp_path):
    """A folder with names like ours: the objects of a git repository; all of them old."""
    folder = tmp_path / "repository" / "ab"
    folder.mkdir(parents=True)
    for number in range(20):
        (folder / f"{number:038x}").write_bytes(b"object")
    (folder / ".tmp_obj.new").write_text("half-written, by another program")
    for path in folder.iterdir():
        os.utime(path, (1000, 1000))
    return folder


def names(folder):
    return sorted(os.listdir(folder))


@pytest.fixture
def bind():
    """Return a function that mounts a folder at another place; needs root and the right to mount."""
    need_mounts()
    mounted = []

    def make(source, target):
        done = subprocess.run(["mount", "--bind", source, target], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"may not mount here: {done.stderr.strip()}")
        mounted.append(target)

    yield make
    for target in reversed(mounted):
        subprocess.run(["umount", "-l", str(target)], check=True)


@pytest.mark.parametrize("what", ["shard", "namespace"])
def test_a_link_in_place_of_a_folder_leads_nowhere(shared, opened, victim, caplog, what):
    store = opened(shared, capacity=100 * ON_DISK)
    write(store, range(20))
    shard = store.path_of(make_key(3)).parent
    link, target = (shard, victim) if what == "shard" else (shard.parent, victim.parent)
    if what == "namespace":
        victim.rename(victim.with_name(shard.name))
        victim = victim.with_name(shard.name)
    shutil.rmtree(link)
    link.symlink_to(target)
    before = names(victim)
    for start in range(20, 200, 10):
        write(store, range(start, start + 10))
    assert write(store, [3]) == [False]
    assert read(store, [3]) == []
    if what == "shard":
        assert store.contains([make_key(3)]) == [False]
    else:
        with pytest.raises(StoreError, match="symbolic links are not followed"):
            store.contains([make_key(3)])
    with pytest.raises(StoreError, match="symbolic links are not followed"):
        store.delete([make_key(3)])
    store._janitor.look("")
    os.utime(shared / "swept", (1_000_000_000,) * 2)
    store._janitor.sweep()
    assert names(victim) == before
    assert "not kvtier's" in caplog.text
    assert bytes_in(shared) <= 100 * ON_DISK


@pytest.mark.parametrize("name", ["0" * 32, "f" * 32])
def test_a_link_under_a_namespaces_name_is_not_entered(shared, opened, victim, name):
    store = opened(shared, capacity=64 * ON_DISK)
    victim.rename(victim.with_name("abc"))
    (shared / name).symlink_to(victim.parent)
    before = names(victim.with_name("abc"))
    for start in range(0, 100, 10):
        write(store, range(start, start + 10))
    store._janitor.look("")
    assert names(victim.with_name("abc")) == before


@pytest.mark.root
def test_a_directory_mounted_in_place_of_a_shard_is_not_used(shared, opened, victim, bind):
    store = opened(shared, capacity=64 * ON_DISK)
    write(store, range(5))
    shard = store.path_of(make_key(3)).parent
    bind(victim, shard)
    before = names(victim)
    for start in range(20, 200, 10):
        write(store, range(start, start + 10))
    assert write(store, [3]) == [False]
    assert read(store, [3]) == []
    store._janitor.look("")
    assert names(victim) == before


def test_files_of_others_are_neither_deleted_nor_counted(shared, opened, victim):
    store = opened(shared, capacity=64 * ON_DISK)
    write(store, range(5))
    shard = store.path_of(make_key(3)).parent
    (shard / "aaaaaaaaaaaa").symlink_to(victim / names(victim)[-1])
    os.mkfifo(shard / "bbbbbbbbbbbb")
    (shard / "cccccccccccc").mkdir()
    (shard / ".dead.new").symlink_to(victim / ".tmp_obj.new")
    os.utime(shard / ".dead.new", (1000, 1000), follow_symlinks=False)
    for start in range(20, 200, 10):
        write(store, range(start, start + 10))
    store._janitor.look("", give_up=1.0)
    assert blocks_in(shared) == [] or names(shard) == sorted(names(shard))
    assert {"aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc", ".dead.new"} <= set(names(shard))
    assert len(names(victim)) == 21


MARKERS = {
    "pipe": lambda path: os.mkfifo(path),
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
    "giant": lambda path: (path.touch(), os.truncate(path, 300 << 30)),
    "link": lambda path: (path.with_name("real").write_text(""), path.symlink_to(path.with_name("real"))),
}


@pytest.mark.parametrize("kind", MARKERS)
@pytest.mark.parametrize("name", ["kvtier.json", "swept"])
def test_a_strange_marker_is_refused_at_once(shared, kind, name):
    shared.mkdir(mode=0o755)
    MARKERS[kind](shared / name)
    with pytest.raises(StoreUnavailableError):
        open_store(shared)
    assert shared.stat().st_mode & 0o777 == 0o755


FOREIGN = {
    "an empty marker": lambda folder: ((folder / "kvtier.json").touch(), (folder / "photo.jpg").touch()),
    "a file called swept": lambda folder: (folder / "swept").write_text("the floor"),
    "a lock": lambda folder: (folder / "lock").write_text("4711\n"),
    "a name nobody can print": lambda folder: open(os.fsencode(folder) + b"/\xff\n\x1b[31m", "w").close(),
}


@pytest.mark.parametrize("mode", [0o700, 0o755])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_directory_of_somebody_else_is_refused_before_anything_changes(shared, kind, mode):
    shared.mkdir(mode=mode)
    FOREIGN[kind](shared)
    before = [(path.name, path.lstat().st_mode, path.read_bytes()) for path in shared.iterdir()]
    with pytest.raises(StoreUnavailableError, match="holds something else") as refused:
        open_store(shared)
    assert [(path.name, path.lstat().st_mode, path.read_bytes()) for path in shared.iterdir()] == before
    assert shared.stat().st_mode & 0o777 == mode
    assert str(refused.value).isprintable()


def test_the_top_of_a_filesystem_and_a_link_that_was_configured_are_used(shared, opened, tmp_path):
    (shared / "lost+found").mkdir(parents=True)
    (tmp_path / "link").symlink_to(shared)
    store = opened(tmp_path / "link")
    assert all(write(store, range(4)))
    assert read(store, range(4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("how", ["moved", "link", "another"])
def test_a_directory_that_is_replaced_while_running_is_noticed(shared, opened, victim, tmp_path, how):
    store = opened(shared)
    write(store, range(4))
    shared.rename(tmp_path / "moved")
    if how == "link":
        shared.symlink_to(victim)
    elif how == "another":
        shutil.copytree(tmp_path / "moved", shared)
    before = names(victim)
    with pytest.raises(StoreUnavailableError, match="removed while in use, or replaced"):
        write(store, range(4))
    keys = [make_key(1)]
    for ask in (
        lambda: store.contains(keys),
        lambda: store.keep(keys, 60.0),
        lambda: store.delete(keys),
        lambda: store.list_keys(b"", 10),
    ):
        with pytest.raises(StoreUnavailableError, match="removed while in use, or replaced"):
            ask()
    assert names(victim) == before


def test_a_namespaces_folder_that_is_moved_is_made_again(shared, opened, tmp_path):
    store = opened(shared)
    write(store, range(4))
    store.path_of(make_key(1)).parents[1].rename(tmp_path / "moved")
    assert read(store, range(4)) == []
    assert write(store, range(4)) == [True] * 4
    assert read(store, range(4)) == [0, 1, 2, 3]


def test_a_block_that_is_a_second_name_of_another_file_is_verified_and_its_name_goes(shared, opened, tmp_path):
    store = opened(shared)
    write(store, [1])
    path = store.path_of(make_key(1))
    path.unlink()
    (tmp_path / "precious").write_bytes(b"precious" * (BLOCK // 8))
    os.link(tmp_path / "precious", path)
    assert read(store, [1]) == []
    assert store._failures.take() == {FailureCause.CORRUPT: 1}
    assert write(store, [1]) == [True]
    assert (tmp_path / "precious").read_bytes() == b"precious" * (BLOCK // 8)


@pytest.mark.parametrize(("block_bytes", "blocks"), [(1000, 64), (4096, 64), (4096, 200), (8192, 100)])
def test_all_that_the_filesystem_gives_keeps_to_the_capacity(shared, opened, block_bytes, blocks):
    """Folders count, and so do whole pages: with small blocks they are more than the blocks."""
    capacity = blocks * (block_bytes + 128)
    context = StoreContext(Namespace({"model": "small"}), block_bytes)
    store = opened(shared, context, capacity=capacity)
    most = stored = 0
    for number in range(3 * blocks):
        stored += store.write([make_key(number)], [memoryview(bytearray(block_bytes))])[0]
        most = max(most, bytes_in(shared)) if number % 5 == 0 else most
    assert most <= max(capacity, 64 << 10)
    assert stored == 3 * blocks
    assert bytes_in(shared) >= capacity // 2 or capacity < 200 << 10
    newest = OffloadKey(make_key(3 * blocks - 1))
    assert store.contains([newest]) == [True] or capacity < 100 << 10


def test_folders_of_other_namespaces_count_and_go_with_their_last_block(shared, opened):
    for model in ("first", "second"):
        store = opened(shared, StoreContext(Namespace({"model": model}), BLOCK), capacity=100 * ON_DISK)
        for start in range(0, 150, 10):
            write(store, range(start, start + 10))
            assert bytes_in(shared) <= 100 * ON_DISK
    empty = [folder for folder in shared.glob("*/*") if not any(Path(folder).iterdir())]
    assert len(empty) <= 4
