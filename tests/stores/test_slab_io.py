"""How the slab moves bytes: few calls, direct where it can be, whole or not at all."""

import errno
import mmap
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from slab_files import make_context, open_slab, read_at, segment_file, write_at

from kvtier.stores import vectored
from kvtier.stores.integrity.sealing import PORTION_BYTES
from kvtier.stores.slab.layout import SlabGeometry, coalesce
from kvtier.stores.slab.roads import Road
from kvtier.stores.slab.store import SlabStore
from kvtier.stores.vectored import PAGE_BYTES
from kvtier.testing.stores import make_key, make_payload
from kvtier.types import FailureCause

BLOCK = 8192


NEIGHBOURS = st.builds(lambda first, count: list(range(first, first + count)), st.integers(0, 5000), st.integers(1, 60))


@given(st.lists(st.integers(0, 5000), unique=True, max_size=60) | NEIGHBOURS)
def test_runs_hold_every_slot_once_and_stay_in_their_segment(slots):
    geometry = SlabGeometry.of(8 << 30, 1 << 20)
    runs = coalesce(slots, range(len(slots)), geometry)
    assert sorted(position for run in runs for position in run.positions) == list(range(len(slots)))
    for run in runs:
        for index, position in enumerate(run.positions):
            assert slots[position] == run.slot + index
            assert geometry.locate(slots[position]) == (run.segment, run.offset + index * geometry.block_bytes)
        assert [single.slot for single in run.split(1 << 20)] == [slots[position] for position in run.positions]


def test_adjacent_slots_are_one_run_up_to_the_limit():
    geometry = SlabGeometry.of(64 << 20, 4096)
    slots = list(range(2000))
    runs = coalesce(slots[::-1], range(2000), geometry)
    assert [(run.slot, len(run.positions)) for run in runs] == [(0, 1024), (1024, 976)]


def page_aligned(count, block=BLOCK):
    memory = memoryview(mmap.mmap(-1, count * block))
    return [memory[index * block : (index + 1) * block] for index in range(count)]


@pytest.fixture
def calls(monkeypatch):
    """Vectored calls as they reach the system: (name, number of buffers)."""
    seen = []
    for name in ("preadv", "pwritev"):
        real = getattr(os, name)

        def watched(descriptor, buffers, offset, name=name, real=real):
            seen.append((name, len(buffers)))
            return real(descriptor, buffers, offset)

        monkeypatch.setattr(os, name, watched)
    return seen


def test_a_batch_of_neighbours_is_one_call(tmp_path, calls):
    store = open_slab(tmp_path / "slab", make_context())
    buffers = page_aligned(16)
    keys = [make_key(number) for number in range(16)]
    assert all(store.write(range(16), keys, buffers))
    assert all(store.read_into(range(16), keys, buffers))
    assert calls == [("pwritev", 16), ("preadv", 16)]
    store.close()


def test_neighbours_that_pass_private_memory_are_one_call(tmp_path, calls):
    block = PORTION_BYTES // 4
    options = {"path": str(tmp_path / "slab"), "capacity": 16 * block}
    store = SlabStore.open(options, make_context(block_bytes=block), road=Road.COPIED)
    buffers = page_aligned(4, block)
    keys = [make_key(number) for number in range(4)]
    assert all(store.write(range(4), keys, buffers))
    assert all(store.read_into(range(4), keys, buffers))
    assert calls == [("pwritev", 4), ("preadv", 4)]
    store.close()


def test_short_calls_are_continued(tmp_path, monkeypatch):
    context = make_context()
    store = open_slab(tmp_path / "slab", context)
    for name in ("preadv", "pwritev"):
        real = getattr(os, name)

        def short(descriptor, buffers, offset, real=real):
            return real(descriptor, [buffers[0][:1000]], offset)

        monkeypatch.setattr(os, name, short)
    keys = [make_key(number) for number in range(3)]
    payloads = [memoryview(make_payload(number, BLOCK)) for number in range(3)]
    assert store.write([4, 5, 6], keys, payloads) == [True] * 3
    buffers = [memoryview(bytearray(BLOCK)) for _ in range(3)]
    assert store.read_into([4, 5, 6], keys, buffers) == [True] * 3
    assert [bytes(buffer) for buffer in buffers] == [bytes(payload) for payload in payloads]
    store.close()


def test_a_ragged_end_of_file_does_not_end_direct_io(tmp_path):
    context = make_context()
    store = open_slab(tmp_path / "slab", context)
    keys = [make_key(number) for number in range(3)]
    assert store.write(range(3), keys, page_aligned(3)) == [True] * 3
    os.truncate(segment_file(tmp_path / "slab", context), BLOCK + 100)
    buffers = page_aligned(3)
    direct = store.direct
    assert store.read_into(range(3), keys, buffers) == [True, False, False]
    assert store.direct == direct
    store.close()


def test_slots_may_be_numpy_integers(tmp_path):
    """In numpy, 32-bit slots times the bytes of a block would overflow."""
    store = open_slab(tmp_path / "slab", make_context(), capacity=1 << 20)
    slots = np.array([3, 1, 2], np.int8)
    keys = [make_key(number) for number in range(3)]
    payloads = [memoryview(make_payload(number, BLOCK)) for number in range(3)]
    assert store.write(slots, keys, payloads) == [True] * 3
    buffers = [memoryview(bytearray(BLOCK)) for _ in range(3)]
    assert store.read_into(slots, keys, buffers) == [True] * 3
    assert [bytes(buffer) for buffer in buffers] == [bytes(payload) for payload in payloads]
    store.close()


KEYS = [make_key(number) for number in range(3)]
LARGE = 2 * PORTION_BYTES + 3 * PAGE_BYTES
"""A block of three portions, the last one smaller."""


