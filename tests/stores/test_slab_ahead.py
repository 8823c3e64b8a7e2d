"""Written ahead: space and zeros before blocks come, never beyond what the slab may take, never over a block."""

import errno
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
import slab_files
from slab_files import make_context, real_bytes, recovered, segment_file

from kvtier.stores.mounts import filesystem_type
from kvtier.stores.own_files import Folder
from kvtier.stores.slab.layout import SlabGeometry
from kvtier.testing.stores import make_key, make_payload

BLOCK = 8192
CAPACITY = 24 << 20


def open_slab(directory, context, capacity=CAPACITY, writes_ahead=True, **options):
    """Open a slab that writes ahead on any filesystem."""
    return slab_files.open_slab(directory, context, capacity, {"writes_ahead": writes_ahead}, **options)


def prepare_all(store):
    last = (0, 0)
    while (progress := store.prepare()) is not None:
        assert progress > last
        last = progress
    return last


def buffers_of(numbers):
    return [memoryview(make_payload(number, BLOCK)) for number in numbers]


def test_a_whole_slab_is_backed_and_keeps_to_its_capacity(tmp_path):
    store = open_slab(tmp_path / "slab", make_context(), capacity=CAPACITY)
    geometry = SlabGeometry.of(CAPACITY, BLOCK)
    assert prepare_all(store) == (geometry.segment_bytes(0), geometry.segment_bytes(0))
    data = segment_file(tmp_path / "slab", make_context())
    assert data.stat().st_size == geometry.segment_bytes(0)
    assert data.stat().st_blocks * 512 >= geometry.segment_bytes(0)
    assert real_bytes(tmp_path / "slab") <= CAPACITY
    assert not any(data.read_bytes())
    store.close()


def test_blocks_stored_meanwhile_are_never_overwritten(tmp_path):
    store = open_slab(tmp_path / "slab", make_context(), capacity=CAPACITY)
    keys = [make_key(number) for number in range(store.num_slots)]
    ahead = threading.Thread(target=prepare_all, args=(store,))
    ahead.start()
    for first in range(0, store.num_slots, 64):
        slots = range(first, min(first + 64, store.num_slots))
        assert all(store.write(slots, [keys[slot] for slot in slots], buffers_of(slots)))
    ahead.join()
    for slot in range(store.num_slots):
        buffer = memoryview(bytearray(BLOCK))
        assert store.read_into([slot], [keys[slot]], [buffer]) == [True]
        assert buffer == make_payload(slot, BLOCK)
    store.close()


def test_a_full_disk_ends_it_quietly_and_is_not_taken(tmp_path, monkeypatch, caplog):
    store = open_slab(tmp_path / "slab", make_context(), capacity=CAPACITY)
    assert store.prepare() is not None
    data = segment_file(tmp_path / "slab", make_context())
    length = data.stat().st_size

    def full(descriptor, start, count):
        os.ftruncate(descriptor, start + count // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert store.prepare() is None
    assert data.stat().st_size == length
    assert store.prepare() is None
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert store.write([0], [make_key(0)], buffers_of([0])) == [True]
    store.close()


def test_what_must_stay_free_stays_free(tmp_path):
    min_free = shutil.disk_usage(tmp_path).total - 2 * CAPACITY  # more than there is, on a filesystem in use
    store = open_slab(tmp_path / "slab", make_context(), capacity=CAPACITY, min_free=min_free)
    assert store.prepare() is None
    store.close()


@pytest.mark.parametrize("held", [1, 1500])
def test_another_namespace_keeps_its_blocks(tmp_path, held):
    """What it holds is kept; what it only took ahead gives way."""
    first = open_slab(tmp_path / "slab", make_context(), capacity=CAPACITY)
    for number in range(held):
        assert first.write([number], [make_key(number)], buffers_of([number])) == [True]
    prepare_all(first)
    first.close()
    data = segment_file(tmp_path / "slab", make_context())
    os.utime(data, (1, 1))
    second = open_slab(tmp_path / "slab", make_context("another"), capacity=CAPACITY)
    done, total = prepare_all(second)
    assert real_bytes(tmp_path / "slab") <= CAPACITY
    assert done < total
    assert done >= CAPACITY - held * BLOCK - (6 << 20)
    second.close()
    assert data.stat().st_mtime == 1, "that was no use of it"
    first = open_slab(tmp_path / "slab", make_context(), capacity=CAPACITY)
    assert len(recovered(first)) == held
    buffer = memoryview(bytearray(BLOCK))
    assert first.read_into([held - 1], [make_key(held - 1)], [buffer]) == [True]
    assert bytes(buffer) == make_payload(held - 1, BLOCK)
    first.close()


def test_a_full_namespace_leaves_nothing_to_take_ahead(tmp_path):
    first = open_slab(tmp_path / "slab", make_context(), capacity=CAPACITY)
    slots = range(first.num_slots - 200)  # and the records of the other
    assert all(first.write(slots, [make_key(slot) for slot in slots], buffers_of(slots)))
    first.close()
    second = open_slab(tmp_path / "slab", make_context("another"), capacity=CAPACITY)
    assert second.prepare() is None
    second.close()
    first = open_slab(tmp_path / "slab", make_context(), capacity=CAPACITY)
    assert len(recovered(first)) == len(slots)
    first.close()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs at /dev/shm")
def test_filesystems_that_gain_nothing_are_left_alone():
    with tempfile.TemporaryDirectory(prefix="kvtier-ahead-", dir="/dev/shm") as folder:
        store = open_slab(Path(folder) / "slab", make_context(), writes_ahead=None)
        assert store.prepare() is None
        store.close()


def test_the_kind_of_a_filesystem_is_known():
    with Folder.open(Path("/proc")) as folder:
        assert filesystem_type(folder.descriptor) == "proc"
