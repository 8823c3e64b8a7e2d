"""A slab touches nothing that is not its own, whatever lies in its directory, and whoever puts it there."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from requirements import need_mounts
from slab_files import (
    RECORD_BYTES,
    folder_of,
    headers_file,
    make_context,
    open_slab,
    read_at,
    recovered,
    segment_file,
    write_at,
)

from kvtier.errors import StoreUnavailableError
from kvtier.stores.integrity.header import header_checksum
from kvtier.stores.slab.inspection import find_slabs, survey_slab
from kvtier.stores.slab.layout import segment_of
from kvtier.stores.slab.lock import hold
from kvtier.stores.slab.namespaces import delete_namespace
from kvtier.testing.stores import make_key, make_payload
from kvtier.types import FailureCause

BLOCK = 8192
CAPACITY = 1 << 20


def write(store, numbers):
    payloads = [memoryview(make_payload(number, BLOCK)) for number in numbers]
    return store.write(list(numbers), [make_key(number) for number in numbers], payloads)


def read(store, numbers):
    buffers = [memoryview(bytearray(BLOCK)) for _ in numbers]
    results = store.read_into(list(numbers), [make_key(number) for number in numbers], buffers)
    for number, result, buffer in zip(numbers, results, buffers, strict=True):
        assert not result or bytes(buffer) == make_payload(number, BLOCK)
    return [number for number, result in zip(numbers, results, strict=True) if result]


@pytest.fixture
def context():
    return make_context()


@pytest.fixture
def filled(tmp_path, context):
    """A closed slab with blocks 0 to 9 in the slots of their numbers."""
    store = open_slab(tmp_path / "slab", context)
    assert all(write(store, range(10)))
    store.close()
    return tmp_path / "slab"


@pytest.fixture
def victim(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    for number in range(3):
        (victim / f"precious{number}").write_bytes(b"precious" * 1000)
    return victim


def contents(folder):
    """Return everything in a directory: names, modes, times and bytes."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        is_file = path.is_file() and not path.is_symlink() and status.st_size < 1 << 20
        found[path] = (status.st_mode, status.st_mtime_ns, path.read_bytes() if is_file else None)
    return found


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


# -- whose directory it is ------------------------------------------------------------------------------------


def a_named_pipe(folder):
    os.mkfifo(folder / "lock")


FOREIGN = {
    "a lock with words": lambda folder: (folder / "lock").write_text("important: do not touch\n"),
    "a lock with a pid": lambda folder: ((folder / "lock").write_text("4711\n"), (folder / "data.db").touch()),
    "an empty lock": lambda folder: ((folder / "lock").touch(), (folder / "status").write_text("of another program")),
    "a lock that is a folder": lambda folder: (folder / "lock").mkdir(),
    "a lock that is a link": lambda folder: (folder / "lock").symlink_to("/dev/zero"),
    "a lock that is a pipe": a_named_pipe,
    "a giant lock": lambda folder: ((folder / "lock").touch(), os.truncate(folder / "lock", 1 << 40)),
    "one file": lambda folder: (folder / "letter.txt").write_text("dear"),
    "folders named by digests": lambda folder: ((folder / ("a" * 32)).mkdir(), (folder / ("a" * 32) / "x").touch()),
    "a folder called dp0": lambda folder: ((folder / "dp0").mkdir(), (folder / "dp0" / "photo.jpg").touch()),
    "names nobody can print": lambda folder: open(os.fsencode(folder) + b"/\xff\n\x1b[31m", "w").close(),
}


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o777])
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("below", [(), ("dp1",)], ids=["itself", "a rank's below it"])
def test_a_directory_of_somebody_else_is_refused_before_anything_changes(tmp_path, context, kind, mode, below):
    folder = tmp_path / "app"
    folder.mkdir()
    FOREIGN[kind](folder)
    folder.chmod(mode)
    before = contents(folder)
    with pytest.raises(StoreUnavailableError, match="neither empty nor a slab") as refused:
        open_slab(folder.joinpath(*below), context)
    assert contents(folder) == before
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("below", [(), ("dp1",)], ids=["itself", "a rank's below it"])
def test_a_file_in_place_of_the_directory_is_called_that(tmp_path, context, below):
    (tmp_path / "app").write_text("a file")
    with pytest.raises(StoreUnavailableError, match="app: is not a directory"):
        open_slab((tmp_path / "app").joinpath(*below), context)
    assert (tmp_path / "app").read_text() == "a file"


