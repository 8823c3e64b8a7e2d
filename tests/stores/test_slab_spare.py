"""What a namespace took ahead of its blocks is given back before any of its blocks is."""

import slab_files
from slab_files import folder_of, headers_file, make_context, real_bytes, recovered, segment_file

from kvtier.stores.own_files import Folder
from kvtier.stores.slab.namespaces import cut_spare
from kvtier.testing.stores import make_key, make_payload

BLOCK = 8192
CAPACITY = 24 << 20


def open_slab(directory, context, capacity=CAPACITY, writes_ahead=True, **options):
    """Open a slab that writes ahead on any filesystem."""
    return slab_files.open_slab(directory, context, capacity, {"writes_ahead": writes_ahead}, **options)


def store_blocks(store, numbers):
    keys = [make_key(number) for number in numbers]
    buffers = [memoryview(make_payload(number, BLOCK)) for number in numbers]
    assert all(store.write(list(numbers), keys, buffers))


def cut(path, context):
    with Folder.open(folder_of(path, context)) as folder:
        cut_spare(folder)


def fill_ahead(store):
    while store.prepare() is not None:
        pass


def test_a_namespace_written_ahead_keeps_its_blocks_when_another_needs_the_space(tmp_path):
    path, old, new = tmp_path / "slab", make_context("old"), make_context("new")
    store = open_slab(path, old, CAPACITY)
    store_blocks(store, range(5))
    fill_ahead(store)
    store.close()
    store = open_slab(path, new, CAPACITY)
    half = store.num_slots // 2
    store_blocks(store, range(half))
    store.close()
    assert real_bytes(path) <= CAPACITY
    store = open_slab(path, old, CAPACITY)
    assert len(recovered(store)) == 5
    for slot in range(5):
        buffer = memoryview(bytearray(BLOCK))
        assert store.read_into([slot], [make_key(slot)], [buffer]) == [True]
        assert bytes(buffer) == bytes(make_payload(slot, BLOCK))
    store.close()


def test_a_namespace_whose_blocks_are_in_the_way_is_deleted_all_the_same(tmp_path):
    path, old = tmp_path / "slab", make_context("old")
    store = open_slab(path, old, CAPACITY)
    store_blocks(store, range(store.num_slots))
    store.close()
    store = open_slab(path, make_context("new"), CAPACITY)
    store_blocks(store, range(store.num_slots))
    store.close()
    assert not folder_of(path, old).exists()
    assert real_bytes(path) <= CAPACITY


def test_a_namespace_without_blocks_gives_everything_back(tmp_path):
    path, context = tmp_path / "slab", make_context()
    store = open_slab(path, context, CAPACITY)
    fill_ahead(store)
    store.close()
    cut(path, context)
    assert segment_file(path, context).stat().st_size == 0
    headers_file(path, context).write_bytes(b"")
    cut(path, context)
    assert recovered(open_slab(path, context, CAPACITY)) == {}
