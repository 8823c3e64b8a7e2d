"""What tools learn of a slab: the same as the store, without changing it, whoever is using it."""

import errno
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import slab_files
from sealed_blocks import header_of
from slab_files import RECORD_BYTES, folder_of, headers_file, make_context, open_slab, read_at, segment_file, write_at

from kvtier.errors import StoreError, StoreUnavailableError
from kvtier.namespace import FORMAT_VERSION, Namespace
from kvtier.stores.integrity.header import header_checksum
from kvtier.stores.integrity.plain_sealer import PlainSealer
from kvtier.stores.slab.inspection import find_slabs, read_records, survey_slab
from kvtier.stores.slab.lock import find_holder, hold
from kvtier.stores.slab.namespaces import delete_namespace, empty_records, read_description
from kvtier.stores.slab.verification import Pace, causes_of, verify_namespace
from kvtier.testing.patience import TEST_SECONDS
from kvtier.testing.stores import make_key, make_payload
from kvtier.types import FailureCause

BLOCK = 8192
BLOCKS = 20


def store_blocks(directory, context, count=BLOCKS):
    store = open_slab(directory, context, capacity=(count + 8) * (context.block_bytes + 200) + (64 << 10))
    payloads = [memoryview(make_payload(number, context.block_bytes)) for number in range(count)]
    assert all(store.write(range(count), [make_key(number) for number in range(count)], payloads))
    return store


@pytest.fixture(name="context")
def _context():
    return make_context()


@pytest.fixture(name="slab")
def _slab(tmp_path, context):
    store_blocks(tmp_path / "slab", context).close()
    return tmp_path / "slab"


def verify(slab, context, is_used=False, **pace):
    folder = folder_of(slab, context)
    return verify_namespace(folder, read_records(folder, read_description(folder)), lambda: is_used, Pace(**pace))


def tree_of(directory):
    """Everything a reader could have changed, times of reading aside."""
    return {
        path: (path.lstat().st_mtime_ns, path.lstat().st_size, path.read_bytes() if path.is_file() else b"")
        for path in [directory, *directory.rglob("*")]
    }


def test_a_survey_says_what_is_there_and_changes_nothing(slab, context):
    before = tree_of(slab)
    survey = survey_slab(slab)
    assert verify(slab, context).num_good == BLOCKS
    assert tree_of(slab) == before
    (namespace,) = survey.namespaces
    assert namespace.folder == folder_of(slab, context)
    assert namespace.description.identity == {"model": "model"}
    assert namespace.description.is_ours
    assert (namespace.block_bytes, namespace.num_blocks, namespace.broken) == (BLOCK, BLOCKS, {})
    assert namespace.num_slots == headers_file(slab, context).stat().st_size // RECORD_BYTES
    assert (list(namespace.problems), list(namespace.remarks)) == ([], [])
    assert abs(namespace.last_use - time.time()) < 60
    assert survey.disk_bytes == slab_files.real_bytes(slab)
    assert survey.free_bytes > 0
    assert survey.holder is None


def test_an_open_slab_is_held_by_its_process(slab, context):
    store = open_slab(slab, context)
    holder = find_holder(slab)
    assert (holder.pid, holder.parent_pid) == (os.getpid(), os.getppid())
    assert "python" in holder.command or "pytest" in holder.command
    with pytest.raises(StoreUnavailableError, match=f"pid {os.getpid()}"), hold(slab):
        pass
    store.close()
    assert find_holder(slab) is None
    with hold(slab):
        assert find_holder(slab).pid == os.getpid()
        with pytest.raises(StoreUnavailableError, match="held by another process"):
            open_slab(slab, context)
    open_slab(slab, context).close()


def plant_record(slab, context, slot, record):
    write_at(headers_file(slab, context), slot * RECORD_BYTES, record)


def old_format(record):
    changed = record[:4] + bytes([FORMAT_VERSION + 1]) + record[5:120]
    return changed + header_checksum(changed).to_bytes(8, "little")