def test_a_parent_that_is_there_is_not_called_missing(context):
    with pytest.raises(StoreUnavailableError, match=r"^/proc/kvtier: No such file or directory$"):
        open_slab(Path("/proc/kvtier"), context)


def test_an_empty_directory_and_the_top_of_a_filesystem_are_taken(tmp_path, context):
    for names in ((), ("lost+found",)):
        folder = tmp_path / f"with{len(names)}"
        folder.mkdir(mode=0o755)
        for name in names:
            (folder / name).mkdir()
        open_slab(folder, context).close()
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_slab_is_known_without_its_lock_and_with_a_strangers_file_in_it(filled, context):
    (filled / "lock").unlink()
    (filled / "notes.txt").write_text("mine")
    store = open_slab(filled, context)
    assert sorted(recovered(store)) == list(range(10))
    store.close()
    assert (filled / "notes.txt").read_text() == "mine"


def test_a_directory_whose_namespaces_were_all_deleted_is_still_one(filled, context):
    (filled / "notes.txt").write_text("mine")
    with hold(filled):
        delete_namespace(folder_of(filled, context))
    assert find_slabs(filled) == [filled]
    open_slab(filled, context).close()


def test_a_slab_of_an_earlier_version_has_a_pid_only_in_its_lock(filled, context):
    (filled / "lock").write_text("4711\n")
    assert find_slabs(filled) == [filled]
    open_slab(filled, context).close()


def test_ranks_directories_make_their_parent_one_of_ours(tmp_path, context):
    for rank in (0, 1):
        open_slab(tmp_path / "kv" / f"dp{rank}", context).close()
    open_slab(tmp_path / "kv", context).close()


def test_the_configured_path_may_be_a_link_and_a_ranks_folder_may_not(tmp_path, filled, context):
    (tmp_path / "link").symlink_to(filled)
    store = open_slab(tmp_path / "link", context)
    assert sorted(recovered(store)) == list(range(10))
    store.close()
    (tmp_path / "dp0").symlink_to(filled)  # its parent is somebody else's: who made the folder had the right to
    with pytest.raises(StoreUnavailableError, match="symbolic link"):
        open_slab(tmp_path / "dp0", context)


# -- what lies in it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lock", "namespace.json", "headers", "data-00000"])
@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
def test_a_stranger_in_place_of_a_file_is_refused_at_once_and_stays_as_it_is(filled, context, victim, name, kind):
    path = filled / name if name == "lock" else folder_of(filled, context) / name
    path.unlink()
    make = {
        "link": lambda: path.symlink_to(victim / "precious0"),
        "hard link": lambda: os.link(victim / "precious0", path),
        "pipe": lambda: os.mkfifo(path),
        "folder": lambda: shutil.copytree(victim, path),
    }
    make[kind]()
    before = contents(victim)
    with pytest.raises(StoreUnavailableError):
        open_slab(filled, context)
    assert contents(victim) == before
    assert not path.is_dir() or len(os.listdir(path)) == 3


@pytest.mark.parametrize("kind", ["pipe", "endless", "giant"])
def test_a_description_that_never_ends_costs_neither_time_nor_memory(filled, context, kind):
    strange = filled / ("d" * 32)
    strange.mkdir()
    (strange / "headers").touch()
    path = strange / "namespace.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 200 << 30)
    store = open_slab(filled, context)
    assert all(write(store, range(store.num_slots))), "it gives way as any other"
    store.close()
    for survey in survey_slab(filled).namespaces:
        assert survey.is_readable == (survey.folder == folder_of(filled, context))


def test_sparse_records_of_another_namespace_do_not_hold_up_who_needs_their_space(filled, context):
    os.truncate(headers_file(filled, context), 512 << 30)
    store = open_slab(filled, make_context("other"))
    assert all(write(store, range(store.num_slots)))
    store.close()
    assert not folder_of(filled, context).exists()


