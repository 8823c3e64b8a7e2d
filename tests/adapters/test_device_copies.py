"""The worker for devices, over a device of ordinary memory whose streams run in random order.

NO GPU IS NEEDED HERE, AND NONE IS CHECKED: that CUDA takes these calls, and their speed, only `make test-gpu` shows.
"""

import ctypes
import ctypes.util
import logging
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="TORCH IS NOT INSTALLED: its workers were not checked")

from fake_device import FakeDevice, some_pages  # noqa: E402 - needs torch
from hypothesis import given, settings  # noqa: E402 - as above
from hypothesis import strategies as st  # noqa: E402 - as above
from requirements import need_program  # noqa: E402 - as above

from kvtier.adapters.cuda import CopyAttributes, DriverCopies, page_range  # noqa: E402 - as above
from kvtier.adapters.page_copies import PageCopies, Rows, TransferOrder, page_copies  # noqa: E402 - as above
from kvtier.adapters.torch import TorchOffloadingWorker  # noqa: E402 - as above
from kvtier.errors import ConfigError  # noqa: E402 - as above
from kvtier.primary.copies import BlockLayout, KVCaches, plan_copies  # noqa: E402 - as above
from kvtier.primary.worker import NumpyOffloadingWorker  # noqa: E402 - as above
from kvtier.types import CPULoadStoreSpec, GPULoadStoreSpec  # noqa: E402 - as above

BLOCKS, SLOTS, SLOT_BYTES = 20, 12, 256
REFS = [[(0, 13), (1, 20)], [(2, 31)]]


def rows_of_bytes(random: np.random.Generator) -> list[np.ndarray]:
    """Three tensors whose rows are longer than their pages."""
    return [random.integers(-128, 127, (BLOCKS, page + 3), dtype=np.int8) for page in (13, 20, 31)]