def test_each_fault_has_its_cause_and_repair_clears_the_record(slab, context):
    data, headers = segment_file(slab, context), headers_file(slab, context)
    record = read_at(headers, 5 * RECORD_BYTES, RECORD_BYTES)
    foreign = header_of(PlainSealer(Namespace({"model": "another"})), make_key(3), make_payload(3, BLOCK), 3)
    write_at(data, 0 * BLOCK + 100, b"\x00\xff")  # flipped
    first, second = read_at(data, 1 * BLOCK, BLOCK), read_at(data, 2 * BLOCK, BLOCK)
    write_at(data, 1 * BLOCK, second + first)  # swapped
    plant_record(slab, context, 3, foreign)
    plant_record(slab, context, 4, record)  # of another slot
    plant_record(slab, context, 6, old_format(record))
    plant_record(slab, context, 7, b"nonsense" * 16)
    os.truncate(data, (BLOCKS - 2) * BLOCK)
    found = verify(slab, context)
    assert found.num_good == BLOCKS - 9
    assert causes_of(found.bad) == {"corrupt": 6, "foreign": 2, "old_format": 1}
    assert sorted(found.bad) == [0, 1, 2, 3, 4, 6, 7, BLOCKS - 2, BLOCKS - 1]
    with hold(slab):
        empty_records(folder_of(slab, context), found.bad)
    again = verify(slab, context)
    assert (again.num_good, again.bad) == (BLOCKS - 9, {})
    store = open_slab(slab, context)
    assert len(slab_files.recovered(store)) == BLOCKS - 9
    assert not context.failures.take()
    store.close()