def strangers_in(folder, victim):
    """Put into a namespace's folder what is not kvtier's under names that are; return the paths."""
    (folder / "data-00001").mkdir()
    (folder / "data-00001" / "thesis.tex").write_text("years of work")
    (folder / "data-00002").symlink_to(victim / "precious0")
    os.mkfifo(folder / "data-00003")
    (folder / "data-backup").write_text("a name that only looks like ours")
    (folder / "data-٣").write_text("digits, but not ours")
    return [folder / name for name in ("data-00001", "data-00002", "data-00003", "data-backup", "data-٣")]


def test_a_start_a_shorter_slab_and_a_purge_leave_strangers_alone(filled, context, victim):
    folder = folder_of(filled, context)
    paths = strangers_in(folder, victim)
    before = contents(victim)
    with hold(filled):
        left = delete_namespace(folder)
    assert sorted(left) == sorted(path.name for path in paths)
    assert all(os.path.lexists(path) for path in paths)
    assert (folder / "data-00001" / "thesis.tex").exists()
    assert contents(victim) == before


def test_making_room_leaves_strangers_alone_and_counts_what_is_ours_only(filled, context, victim, caplog):
    folder = folder_of(filled, context)
    paths = strangers_in(folder, victim)
    store = open_slab(filled, make_context("other"))
    assert all(write(store, range(store.num_slots)))
    store.close()
    assert sorted(os.listdir(folder)) == sorted(path.name for path in paths)
    assert "is not kvtier's" in caplog.text


@pytest.mark.root
@pytest.mark.parametrize("who", ["purge", "engine"])
def test_a_directory_mounted_inside_a_namespace_is_not_emptied(filled, context, victim, bind, who):
    (folder_of(filled, context) / "data-00001").mkdir()
    bind(victim, folder_of(filled, context) / "data-00001")
    if who == "purge":
        with hold(filled):
            assert delete_namespace(folder_of(filled, context)) == ["data-00001"]
    else:
        store = open_slab(filled, make_context("other"))
        assert all(write(store, range(store.num_slots)))
        store.close()
    assert len(os.listdir(victim)) == 3


@pytest.mark.root
def test_a_namespaces_folder_that_is_mounted_is_no_namespace(filled, context, tmp_path, bind):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder_of(filled, context), elsewhere)
    (filled / ("e" * 32)).mkdir()
    bind(elsewhere, filled / ("e" * 32))
    store = open_slab(filled, make_context("other"))
    assert all(write(store, range(store.num_slots)))
    store.close()
    assert sorted(os.listdir(elsewhere)) == ["data-00000", "headers", "namespace.json"]


@pytest.mark.root
def test_files_of_another_owner_are_not_opened(filled, context):
    os.chown(headers_file(filled, context), 12345, 12345)
    with pytest.raises(StoreUnavailableError, match="belongs to user 12345"):
        open_slab(filled, context)


# -- what happens while it runs -------------------------------------------------------------------------------


def test_a_data_file_replaced_by_a_link_while_running_leads_nowhere(tmp_path, context, victim):
    store = open_slab(tmp_path / "slab", context, 8 << 20)
    assert all(write(store, range(4)))
    path = segment_file(tmp_path / "slab", context)
    path.unlink()
    path.symlink_to(victim / "precious0")
    before = contents(victim)
    for start in range(0, store.num_slots - 8, 8):
        write(store, range(start, start + 8))
        read(store, range(start, start + 8))
    store.close()
    assert contents(victim) == before


@pytest.mark.parametrize("how", ["moved", "link", "another"])
def test_a_namespaces_folder_that_is_replaced_while_running_is_noticed(tmp_path, context, victim, how):
    store = open_slab(tmp_path / "slab", context)
    assert all(write(store, range(4)))
    folder = folder_of(tmp_path / "slab", context)
    folder.rename(tmp_path / "moved")
    if how == "link":
        folder.symlink_to(victim)
    elif how == "another":
        shutil.copytree(tmp_path / "moved", folder)
    before = contents(victim)
    for call in (write, read):
        with pytest.raises(StoreUnavailableError, match="replaced"):
            call(store, range(4))
    store.close()
    assert contents(victim) == before