@pytest.fixture(params=list(Road))
def large(tmp_path, request):
    """A slab with three large blocks, and their payloads, on each road."""
    context = make_context(block_bytes=LARGE)
    options = {"path": str(tmp_path / "slab"), "capacity": 8 * LARGE}
    store = SlabStore.open(options, context, road=request.param)
    payloads = page_aligned(3, LARGE)
    for number, payload in enumerate(payloads):
        payload[:] = make_payload(number, LARGE)
    assert store.write([2, 3, 5], KEYS, payloads) == [True] * 3
    yield store, segment_file(tmp_path / "slab", context), [bytes(payload) for payload in payloads]
    store.close()


def test_a_large_block_comes_back_whole_through_portions(large):
    store, _, payloads = large
    buffers = page_aligned(3, LARGE)
    assert store.read_into([2, 3, 5], KEYS, buffers) == [True] * 3
    assert [bytes(buffer) for buffer in buffers] == payloads
    assert store.read_into([3, 2], [KEYS[0], KEYS[1]], buffers[:2]) == [False, False], "another slot's block"


@pytest.mark.parametrize("at", [0, PORTION_BYTES - 1, PORTION_BYTES, LARGE - 1])
def test_a_flipped_bit_in_any_portion_is_a_miss(large, at):
    store, data, _ = large
    (byte,) = read_at(data, 3 * LARGE + at, 1)
    write_at(data, 3 * LARGE + at, bytes([byte ^ 4]))
    assert store.read_into([2, 3, 5], KEYS, page_aligned(3, LARGE)) == [True, False, True]
    assert store.read_into([3], [KEYS[1]], page_aligned(1, LARGE)) == [False]


def test_a_file_that_ends_in_the_middle_of_a_large_block(large):
    store, data, _ = large
    os.truncate(data, 5 * LARGE + PORTION_BYTES + 100)
    assert store.read_into([2, 3, 5], KEYS, page_aligned(3, LARGE)) == [True, True, False]


def failing_at(monkeypatch, name, bad_offset, code):
    """Make calls that touch `bad_offset` fail."""
    real = getattr(os, name)

    def call(descriptor, buffers, offset):
        if offset <= bad_offset < offset + sum(buffer.nbytes for buffer in buffers):
            raise OSError(code, os.strerror(code))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize(("code", "cause"), [(errno.EIO, FailureCause.IO_ERROR)])
def test_a_bad_sector_costs_its_own_block_only(tmp_path, monkeypatch, caplog, code, cause):
    context = make_context()
    store = open_slab(tmp_path / "slab", context)
    keys = [make_key(number) for number in range(8)]
    payloads = [memoryview(make_payload(number, BLOCK)) for number in range(8)]
    expected = [number != 3 for number in range(8)]
    with monkeypatch.context() as patch:
        failing_at(patch, "pwritev", 3 * BLOCK, code)
        assert store.write(range(8), keys, payloads) == expected
    assert context.failures.take() == {cause: 1}
    assert store.write(range(8), keys, payloads) == [True] * 8
    with monkeypatch.context() as patch:
        failing_at(patch, "preadv", 3 * BLOCK, code)
        buffers = [memoryview(bytearray(BLOCK)) for _ in range(8)]
        for _ in range(5):
            assert store.read_into(range(8), keys, buffers) == expected
    assert context.failures.take() == {cause: 5}
    assert len(caplog.records) == 1
    store.close()


def test_a_large_block_that_cannot_be_written_to_its_end_is_a_miss(large, calls, monkeypatch):
    store, _, payloads = large
    buffers = page_aligned(1, LARGE)
    buffers[0][:] = payloads[1]
    with monkeypatch.context() as patch:
        failing_at(patch, "pwritev", 3 * LARGE + 2 * PORTION_BYTES, errno.EIO)
        assert store.write([3], [KEYS[1]], buffers) == [False]
    assert calls == [("pwritev", 1)] * 2, "each portion is written by a call of its own"
    assert store.write([3], [KEYS[1]], buffers) == [True]
    assert store.read_into([2, 3, 5], KEYS, page_aligned(3, LARGE)) == [True] * 3


def test_without_direct_io_it_uses_the_page_cache_and_says_so_once(tmp_path, monkeypatch, caplog):
    real = os.open

    def no_direct(path, flags, *arguments, **options):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", no_direct)
    store = open_slab(tmp_path / "slab", make_context())
    buffers = page_aligned(4)
    keys = [make_key(number) for number in range(4)]
    assert store.direct
    for slot in range(4):
        assert all(store.write([slot], [keys[slot]], [buffers[slot]]))
        assert all(store.read_into([slot], [keys[slot]], [buffers[slot]]))
    assert not store.direct
    assert len(caplog.records) == 1
    store.close()


def test_unaligned_buffers_take_the_page_cache_and_do_not_end_direct_io(tmp_path):
    store = open_slab(tmp_path / "slab", make_context())
    keys = [make_key(number) for number in range(3)]
    crooked = memoryview(mmap.mmap(-1, 2 * BLOCK))[24 : 24 + BLOCK]
    crooked[:] = make_payload(1, BLOCK)
    straight = page_aligned(2)
    direct = store.direct
    assert store.write(range(3), keys, [straight[0], crooked, straight[1]]) == [True] * 3
    assert store.read_into(range(3), keys, [straight[1], crooked, straight[0]]) == [True] * 3
    assert bytes(crooked) == make_payload(1, BLOCK)
    assert store.direct == direct
    store.close()


def test_alignment_is_seen():
    (buffer,) = page_aligned(1)
    assert vectored.is_page_aligned(buffer)
    assert not vectored.is_page_aligned(buffer[512:])
