"""A slab never takes more than its capacity, whatever shares its directory and however it is reopened."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slab_files import folder_of, make_context, open_slab, real_bytes, recovered, segment_file

from kvtier.errors import ConfigError
from kvtier.stores.slab import layout
from kvtier.stores.slab.layout import SlabGeometry
from kvtier.testing.stores import make_key, make_payload

BLOCK = 8192
CAPACITY = 1 << 20
MANY_FILES = {"segment_bytes": 16 * BLOCK, "growth_bytes": 4 * BLOCK}
"""Sizes of data files and steps of growth that give a small slab many of each."""


def write(store, numbers):
    payloads = [memoryview(make_payload(number, BLOCK)) for number in numbers]
    return store.write(list(numbers), [make_key(number) for number in numbers], payloads)


def served(store, numbers):
    buffers = [memoryview(bytearray(BLOCK)) for _ in numbers]
    results = store.read_into(list(numbers), [make_key(number) for number in numbers], buffers)
    for number, result, buffer in zip(numbers, results, buffers, strict=True):
        assert not result or bytes(buffer) == make_payload(number, BLOCK)
    return [number for number, result in zip(numbers, results, strict=True) if result]


@given(st.integers(1, 1 << 44), st.integers(1, 1 << 30))
def test_geometry_fits_and_every_slot_has_its_own_place(capacity, block_bytes):
    least = layout.FIXED_BYTES + layout.FILESYSTEM_BYTES_PER_SEGMENT + block_bytes + 128 + 32
    if capacity < least:
        with pytest.raises(ConfigError, match=f"capacity={capacity}: at least {least} bytes"):
            SlabGeometry.of(capacity, block_bytes)
        capacity = least
    slab = SlabGeometry.of(capacity, block_bytes)
    lengths = [slab.segment_bytes(segment) for segment in (0, slab.num_segments - 1)]
    assert all(0 < length <= layout.SEGMENT_BYTES for length in lengths)
    assert slab.segment_bytes(slab.num_segments) == 0
    assert slab.num_slots * block_bytes + slab.headers_bytes <= capacity
    segment, offset = slab.locate(slab.num_slots - 1)
    assert segment == slab.num_segments - 1
    assert offset + block_bytes == lengths[-1]


def test_capacity_is_used_but_for_a_little():
    slab = SlabGeometry.of(1 << 30, 512 << 10)
    assert slab.num_slots >= 2046
    assert slab.cost_bytes([slab.segment_bytes(segment) for segment in range(slab.num_segments)]) <= 1 << 30


@pytest.mark.parametrize("capacity", [0, 4096, BLOCK, BLOCK + 30_000])
def test_a_capacity_under_one_block_is_an_error(tmp_path, capacity):
    with pytest.raises(ConfigError, match=f"capacity={capacity}: .*at least"):
        open_slab(tmp_path / "slab", make_context(), capacity=capacity)


def test_full_slabs_keep_to_the_capacity(tmp_path):
    for name in ("one", "two", "three"):
        store = open_slab(tmp_path / "slab", make_context(name), CAPACITY, MANY_FILES)
        for slot in range(store.num_slots):
            assert write(store, [slot]) == [True]
            assert real_bytes(tmp_path / "slab") <= CAPACITY
        assert len(served(store, range(store.num_slots))) == store.num_slots
        store.close()
        assert real_bytes(tmp_path / "slab") <= CAPACITY


def test_scattered_slots_keep_to_the_capacity(tmp_path):
    store = open_slab(tmp_path / "slab", make_context(), CAPACITY, MANY_FILES)
    for slot in [*range(1, store.num_slots, 2), *range(0, store.num_slots, 2)]:
        assert write(store, [slot]) == [True]
    os.sync()
    assert real_bytes(tmp_path / "slab") <= CAPACITY
    store.close()


def test_namespaces_share_and_the_least_recently_used_gives_way(tmp_path):
    contexts = {name: make_context(name) for name in ("old", "recent", "ours")}
    for age, name in ((200, "old"), (100, "recent")):
        store = open_slab(tmp_path / "slab", contexts[name], CAPACITY, MANY_FILES)
        assert all(write(store, range(30)))
        store.close()
        stamp = (folder_of(tmp_path / "slab", contexts[name]) / "namespace.json").stat().st_mtime - age
        os.utime(folder_of(tmp_path / "slab", contexts[name]) / "namespace.json", (stamp, stamp))
    store = open_slab(tmp_path / "slab", contexts["ours"], CAPACITY, MANY_FILES)
    assert all(write(store, range(30)))
    assert folder_of(tmp_path / "slab", contexts["old"]).exists()
    assert all(write(store, range(30, 70)))
    assert not folder_of(tmp_path / "slab", contexts["old"]).exists()
    assert folder_of(tmp_path / "slab", contexts["recent"]).exists()
    assert real_bytes(tmp_path / "slab") <= CAPACITY
    store.close()
    store = open_slab(tmp_path / "slab", contexts["recent"], CAPACITY, MANY_FILES)
    assert len(recovered(store)) == len(served(store, range(30))) == 30
    store.close()


def test_ended_epochs_and_unfinished_folders_are_deleted_at_open(tmp_path):
    slab = tmp_path / "slab"
    epochs = [make_context("model", epoch=epoch) for epoch in (b"", b"\1" * 8, b"\2" * 8)]
    for context in epochs:
        store = open_slab(slab, context, CAPACITY)
        write(store, range(5))
        store.close()
    (slab / ("ab" * 16)).mkdir()
    (slab / "notes").mkdir()
    (slab / ("cd" * 16)).mkdir()
    (slab / ("cd" * 16) / "thesis.tex").write_text("precious")
    open_slab(slab, epochs[2], CAPACITY).close()
    assert [folder_of(slab, context).exists() for context in epochs] == [True, False, True]
    assert not (slab / ("ab" * 16)).exists()
    assert (slab / "notes").exists(), "what is not ours stays"
    assert (slab / ("cd" * 16) / "thesis.tex").exists(), "also under a name like ours"


def test_a_smaller_capacity_cuts_and_a_larger_one_keeps(tmp_path):
    slab, context = tmp_path / "slab", make_context()
    store = open_slab(slab, context, CAPACITY, MANY_FILES)
    full = store.num_slots
    assert all(write(store, range(full)))
    store.close()
    store = open_slab(slab, context, CAPACITY // 2, MANY_FILES)
    half = store.num_slots
    assert sorted(recovered(store)) == list(range(half)) == served(store, range(half))
    assert real_bytes(slab) <= CAPACITY // 2
    store.close()
    store = open_slab(slab, context, CAPACITY * 2, MANY_FILES)
    assert sorted(recovered(store)) == list(range(half)) == served(store, range(half))
    assert all(write(store, range(half, store.num_slots)))
    store.close()
    store = open_slab(slab, context, CAPACITY * 2, MANY_FILES)
    assert sorted(recovered(store)) == list(range(store.num_slots)) == served(store, range(store.num_slots))
    store.close()


def test_space_is_taken_when_it_is_needed(tmp_path):
    context = make_context()
    store = open_slab(tmp_path / "slab", context, 8 << 30)
    assert real_bytes(tmp_path / "slab") < 256 << 20, "the records only"
    assert all(write(store, [0]))
    assert segment_file(tmp_path / "slab", context).stat().st_size == layout.GROWTH_BYTES
    assert not segment_file(tmp_path / "slab", context, 1).exists()
    store.close()
