"""What files, filesystems and other processes do to a slab: misses and clear errors, never a wrong byte."""

import dataclasses
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import slab_files
from requirements import need_mounts
from slab_files import folder_of, headers_file, make_context, open_slab, real_bytes, recovered, segment_file

from kvtier.errors import StoreError, StoreUnavailableError
from kvtier.namespace import FORMAT_VERSION
from kvtier.stores.integrity.header import header_checksum
from kvtier.testing.stores import make_key, make_payload
from kvtier.types import FailureCause

BLOCK = 8192


def write(store, numbers, offset=0):
    payloads = [memoryview(make_payload(number, BLOCK)) for number in numbers]
    return store.write([number + offset for number in numbers], [make_key(number) for number in numbers], payloads)


def read(store, numbers):
    """Which numbers are served; what is served must be right."""
    buffers = [memoryview(bytearray(BLOCK)) for _ in numbers]
    results = store.read_into(list(numbers), [make_key(number) for number in numbers], buffers)
    for number, result, buffer in zip(numbers, results, buffers, strict=True):
        assert not result or bytes(buffer) == make_payload(number, BLOCK)
    return [number for number, result in zip(numbers, results, strict=True) if result]


@pytest.fixture
def context():
    return make_context()


@pytest.fixture
def slab(tmp_path):
    return tmp_path / "slab"


@pytest.fixture
def filled(slab, context):
    """A closed slab with blocks 0 to 19 in the slots of their numbers."""
    store = open_slab(slab, context)
    assert all(write(store, range(20)))
    store.close()
    return slab


def after(filled, context):
    """Open a slab that something happened to; return what it recovers and what it then serves, and its counts."""
    store = open_slab(filled, context)
    try:
        slots = sorted(recovered(store))
        served = read(store, range(20))
        return slots, served, context.failures.take()
    finally:
        store.close()


ALL = list(range(20))


def test_untouched_it_serves_everything(filled, context):
    assert after(filled, context) == (ALL, ALL, {})


def test_data_cut_short(filled, context):
    os.truncate(segment_file(filled, context), 10 * BLOCK + 100)
    slots, served, causes = after(filled, context)
    assert slots == served == ALL[:10]
    assert causes[FailureCause.CORRUPT] == 10
    assert after(filled, context)[0] == ALL[:10]


def test_data_cut_short_while_open(slab, context):
    store = open_slab(slab, context)
    write(store, ALL)
    os.truncate(segment_file(slab, context), 10 * BLOCK + 100)
    assert read(store, ALL) == ALL[:10]
    assert all(write(store, ALL[10:]))
    assert read(store, ALL) == ALL
    store.close()


def test_data_grown(filled, context):
    with segment_file(filled, context).open("ab") as file:
        file.write(bytes(100_000_000))
    assert after(filled, context) == (ALL, ALL, {})
    assert segment_file(filled, context).stat().st_size <= 1 << 20


def test_data_deleted(filled, context):
    segment_file(filled, context).unlink()
    slots, served, causes = after(filled, context)
    assert slots == served == []
    assert causes[FailureCause.CORRUPT] == 20


def test_headers_cut_grown_deleted(filled, context):
    os.truncate(headers_file(filled, context), 5 * 128 + 64)
    assert after(filled, context)[:2] == (ALL[:5], ALL[:5])
    with headers_file(filled, context).open("ab") as file:
        file.write(b"x" * 1000)
    assert after(filled, context)[:2] == (ALL[:5], ALL[:5])
    headers_file(filled, context).unlink()
    assert after(filled, context)[:2] == ([], [])


def test_description_garbled_or_deleted(filled, context):
    path = folder_of(filled, context) / "namespace.json"
    path.write_bytes(b"\xff{")
    assert after(filled, context)[0] == ALL
    path.unlink()
    assert after(filled, context)[0] == ALL
    assert path.read_text() == context.namespace.describe()


def record_of(filled, context, slot):
    return slab_files.read_at(headers_file(filled, context), slot * 128, 128)


def plant_record(filled, context, slot, record):
    slab_files.write_at(headers_file(filled, context), slot * 128, record)


def test_an_older_formats_record(filled, context):
    record = bytearray(record_of(filled, context, 3))
    record[4] = FORMAT_VERSION - 1
    record[120:] = header_checksum(bytes(record)).to_bytes(8, "little")
    plant_record(filled, context, 3, bytes(record))
    slots, served, causes = after(filled, context)
    assert slots == served == [number for number in ALL if number != 3]
    assert causes == {FailureCause.OLD_FORMAT: 1, FailureCause.ABSENT: 1}


