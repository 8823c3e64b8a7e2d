"""Copies between slots and arrays: plans, round trips over random layouts, and failures that move nothing."""

import logging
import mmap
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.errors import ConfigError
from kvtier.primary.arena import Arena
from kvtier.primary.control_page import ControlPage
from kvtier.primary.copies import BlockLayout, GroupCopies, KVCaches, Run, plan_copies
from kvtier.primary.worker import GRACE_ROUNDS, NumpyOffloadingWorker, TransferBook
from kvtier.types import CPULoadStoreSpec, GPULoadStoreSpec, LoadStoreSpec, TransferResult


@dataclass
class Case:
    """A layout and one transfer over it."""

    kv_caches: KVCaches
    factor: int
    gpu_spec: GPULoadStoreSpec
    cpu_spec: CPULoadStoreSpec
    num_slots: int
    slot_bytes: int


def make_caches(random: np.random.Generator, num_blocks: int, pages: list[list[int]]) -> KVCaches:
    """One tensor a layer, rows 3 bytes longer than their page."""
    flat = [page for group in pages for page in group]
    tensors = [random.integers(-128, 127, (num_blocks, page + 3), dtype=np.int8) for page in flat]
    indices = iter(range(len(flat)))
    return KVCaches(tensors, [[(next(indices), page) for page in group] for group in pages])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pages = draw(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=3))
    factor, num_blocks = draw(st.integers(1, 4)), 24
    caches = make_caches(random, num_blocks, pages)
    sizes = [draw(st.integers(0, 9)) for _ in pages]
    starts = [draw(st.integers(0, 11)) for _ in pages]
    counts = [-(-(start % factor + size) // factor) if size else 0 for start, size in zip(starts, sizes, strict=True)]
    ordered = draw(st.booleans())  # neighbours on both sides, so that runs are joined
    blocks = [np.sort(b) if ordered else b for b in (random.permutation(num_blocks)[:size] for size in sizes)]
    slots = random.permutation(40)[: sum(counts)]
    slot_bytes = BlockLayout.of(caches, factor).block_bytes + draw(st.integers(0, 5))
    return Case(
        caches,
        factor,
        GPULoadStoreSpec(np.concatenate(blocks), sizes, starts),
        CPULoadStoreSpec(np.sort(slots) if ordered else slots),
        40,
        slot_bytes,
    )


def expected_slots(case: Case, before: np.ndarray) -> np.ndarray:
    """The arena after a store, computed byte range by byte range."""
    after, blocks, slots = before.copy(), iter(case.gpu_spec.block_ids), iter(case.cpu_spec.block_ids)
    groups = zip(case.kv_caches.group_data_refs, case.gpu_spec.group_sizes, case.gpu_spec.block_indices, strict=True)
    for refs, size, start in groups:
        part_bytes, slot = sum(page for _, page in refs), -1
        for position in range(start % case.factor, start % case.factor + size):
            if slot < 0 or position % case.factor == 0:
                slot = next(slots)
            block, offset = next(blocks), position % case.factor * part_bytes
            for tensor_idx, page in refs:
                after[slot, offset : offset + page] = case.kv_caches.tensors[tensor_idx][block, :page].view(np.uint8)
                offset += page
    return after


@settings(max_examples=200)
@given(cases())
def test_stored_bytes_have_the_documented_layout_and_load_again(case: Case) -> None:
    arena = np.full((case.num_slots, case.slot_bytes), 99, dtype=np.uint8)
    worker = NumpyOffloadingWorker(memoryview(arena), case.kv_caches, case.factor)
    expected = expected_slots(case, arena)
    assert worker.submit_store(1, case.gpu_spec, case.cpu_spec)
    assert (arena == expected).all()

    originals = [tensor.copy() for tensor in case.kv_caches.tensors]
    for (refs, size), first in zip(
        zip(case.kv_caches.group_data_refs, case.gpu_spec.group_sizes, strict=True),
        np.cumsum((0, *case.gpu_spec.group_sizes[:-1])),
        strict=True,
    ):
        for tensor_idx, page in refs:
            case.kv_caches.tensors[tensor_idx][case.gpu_spec.block_ids[first : first + size], :page] = 0
    assert worker.submit_load(2, case.cpu_spec, case.gpu_spec)
    assert all((a == b).all() for a, b in zip(originals, case.kv_caches.tensors, strict=True))
    results = worker.get_finished()
    assert [(result.job_id, result.success) for result in results] == [(1, True), (2, True)]
    assert results[0].transfer_size == results[1].transfer_size
    assert worker.get_finished() == []


def small_caches(blocks: int = 8) -> KVCaches:
    return make_caches(np.random.default_rng(0), blocks, [[16, 16], [8]])


def test_neighbours_are_joined() -> None:
    layout = BlockLayout.of(small_caches(), 1)
    plan = plan_copies(layout, GPULoadStoreSpec([2, 3, 4, 6], [4, 0]), CPULoadStoreSpec([5, 6, 7, 8]), 10)
    assert plan.groups == [GroupCopies(0, [Run(2, 5, 0, 3), Run(6, 8, 0, 1)])]
    assert plan.num_bytes == 4 * 32


def test_an_unaligned_head_and_a_partial_tail() -> None:
    layout = BlockLayout.of(small_caches(), 3)
    spec = GPULoadStoreSpec([0, 1, 2, 7, 3], [5, 0], [8, 0])
    plan = plan_copies(layout, spec, CPULoadStoreSpec([4, 1, 0]), 10)
    assert plan.groups == [GroupCopies(0, [Run(0, 4, 2, 1), Run(1, 1, 0, 2), Run(7, 1, 2, 1), Run(3, 0, 0, 1)])]


BAD_TRANSFERS = [
    (GPULoadStoreSpec([0, 1], [2, 0]), CPULoadStoreSpec([0]), "slots"),
    (GPULoadStoreSpec([0], [1, 0]), CPULoadStoreSpec([0, 1]), "slots"),
    (GPULoadStoreSpec([0, 8], [1, 1]), CPULoadStoreSpec([0, 1]), "engine block of group 1"),
    (GPULoadStoreSpec([0, -1], [2, 0]), CPULoadStoreSpec([0, 1]), "engine block of group 0"),
    (GPULoadStoreSpec([0, 1], [1, 1]), CPULoadStoreSpec([0, 4]), "slot 4"),
    (GPULoadStoreSpec([0, 1], [1, 1]), CPULoadStoreSpec([-1, 0]), "slot -1"),
    (GPULoadStoreSpec([0, 1]), CPULoadStoreSpec([0, 1]), "2 KV groups wanted"),
    (GPULoadStoreSpec([0], [1, 0]), LoadStoreSpec(), "CPULoadStoreSpec"),
]


@pytest.mark.parametrize(("gpu_spec", "slots", "words"), BAD_TRANSFERS)
def test_a_bad_transfer_fails_and_moves_nothing(
    gpu_spec: GPULoadStoreSpec, slots: LoadStoreSpec, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    arena, caches = np.zeros((4, 64), dtype=np.uint8), small_caches()
    before = [tensor.copy() for tensor in caches.tensors]
    worker = NumpyOffloadingWorker(memoryview(arena), caches)
    with caplog.at_level(logging.INFO):
        assert worker.submit_store(1, gpu_spec, slots)
        assert worker.submit_load(2, slots, gpu_spec)
    assert worker.get_finished() == [TransferResult(1, success=False), TransferResult(2, success=False)]
    assert not arena.any()
    assert all((a == b).all() for a, b in zip(before, caches.tensors, strict=True))
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert words in caplog.text


@pytest.mark.parametrize(
    ("caches", "factor", "slot_bytes"),
    [
        (KVCaches([], []), 1, 64),
        (KVCaches([np.zeros((4, 8), np.int8)], [[]]), 1, 64),
        (KVCaches([np.zeros((4, 8), np.int8)], [[(1, 8)]]), 1, 64),
        (KVCaches([np.zeros((4, 8), np.int8)], [[(0, 9)]]), 1, 64),
        (KVCaches([np.zeros((4, 8), np.float32)], [[(0, 8)]]), 1, 64),
        (KVCaches([np.zeros((4, 2, 4), np.int8)], [[(0, 4)]]), 1, 64),
        (KVCaches([np.zeros((4, 8), np.int8)], [[(0, 8)]]), 0, 64),
        (KVCaches([np.zeros((4, 8), np.int8)], [[(0, 8)]]), 9, 64),
    ],
)
def test_caches_that_do_not_fit_are_refused(caches: KVCaches, factor: int, slot_bytes: int) -> None:
    with pytest.raises(ConfigError):
        NumpyOffloadingWorker(memoryview(np.zeros((4, slot_bytes), np.uint8)), caches, factor)


def test_without_groups_all_tensors_are_one() -> None:
    tensors = small_caches().tensors
    arena = np.zeros((4, 60), dtype=np.uint8)
    worker = NumpyOffloadingWorker(memoryview(arena), KVCaches(tensors))
    worker.submit_store(1, GPULoadStoreSpec([6]), CPULoadStoreSpec([2]))
    assert arena[2, : 19 + 19 + 11].tobytes() == b"".join(tensor[6].tobytes() for tensor in tensors)


def test_rows_of_any_stride() -> None:
    whole = np.arange(6 * 64, dtype=np.int8).reshape(6, 64)
    caches = KVCaches([whole[:, 8:24]], [[(0, 16)]])
    arena = np.zeros((4, 16), dtype=np.uint8)
    worker = NumpyOffloadingWorker(memoryview(arena), caches)
    worker.submit_store(1, GPULoadStoreSpec([5]), CPULoadStoreSpec([2]))
    assert (arena[2].view(np.int8) == whole[5, 8:24]).all()


def test_ends_are_published_in_the_arena() -> None:
    with Arena.create(4, mmap.PAGESIZE) as arena:
        worker = NumpyOffloadingWorker(arena.view, small_caches(), control=arena.control, rank=2)
        arena.control.publish(0, 100)
        arena.control.publish(1, 100)
        for sequence, block in ((1, 0), (2, 99), (0, 1)):  # the second fails, the third has no number
            worker.submit_store(1, GPULoadStoreSpec([block], [1, 0]), CPULoadStoreSpec([1], sequence))
        assert arena.control.finished(3) == 2
        assert bytes(arena.row(1)[:16]) == small_caches().tensors[0][1, :16].tobytes()
        worker.shutdown()
        worker.submit_load(9, CPULoadStoreSpec([1]), GPULoadStoreSpec([0], [1, 0]))
        assert not worker.get_finished()[-1].success
    with pytest.raises(ValueError):
        _ = arena.view[0, 0]


def ends(book, control, *sequences):
    for sequence in sequences:
        book.begin(sequence)
        book.end(TransferResult(sequence, success=True), sequence)
    return control.finished(1)


def test_a_sequence_is_published_only_with_all_before_it() -> None:
    control = ControlPage(memoryview(bytearray(4096)))
    book, published = TransferBook(control, 0), []
    for sequence in (1, 2, 3, 4):
        book.begin(sequence)
    for sequence in (3, 1, 4, 2):
        book.end(TransferResult(sequence, success=True), sequence)
        published.append(control.finished(1))
    assert published == [0, 1, 1, 4]
    assert [result.job_id for result in book.take()] == [3, 1, 4, 2]


def test_a_transfer_that_has_not_come_yet_holds_back_later_ones() -> None:
    control = ControlPage(memoryview(bytearray(4096)))
    book = TransferBook(control, 0)
    assert ends(book, control, 2, 3) == 0
    book.take()
    book.take()
    assert control.finished(1) == 0
    assert ends(book, control, 1) == 3


def test_a_transfer_that_never_comes_holds_back_others_for_a_few_rounds_only() -> None:
    control = ControlPage(memoryview(bytearray(4096)))
    book = TransferBook(control, 0)
    book.begin(2)
    ends(book, control, 4)
    for _ in range(GRACE_ROUNDS + 1):
        assert control.finished(1) == 0
        book.take()
    assert control.finished(1) == 1  # 1 is given up, 2 still runs
    book.end(TransferResult(2, success=True), 2)
    book.take()
    assert control.finished(1) == 4