@pytest.mark.parametrize("how", ["removed", "another"])
def test_headers_that_are_removed_or_replaced_while_running_are_noticed(tmp_path, context, how):
    store = open_slab(tmp_path / "slab", context)
    assert all(write(store, range(4)))
    headers = headers_file(tmp_path / "slab", context)
    if how == "another":
        shutil.copy(headers, tmp_path / "copy")
        (tmp_path / "copy").rename(headers)
    else:
        headers.unlink()
    for call in (write, read):
        with pytest.raises(StoreUnavailableError, match="replaced"):
            call(store, range(4))
    store.close()


def test_a_directory_open_to_others_is_closed_to_them_again(filled, context):
    filled.chmod(0o770)
    folder_of(filled, context).chmod(0o775)
    open_slab(filled, context).close()
    assert filled.stat().st_mode & 0o777 == folder_of(filled, context).stat().st_mode & 0o777 == 0o700


def test_times_that_no_calendar_has_are_no_fault(filled, context):
    description = folder_of(filled, context) / "namespace.json"
    os.utime(description, (1 << 33, 1 << 33))
    assert survey_slab(filled).namespaces[0].last_use > 1 << 32
    assert json.loads(description.read_text())["identity"]


# -- records that somebody forged -----------------------------------------------------------------------------


def forged(filled, context, number, slot, sequence):
    """Plant a record that says, in the right form, that a block is in a slot in which it is not."""
    record = bytearray(read_at(headers_file(filled, context), number * RECORD_BYTES, RECORD_BYTES))
    record[6:12] = sequence.to_bytes(6, "little")
    record[12:16] = slot.to_bytes(4, "little")
    record[120:] = header_checksum(bytes(record)).to_bytes(8, "little")
    write_at(headers_file(filled, context), slot * RECORD_BYTES, bytes(record))


@pytest.fixture
def long(filled, context):
    """As `filled`, with data files long enough for more."""
    with segment_file(filled, context).open("ab") as file:
        file.write(bytes(40 * BLOCK))
    return filled


@pytest.mark.parametrize("sequence", [11, 1 << 40, (1 << 48) - 1])
def test_a_forged_record_with_the_highest_number_does_not_cost_the_good_block(long, context, sequence):
    for slot in (20, 21, 22):
        forged(long, context, number=3, slot=slot, sequence=sequence)
    store = open_slab(long, context)
    assert sorted(recovered(store)) == list(range(10))
    assert read(store, range(10)) == list(range(10))
    assert context.failures.take() == {FailureCause.CORRUPT: 3}
    assert write(store, [11]) == [True]
    store.close()
    record = read_at(headers_file(long, context), 11 * RECORD_BYTES, RECORD_BYTES)
    assert int.from_bytes(record[6:12], "little") == 11, "the forged number is not believed"
    store = open_slab(long, context)
    assert sorted(recovered(store)) == [*range(10), 11]
    store.close()


def test_a_forged_record_of_a_block_that_is_not_there_goes_at_the_next_start(long, context):
    forged(long, context, number=3, slot=25, sequence=(1 << 48) - 1)
    write_at(headers_file(long, context), 3 * RECORD_BYTES, bytes(RECORD_BYTES))
    store = open_slab(long, context)
    assert not {3, 25} & recovered(store).keys()
    assert write(store, [3]) == [True]
    store.close()
    store = open_slab(long, context)
    assert sorted(recovered(store)) == list(range(10))
    store.close()


def test_a_later_copy_of_a_block_still_replaces_the_earlier(filled, context):
    store = open_slab(filled, context)
    recovered(store)
    assert store.write([15], [make_key(3)], [memoryview(make_payload(3, BLOCK))]) == [True]
    store.close()
    store = open_slab(filled, context)
    assert sorted(recovered(store)) == [0, 1, 2, *range(4, 10), 15]
    store.close()
    assert context.failures.take() == {}


def test_names_of_data_files():
    assert [segment_of(name) for name in ("data-00000", "data-00012", "data-123456")] == [0, 12, 123456]
    for name in ("data-1", "data-000012", "data-12345678", "data-٣٣٣٣٣", "data-", "data-0000x", "data-00000\n"):
        assert segment_of(name) is None, name