def test_a_record_and_data_moved_to_another_slot(filled, context):
    for source, target in ((1, 2), (2, 1)):
        plant_record(filled, context, target, record_of(filled, context, source) if source == 1 else bytes(128))
        slab_files.write_at(segment_file(filled, context), target * BLOCK, make_payload(source, BLOCK))
    slots, served, causes = after(filled, context)
    assert slots == served == [number for number in ALL if number not in (1, 2)]
    assert causes[FailureCause.FOREIGN] == 1


def test_another_models_files_in_our_folder(filled, context):
    other = make_context("other")
    store = open_slab(filled, other)
    write(store, range(20))
    store.close()
    shutil.copy(headers_file(filled, other), headers_file(filled, context))
    slots, served, causes = after(filled, context)
    assert slots == served == []
    assert causes[FailureCause.FOREIGN] == 20


def test_records_of_another_block_size(filled, context):
    store = open_slab(filled, make_context(block_bytes=4096))
    assert recovered(store) == {}
    store.close()


HOLDER = """
import sys, slab_files
store = slab_files.open_slab(sys.argv[1], slab_files.make_context())
print("open", flush=True)
sys.stdin.read()
"""


def start_child(script, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )


def test_a_directory_that_another_process_holds(slab, context):
    with start_child(HOLDER, str(slab)) as child:
        assert child.stdout.readline() == "open\n"
        with pytest.raises(StoreUnavailableError, match=f"held by another process.*{child.pid}"):
            open_slab(slab, context)
        child.kill()
        child.wait()
    open_slab(slab, context).close()


def test_a_directory_that_this_process_holds(slab, context):
    store = open_slab(slab, context)
    with pytest.raises(StoreUnavailableError, match="held"):
        open_slab(slab, context)
    store.close()
    open_slab(slab, context).close()


def test_a_path_that_is_a_file(tmp_path, context):
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(StoreUnavailableError, match=str(path)):
        open_slab(path, context)
    with pytest.raises(StoreUnavailableError, match=str(path)):
        open_slab(path / "below", context)


def test_someone_elses_open_directory_is_not_taken(tmp_path, context):
    path = tmp_path / "home"
    path.mkdir(mode=0o755)
    path.chmod(0o755)
    (path / "letter.txt").write_text("dear")
    with pytest.raises(StoreUnavailableError, match="neither empty nor a slab"):
        open_slab(path, context)
    assert path.stat().st_mode & 0o777 == 0o755
    (path / "letter.txt").unlink()
    open_slab(path, context).close()
    assert path.stat().st_mode & 0o777 == 0o700


def test_everything_is_private(filled, context):
    assert filled.stat().st_mode & 0o777 == 0o700
    assert folder_of(filled, context).stat().st_mode & 0o777 == 0o700
    files = [path for path in filled.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"lock", "namespace.json", "headers", "data-00000"}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_a_symbolic_link_in_place_of_a_file_is_refused(filled, context, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    headers_file(filled, context).unlink()
    headers_file(filled, context).symlink_to(victim)
    with pytest.raises(StoreUnavailableError):
        open_slab(filled, context)
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("removed", ["all", "namespace"])
def test_a_directory_that_disappears(slab, context, removed):
    store = open_slab(slab, context)
    write(store, ALL)
    shutil.rmtree(slab if removed == "all" else folder_of(slab, context))
    with pytest.raises(StoreError, match="removed"):
        write(store, ALL)
    with pytest.raises(StoreError, match="removed"):
        read(store, ALL)
    store.close()
    store = open_slab(slab, context)
    assert recovered(store) == {}
    assert all(write(store, ALL))
    assert read(store, ALL) == ALL
    store.close()


def test_a_file_size_limit_is_no_space(slab, context):
    """What the system refuses to write fails alone, and what was there before is still served."""
    store = open_slab(slab, context, capacity=1 << 20)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * BLOCK, before[1]))
    try:
        results = write(store, ALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert results == [number < 10 for number in ALL]
    assert context.failures.take() == {FailureCause.NO_SPACE: 10}
    assert read(store, ALL[:10]) == ALL[:10]
    assert all(write(store, ALL))
    store.close()


def test_min_free_is_left_free(slab, context):
    status = os.statvfs(slab.parent)
    store = open_slab(slab, context, min_free=status.f_blocks * status.f_frsize - (1 << 20))
    assert not any(write(store, ALL))
    assert context.failures.take() == {FailureCause.NO_SPACE: 20}
    store.close()


@pytest.fixture
def mount():
    """Return a function that mounts a tmpfs with options; needs root and the right to mount."""
    need_mounts()
    mounted = []

    def make(options):
        path = Path(tempfile.mkdtemp(prefix="kvtier-mount-"))
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "kvtier-test", str(path)], capture_output=True, text=True
        )
        if done.returncode:
            path.rmdir()
            pytest.skip(f"may not mount here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield make
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)
        path.rmdir()