class Pair:
    """The worker for devices, and the one that copies at once, over equal memory."""

    def __init__(self, seed: int, factor: int) -> None:
        self.random, self.factor = np.random.default_rng(seed), factor
        self.device = FakeDevice(np.random.default_rng(seed))
        tensors = rows_of_bytes(self.random)
        slots = self.random.integers(0, 255, (SLOTS, SLOT_BYTES + 8), dtype=np.uint8)
        self.memory = [(tensors, slots), ([tensor.copy() for tensor in tensors], slots.copy())]
        views = [memoryview(slots[:, :SLOT_BYTES]) for _, slots in self.memory]  # a share: with gaps between its rows
        caches = KVCaches([torch.from_numpy(tensor) for tensor in tensors], REFS)
        self.worker = TorchOffloadingWorker(self.device, views[0], caches, factor)
        self.plain = NumpyOffloadingWorker(views[1], KVCaches(self.memory[1][0], REFS), factor)
        self.jobs = 0

    def transfer(self, load: bool) -> int:
        """Let both copy random blocks."""
        sizes = self.random.integers(0, 6, 2).tolist()
        starts = self.random.integers(0, self.factor, 2).tolist()
        counts = [-(-(start + size) // self.factor) if size else 0 for start, size in zip(starts, sizes, strict=True)]
        blocks = np.concatenate([self.random.permutation(BLOCKS)[:size] for size in sizes])
        slots = self.random.permutation(SLOTS)[: sum(counts)]
        self.jobs += 1
        engine, host = GPULoadStoreSpec(blocks, sizes, starts), CPULoadStoreSpec(slots)
        for worker in (self.worker, self.plain):
            if load:
                worker.submit_load(self.jobs, host, engine)
            else:
                worker.submit_store(self.jobs, engine, host)
        return self.jobs

    def compute(self) -> None:
        """Let the model write a block: on the device in the current stream, after transfers of it have ended."""
        self.worker.wait(set(range(1, self.jobs + 1)))
        block, value = int(self.random.integers(BLOCKS)), int(self.random.integers(-128, 127))
        self.device.compute(write(self.memory[0][0], block, value))
        write(self.memory[1][0], block, value)()

    def assert_equal(self) -> None:
        self.device.run_all()
        for one, two in zip(*((*tensors, slots) for tensors, slots in self.memory), strict=True):
            assert np.array_equal(one, two)


def write(tensors: list[np.ndarray], block: int, value: int) -> Callable[[], None]:
    def run() -> None:
        for tensor in tensors:
            tensor[block] = value

    return run


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_in_every_order_that_events_allow_the_bytes_are_those_of_one_after_the_other(seed: int, factor: int) -> None:
    pair = Pair(seed, factor)
    for _ in range(12):
        match int(pair.random.integers(6)):
            case 0:
                pair.compute()
            case 1:
                for _ in range(int(pair.random.integers(9))):
                    if any(pair.device.streams.values()):
                        pair.device.run_some()
            case number:
                pair.transfer(load=number < 4)
    pair.worker.wait(set(range(1, pair.jobs + 1)))
    results = pair.worker.get_finished()
    assert sorted(result.job_id for result in results) == list(range(1, pair.jobs + 1))
    assert all(result.success for result in results)
    pair.assert_equal()


@pytest.fixture
def pair() -> Pair:
    return Pair(1, 1)


def store(pair: Pair, job_id: int, block: int, slot: int) -> None:
    pair.worker.submit_store(job_id, GPULoadStoreSpec([block], [1, 0]), CPULoadStoreSpec([slot]))


def load(pair: Pair, job_id: int, slot: int, block: int) -> None:
    pair.worker.submit_load(job_id, CPULoadStoreSpec([slot]), GPULoadStoreSpec([block], [1, 0]))


def test_a_transfer_is_one_call_and_directions_have_two_streams_each(pair: Pair) -> None:
    for number in range(3):
        store(pair, number, number, number)
        load(pair, 10 + number, 6 + number, 10 + number)
    copies = [call for call in pair.device.calls if call[0] == "copy"]
    streams = {to_slots: [call[1] for call in copies if call[3] is to_slots] for to_slots in (True, False)}
    assert len(copies) == 6
    assert all(call[2] == 2 for call in copies)  # the pages of the first group
    for used in streams.values():
        assert used[0] == used[2] != used[1]
    assert set(streams[True]).isdisjoint(streams[False])


def test_only_loads_that_wait_for_nobody_may_read_early(pair: Pair) -> None:
    store(pair, 1, block=2, slot=3)
    load(pair, 2, slot=3, block=4)  # what the store writes
    load(pair, 3, slot=5, block=6)
    waits = [call[2] for call in pair.device.calls if call[0] == "wait"]
    early = [call[4] for call in pair.device.calls if call[0] == "copy"]
    assert waits == [0, 1, 0]
    assert early == [False, False, True]


def test_a_transfer_may_end_before_an_earlier_one(pair: Pair) -> None:
    store(pair, 1, block=2, slot=3)
    load(pair, 2, slot=5, block=6)
    assert pair.worker.get_finished() == []
    pair.worker.wait({2})
    ended = [result.job_id for result in pair.worker.get_finished()]
    assert 2 in ended
    pair.worker.wait({1})
    ended += [result.job_id for result in pair.worker.get_finished()]
    assert sorted(ended) == [1, 2]


def test_refused_copies_fail_when_what_was_queued_has_ended(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    pair.device.refuses = True
    with caplog.at_level(logging.ERROR, logger="kvtier"):
        store(pair, 1, block=2, slot=3)
    assert "the copy of job 1 failed: refused" in caplog.text
    assert pair.worker.get_finished() == []
    pair.device.run_all()
    assert [(result.job_id, result.success) for result in pair.worker.get_finished()] == [(1, False)]


def test_the_whole_share_is_registered_until_all_copies_have_ended(pair: Pair) -> None:
    slots = pair.memory[0][1]
    assert pair.device.registered == {slots.ctypes.data: (SLOTS - 1) * (SLOT_BYTES + 8) + SLOT_BYTES}
    store(pair, 1, block=2, slot=3)
    pair.worker.shutdown()
    assert not pair.device.registered
    assert np.array_equal(slots[3, :13], pair.memory[0][0][0][2, :13].view(np.uint8))


def test_pages_have_the_addresses_that_the_layout_says() -> None:
    layout = BlockLayout(groups=BlockLayout.of(KVCaches(rows_of_bytes(np.random.default_rng(1)), REFS), 2).groups,
                         group_engine_blocks=(BLOCKS, BLOCKS), engine_blocks_per_block=2)  # fmt: skip
    plan = plan_copies(layout, GPULoadStoreSpec([4, 5, 9], [2, 1], [1, 0]), CPULoadStoreSpec([3, 7, 1]), SLOTS)
    copies = page_copies(layout, plan, [Rows(10_000, 16), Rows(20_000, 23), Rows(30_000, 34)], Rows(40_000, 300))
    found = set(zip(copies.device.tolist(), copies.host.tolist(), copies.sizes.tolist(), strict=True))
    assert found == {
        (10_000 + 4 * 16, 40_000 + 3 * 300 + 33, 13),
        (20_000 + 4 * 23, 40_000 + 3 * 300 + 33 + 13, 20),
        (10_000 + 5 * 16, 40_000 + 7 * 300, 13),
        (20_000 + 5 * 23, 40_000 + 7 * 300 + 13, 20),
        (30_000 + 9 * 34, 40_000 + 1 * 300, 31),
    }


def copies_of(slots: list[int], blocks: list[int]) -> PageCopies:
    none = np.empty(0, np.int64)
    return PageCopies(none, none, none, np.array(blocks, np.int64), np.array(slots, np.int64))


def test_a_place_waits_for_the_last_transfer_only() -> None:
    order = TransferOrder(8, 8)
    assert order.enter(copies_of([1], [1])) == (1, [])
    assert order.enter(copies_of([1], [2])) == (2, [1])
    assert order.enter(copies_of([1, 3], [3, 3])) == (3, [2])
    assert order.enter(copies_of([4], [1, 3])) == (4, [1, 3])
    assert order.enter(copies_of([], [])) == (5, [])


class FakeDriver:
    """C functions with the driver's arguments, as the machine calls them, which copy ordinary memory."""

    def __init__(self, refused: int | None = None) -> None:
        batch = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 3, ctypes.c_size_t, *[ctypes.c_void_p] * 2,
                                 ctypes.c_size_t, *[ctypes.c_void_p] * 2)  # fmt: skip
        single = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
        self._refused, self.calls = refused, []
        self._functions = (batch(self._batch), single(self._single))  # they live as long as their addresses are used
        self.batch, self.single = (ctypes.cast(function, ctypes.c_void_p).value for function in self._functions)

    def _batch(self, targets, sources, sizes, count, attributes, firsts, num_attributes, fail_index, stream):
        read = lambda address, index: ctypes.c_uint64.from_address(address + 8 * index).value  # noqa: E731
        found = CopyAttributes.from_address(attributes)
        locations = (found.source_location.type, found.target_location.type)
        self.calls.append((count, found.source_access_order, locations, found.flags, read(firsts, 0), stream))
        assert num_attributes == 1
        for index in range(count):
            if index == self._refused:
                ctypes.c_size_t.from_address(fail_index).value = index
                return 700
            ctypes.memmove(read(targets, index), read(sources, index), read(sizes, index))
        return 0

    def _single(self, target, source, size, stream):
        self.calls.append((size, stream))
        if len(self.calls) - 1 == self._refused:
            return 700
        ctypes.memmove(target, source, size)
        return 0


@pytest.mark.parametrize("in_one_call", [True, False])
def test_the_driver_is_called_with_its_own_arguments(in_one_call: bool) -> None:
    driver, (device, host, copies) = FakeDriver(), some_pages()
    calls = DriverCopies(driver.batch if in_one_call else None, driver.single)
    calls.queue(copies, 99, to_slots=True, early=False)
    for place, size in ((3, 5), (40, 20), (70, 11)):
        assert np.array_equal(host[place : place + size], device[place : place + size])
    assert np.count_nonzero(host) == 5 + 20 + 11
    device[:] = 0
    calls.queue(copies, 99, to_slots=False, early=True)
    assert np.array_equal(device, host)
    order_then_any = [(3, 1, (0, 0), 0, 0, 99), (3, 3, (0, 0), 0, 0, 99)]
    assert driver.calls == (order_then_any if in_one_call else [(5, 99), (20, 99), (11, 99)] * 2)


@pytest.mark.parametrize(("in_one_call", "words"), [(True, "error 700 at copy 1"), (False, "error 700")])
def test_a_copy_that_the_driver_refuses_is_an_error(in_one_call: bool, words: str) -> None:
    driver = FakeDriver(refused=1)
    _, _, copies = some_pages()
    with pytest.raises(RuntimeError, match=words):
        DriverCopies(driver.batch if in_one_call else None, driver.single).queue(copies, 0, to_slots=True, early=False)


DRIVER = """
#include <string.h>
#include <stddef.h>
typedef unsigned long long address;
int cuMemcpyAsync(address target, address source, size_t size, void *stream) {
  memcpy((void *)target, (void *)source, size);
  return 0;
}
static int batch(address *targets, address *sources, size_t *sizes, size_t count, void *attributes, size_t *firsts,
                 size_t num_attributes, size_t *fail_index, void *stream) {
  for (size_t i = 0; i < count; i++) memcpy((void *)targets[i], (void *)sources[i], sizes[i] / DIVISOR);
  return 0;
}
int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long long flags, int *status) {
  if (version != 12080 || flags || strcmp(name, "cuMemcpyBatchAsync")) return 500;
  *found = batch;
  return HAS_BATCH ? 0 : 500;
}
"""
USE = """
import sys
sys.path.insert(0, sys.argv[1])
from fake_device import some_pages
from kvtier.adapters.cuda import DriverCopies
device, host, copies = some_pages()
DriverCopies.find().queue(copies, 7, to_slots=True, early=False)
print(host.astype(bool).sum())
"""


@pytest.mark.parametrize(("has_batch", "copied"), [(1, 2 + 10 + 5), (0, 5 + 20 + 11)])
def test_calls_are_found_in_the_drivers_library(tmp_path: Path, has_batch: int, copied: int) -> None:
    """A library of that name and those symbols, whose batch copies half of each page, so that one sees who copied."""
    compiler = need_program("gcc", complete=False)
    (tmp_path / "driver.c").write_text(DRIVER)
    library = str(tmp_path / "libcuda.so.1")
    flags = ["-shared", "-fPIC", f"-DHAS_BATCH={has_batch}", "-DDIVISOR=2"]
    subprocess.run([compiler, *flags, str(tmp_path / "driver.c"), "-o", library], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    folder = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", USE, folder], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(copied), done.stderr


def test_a_machine_without_the_driver_is_refused_in_one_line() -> None:
    if ctypes.util.find_library("cuda"):
        pytest.skip("there is a CUDA driver: `make test-gpu` uses it")
    with pytest.raises(ConfigError, match=r"NVIDIA's driver.*libcuda"):
        DriverCopies.find()


def test_registered_memory_is_whole_pages() -> None:
    page = mmap.PAGESIZE
    assert page_range(5 * page, 2 * page) == (5 * page, 7 * page)
    assert page_range(5 * page + 100, 2 * page) == (5 * page, 8 * page)