def damage(slab, context, chance):
    """Change a few bytes anywhere, or cut a file."""
    files = [segment_file(slab, context), headers_file(slab, context)]
    for _ in range(chance.randrange(1, 6)):
        path = chance.choice(files)
        size = path.stat().st_size
        if chance.random() < 0.2:
            os.truncate(path, chance.randrange(max(1, size // 2), size + 1))
        else:
            offset = chance.randrange(min(size, BLOCKS * (BLOCK if path == files[0] else RECORD_BYTES)))
            write_at(path, offset, chance.randbytes(chance.choice([1, 8, 200])))


@pytest.mark.parametrize("seed", range(25))
def test_verification_finds_good_exactly_what_the_store_serves(slab, context, seed):
    damage(slab, context, random.Random(seed))
    found = verify(slab, context)
    capacity = (BLOCKS + 8) * (BLOCK + 200) + (64 << 10)
    store = open_slab(slab, context, capacity=capacity)
    held = slab_files.recovered(store)
    buffers = [memoryview(bytearray(BLOCK)) for _ in held]
    served = sum(store.read_into(list(held), list(held.values()), buffers))
    store.close()
    assert served == found.num_good


def test_a_namespace_without_a_good_record_is_repaired_too(slab, context):
    for slot in range(BLOCKS):
        plant_record(slab, context, slot, b"\x01" * RECORD_BYTES)
    found = verify(slab, context)
    assert (found.num_good, causes_of(found.bad)) == (0, {"corrupt": BLOCKS})
    folder = folder_of(slab, context)
    empty_records(folder, found.bad)
    assert not verify(slab, context).bad


@pytest.mark.parametrize("after", ["replaced", "emptied", "deleted"])
def test_a_block_that_an_engine_is_rewriting_was_changed_not_corrupt(slab, context, after):
    """The payload is new, the record still the old one: as between the store's two writes."""
    store = open_slab(slab, context, capacity=1 << 20)
    write_at(segment_file(slab, context), 3 * BLOCK, make_payload(99, BLOCK))

    def go_on(_):
        if after == "replaced":
            assert store.write([3], [make_key(99)], [memoryview(make_payload(99, BLOCK))]) == [True]
        elif after == "emptied":
            plant_record(slab, context, 3, bytes(RECORD_BYTES))
        else:
            shutil.rmtree(folder_of(slab, context))

    found = verify(slab, context, is_used=True, on_bytes=go_on)
    assert (found.num_good, found.num_changed, found.bad) == (BLOCKS - 1, 1, {})
    if after != "deleted":
        store.close()


def test_a_record_written_seconds_later_is_waited_for(slab, context):
    write_at(segment_file(slab, context), 3 * BLOCK, make_payload(99, BLOCK))
    record = header_of(PlainSealer(context.namespace), make_key(99), make_payload(99, BLOCK), 3)
    timer = threading.Timer(0.5, plant_record, (slab, context, 3, record))
    found = verify(slab, context, is_used=True, on_bytes=lambda _: timer.start(), settle_seconds=2 * TEST_SECONDS)
    assert (found.num_changed, found.bad) == (1, {})


def test_a_corrupt_block_of_a_used_directory_stays_corrupt(slab, context):
    write_at(segment_file(slab, context), 3 * BLOCK, b"\xff")
    found = verify(slab, context, is_used=True, settle_seconds=0.3)
    assert (found.num_good, found.bad) == (BLOCKS - 1, {3: FailureCause.CORRUPT})


WRITER = """
import random, sys
sys.path.insert(0, sys.argv[2])
import slab_files
from kvtier.testing.stores import make_key, make_payload

context = slab_files.make_context(block_bytes=65536)
store = slab_files.open_slab(sys.argv[1], context, capacity=4 << 20)
list(store.recover())
payloads = [memoryview(make_payload(number, 65536)) for number in range(40)]
chance = random.Random(1)
print("writing", flush=True)
while True:
    slots = chance.sample(range(48), 8)
    chosen = [chance.randrange(40) for _ in slots]
    keys = [make_key(number + 40 * chance.randrange(3)) for number in chosen]
    store.write(slots, keys, [payloads[number] for number in chosen])
"""


def test_nothing_is_called_corrupt_while_a_process_rewrites_everything(tmp_path):
    context = make_context(block_bytes=65536)
    slab = tmp_path / "slab"
    store_blocks(slab, context, 48).close()
    folder = Path(__file__).parent
    with subprocess.Popen([sys.executable, "-c", WRITER, slab, folder], stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout.readline() == "writing\n"
            assert find_holder(slab).pid == writer.pid
            for _ in range(15):
                found = verify(slab, context, is_used=True, settle_seconds=20.0)
                assert found.bad == {}
                assert survey_slab(slab).namespaces[0].num_blocks > 0
            assert writer.poll() is None
        finally:
            writer.kill()


def test_namespaces_come_and_go_while_it_looks(slab, context):
    done = threading.Event()

    def come_and_go():
        while not done.is_set():
            shutil.copytree(folder_of(slab, context), slab / ("a" * 32))
            shutil.rmtree(slab / ("a" * 32))

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(100):
            namespaces = {survey.folder: survey.num_blocks for survey in survey_slab(slab).namespaces}
            assert namespaces.pop(folder_of(slab, context)) == BLOCKS
            assert set(namespaces) <= {slab / ("a" * 32)}
    finally:
        done.set()
        thread.join()


def test_an_unreadable_block_is_an_io_error_and_costs_no_other(slab, context, monkeypatch):
    real = os.preadv

    def failing(descriptor, buffers, offset):
        if offset <= 4 * BLOCK < offset + sum(buffer.nbytes for buffer in buffers):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    found = verify(slab, context)
    assert (found.num_good, found.bad) == (BLOCKS - 1, {4: FailureCause.IO_ERROR})


@pytest.mark.parametrize("block_bytes", [5000, 8192, 1 << 20])
@pytest.mark.parametrize("threads", [1, 4])
def test_blocks_of_any_size_over_several_reads(tmp_path, block_bytes, threads):
    context = make_context(block_bytes=block_bytes)
    store_blocks(tmp_path / "slab", context).close()
    seen = []
    found = verify(tmp_path / "slab", context, threads=threads, on_bytes=seen.append, read_bytes=3 * block_bytes)
    assert (found.num_good, found.bad) == (BLOCKS, {})
    assert sum(seen) == found.num_bytes == BLOCKS * block_bytes
    assert max(seen) == 3 * block_bytes
    assert found.direct <= (block_bytes % 4096 == 0)


def test_neighbours_end_with_their_data_file(tmp_path, monkeypatch):
    """Slots over the border of two segments; the files are sparse, so that this costs no space."""
    context = make_context(block_bytes=1 << 20)
    store = open_slab(tmp_path / "slab", context, capacity=3 << 30)
    slots = [1022, 1023, 1024, 1025]
    payloads = [memoryview(make_payload(slot, 1 << 20)) for slot in slots]
    monkeypatch.setattr(
        os, "posix_fallocate", lambda descriptor, start, length: os.ftruncate(descriptor, start + length)
    )
    assert store.write(slots, [make_key(slot) for slot in slots], payloads) == [True] * 4
    store.close()
    seen = []
    found = verify(tmp_path / "slab", context, on_bytes=seen.append, threads=1, read_bytes=1 << 30)
    assert (found.num_good, found.bad, seen) == (4, {}, [2 << 20, 2 << 20])


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs at /dev/shm")
def test_on_tmpfs(context):
    folder = Path(tempfile.mkdtemp(prefix="kvtier-survey-", dir="/dev/shm"))
    try:
        store_blocks(folder / "slab", context).close()
        assert verify(folder / "slab", context).num_good == BLOCKS
    finally:
        shutil.rmtree(folder)


def test_without_direct_io_it_reads_through_the_page_cache(slab, context, monkeypatch):
    real = os.open

    def no_direct(path, flags, *arguments, **options):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", no_direct)
    found = verify(slab, context)
    assert (found.num_good, found.direct) == (BLOCKS, False)


def test_it_keeps_to_a_rate_and_stops_when_told(slab, context):
    assert verify(slab, context, bytes_per_second=4 * BLOCKS * BLOCK, read_bytes=BLOCK).seconds > 0.2
    stopped = threading.Event()
    with pytest.raises(StoreError, match="stopped"):
        verify(slab, context, stopped=stopped, on_bytes=lambda _: stopped.set(), read_bytes=BLOCK)


def test_superseded_records_are_no_failures(slab, context):
    plant_record(slab, context, 0, header_of(PlainSealer(context.namespace), make_key(5), make_payload(5, BLOCK), 0))
    records = read_records(folder_of(slab, context), None)
    assert (len(records.inventory), records.inventory.num_superseded) == (BLOCKS - 1, 1)
    found = verify(slab, context)
    assert (found.num_good, found.bad) == (BLOCKS - 1, {})


def test_odd_namespaces_are_reported(tmp_path, context):
    slab = tmp_path / "slab"
    for model in ("none", "wrong", "old", "epoch"):
        store = store_blocks(slab, make_context(model, epoch=b"salt" if model == "epoch" else b""), count=1)
        store.close()
    store_blocks(slab, context, count=1).close()  # deletes that of the epoch
    store_blocks(slab, make_context("epoch", epoch=b"salt"), count=1).close()
    folders = {model: folder_of(slab, make_context(model)) for model in ("none", "wrong", "old")}
    (folders["none"] / "namespace.json").unlink()
    (folders["wrong"] / "namespace.json").write_text(Namespace({"model": "another"}).describe())
    (folders["old"] / "namespace.json").write_text('{"format": 77, "epoch": "", "identity": {}}')
    (slab / ("0" * 32)).mkdir()  # unfinished
    (slab / ("1" * 32)).mkdir()
    (slab / ("1" * 32) / "mine.txt").write_text("not kvtier's")
    surveys = {survey.folder: survey for survey in survey_slab(slab).namespaces}
    assert len(surveys) == 6
    assert "namespace.json cannot be read" in surveys[folders["none"]].problems[0]
    assert "another namespace" in surveys[folders["wrong"]].problems[0]
    assert "format 77" in surveys[folders["old"]].remarks[0]
    assert "stored after a reset" in surveys[folder_of(slab, make_context("epoch", epoch=b"salt"))].remarks[0]
    assert surveys[slab / ("0" * 32)].num_slots == 0
    with hold(slab):
        delete_namespace(folders["none"])
    assert not folders["none"].exists()


def test_which_directories_are_slabs(tmp_path, slab, context):
    assert find_slabs(slab) == [slab]
    parallel = tmp_path / "parallel"
    for rank in (10, 2, 0):
        store_blocks(parallel / f"dp{rank}", context, count=1).close()
    (parallel / "dpx").mkdir()
    assert find_slabs(parallel) == [parallel / "dp0", parallel / "dp2", parallel / "dp10"]
    (parallel / "dp2" / "lock").write_bytes(bytes(8))  # as a power cut leaves it
    assert parallel / "dp2" in find_slabs(parallel)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert find_slabs(empty) == []
    (empty / "photo.jpg").write_text("")
    (empty / "lock").write_text("some other program's lock, with text in it")
    for path, word in [
        (tmp_path / "no", "No such file"),
        (slab / "lock", "not a directory"),
        (empty, "not the directory of a"),
    ]:
        with pytest.raises(StoreUnavailableError, match=word):
            find_slabs(path)