@pytest.mark.root
def test_a_full_disk(mount, context):
    disk = mount("size=1100k")
    (disk / "filler").write_bytes(bytes(844 * 1024))
    store = open_slab(disk / "slab", context, capacity=1 << 20)
    results = write(store, range(100))
    held = [number for number, result in enumerate(results) if result]
    assert 10 <= len(held) <= 31
    assert context.failures.take() == {FailureCause.NO_SPACE: 100 - len(held)}
    assert read(store, held) == held
    assert not any(write(store, range(60, 100)))
    store.close()
    store = open_slab(disk / "slab", context, capacity=1 << 20)
    assert sorted(recovered(store)) == held
    assert read(store, held) == held
    store.close()


@pytest.mark.root
def test_a_filesystem_that_can_never_hold_it(mount, context):
    disk = mount("size=800k")
    with pytest.raises(StoreUnavailableError, match=r"its filesystem has 800.0 KiB, too small for 1.0 MiB"):
        open_slab(disk / "slab", context, capacity=1 << 20)
    with pytest.raises(StoreUnavailableError, match=r"600\.0 KiB to stay free"):
        open_slab(disk / "slab", context, capacity=300_000, min_free=600 << 10)
    open_slab(disk / "slab", context, capacity=700 << 10).close()


@pytest.mark.root
def test_a_disk_too_full_to_start(mount, context):
    disk = mount("size=1100k")
    (disk / "filler").write_bytes(bytes(1092 * 1024))
    with pytest.raises(StoreUnavailableError, match="No space"):
        open_slab(disk / "slab", context)
    (disk / "filler").unlink()
    open_slab(disk / "slab", context).close()


@pytest.mark.root
def test_a_read_only_directory(mount, context):
    disk = mount("size=8m")
    store = open_slab(disk / "slab", context)
    write(store, ALL)
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(StoreUnavailableError, match="Read-only"):
        open_slab(disk / "slab", context)
    with pytest.raises(StoreUnavailableError, match="Read-only"):
        open_slab(disk / "another", context)
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    store = open_slab(disk / "slab", context)
    assert sorted(recovered(store)) == ALL
    store.close()


@pytest.mark.root
def test_a_foreign_owner(slab, context):
    slab.mkdir(mode=0o700)
    os.chown(slab, 12345, -1)
    with pytest.raises(StoreUnavailableError, match="belongs to user 12345"):
        open_slab(slab, context)


@pytest.mark.root
def test_min_free_is_left_free_by_the_records_too(mount, context):
    """Space for all records is taken at once, unless there is too little: then with the records."""
    disk = mount("size=64m")
    (disk / "filler").write_bytes(bytes(46 << 20))
    small = dataclasses.replace(context, block_bytes=512)
    store = open_slab(disk / "slab", small, capacity=40 << 20, min_free=16 << 20)
    assert shutil.disk_usage(disk).free >= 16 << 20
    payload = memoryview(make_payload(0, 512))
    stored = [store.write([slot], [make_key(slot)], [payload])[0] for slot in range(40)]
    store.close()
    assert any(stored)
    assert shutil.disk_usage(disk).free >= (16 << 20) - (64 << 10)
    store = open_slab(disk / "slab", small, capacity=40 << 20, min_free=16 << 20)
    assert len(recovered(store)) == sum(stored)
    assert shutil.disk_usage(disk).free >= (16 << 20) - (64 << 10)
    store.close()


def test_a_data_file_that_is_a_link_is_not_cut(filled, context, tmp_path):
    victim = tmp_path / "victim"
    segment_file(filled, context).rename(victim)
    segment_file(filled, context).symlink_to(victim)
    before = victim.read_bytes()
    with pytest.raises(StoreUnavailableError, match="symbolic links"):
        open_slab(filled, context)
    assert victim.read_bytes() == before


def test_a_strangers_file_in_a_namespaces_folder_costs_no_capacity(filled, context):
    """Its folder still counts, and gives way; the file stays."""
    other = make_context(model="other")
    (folder_of(filled, context) / "headers.bak").write_bytes(b"mine")
    store = open_slab(filled, other)
    payloads = [memoryview(make_payload(number, other.block_bytes)) for number in range(store.num_slots)]
    keys = [make_key(number) for number in range(store.num_slots)]
    assert all(store.write(list(range(store.num_slots)), keys, payloads))
    assert real_bytes(filled) <= (1 << 20) + 8192
    assert os.listdir(folder_of(filled, context)) == ["headers.bak"]
    store.close()
