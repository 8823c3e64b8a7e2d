"""Workers over torch tensors: on the CPU through numpy, on CUDA over streams of their own."""

from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch", reason="TORCH IS NOT INSTALLED: its workers were not checked")

from kvtier.adapters import cuda  # noqa: E402 - needs torch
from kvtier.adapters.torch import TorchOffloadingWorker, byte_rows, make_worker  # noqa: E402 - as above
from kvtier.errors import ConfigError  # noqa: E402 - as above
from kvtier.primary.arena import Arena, align_block_bytes  # noqa: E402 - as above
from kvtier.primary.copies import KVCaches  # noqa: E402 - as above
from kvtier.primary.worker import NumpyOffloadingWorker  # noqa: E402 - as above
from kvtier.types import CPULoadStoreSpec, GPULoadStoreSpec  # noqa: E402 - as above

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the CUDA worker was not checked")
SHAPE = (12, 2, 4, 16)  # engine blocks, keys and values, tokens, elements
PAGE = 2 * 4 * 16 * 2
REFS = [[(0, PAGE), (1, PAGE)], [(2, PAGE)]]


def make_tensors(device: str) -> list["torch.Tensor"]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(SHAPE, generator=generator).to(torch.bfloat16).to(device) for _ in range(3)]


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena.create(8, align_block_bytes(3 * 2 * PAGE)) as arena:
        yield arena


def round_trip(arena: Arena, device: str) -> None:
    """Store 7 and 4 engine blocks of the two groups, load them elsewhere, compare."""
    tensors = make_tensors(device)
    before = [tensor.clone() for tensor in tensors]
    worker = make_worker(arena.view, KVCaches(tensors, REFS), 3, arena.control, 0)
    source, target = [0, 1, 2, 5, 4, 3, 6, 1, 2, 3, 4], [11, 10, 9, 8, 7, 6, 5, 8, 9, 10, 11]
    slots = [3, 0, 5, 1, 7]
    assert worker.submit_store(1, GPULoadStoreSpec(source, [7, 4], [5, 3]), CPULoadStoreSpec(slots, 1))
    assert worker.submit_load(2, CPULoadStoreSpec(slots, 2), GPULoadStoreSpec(target, [7, 4], [5, 3]))
    assert worker.submit_load(3, CPULoadStoreSpec([99], 3), GPULoadStoreSpec([0], [1, 0]))
    worker.wait({1, 2})
    results = {result.job_id: result for result in worker.get_finished()}
    assert [results[job_id].success for job_id in (1, 2, 3)] == [True, True, False]
    assert results[1].transfer_size == (7 * 2 + 4) * PAGE
    for index, part in ((0, slice(0, 7)), (1, slice(0, 7)), (2, slice(7, 11))):
        assert torch.equal(tensors[index][target[part]], before[index][source[part]])
    assert arena.control.finished(1) == 3
    worker.shutdown()


def test_cpu_tensors_take_the_plain_worker(arena: Arena) -> None:
    assert isinstance(make_worker(arena.view, KVCaches(make_tensors("cpu")), 1), NumpyOffloadingWorker)
    round_trip(arena, "cpu")


def test_byte_rows_share_memory() -> None:
    tensor = make_tensors("cpu")[0]
    rows = byte_rows(0, tensor)
    assert (rows.dtype, tuple(rows.shape)) == (torch.int8, (12, PAGE))
    rows[3].zero_()
    assert not tensor[3].any()
    assert tensor[2].any()


def test_tensors_that_cannot_be_viewed_are_refused(arena: Arena) -> None:
    with pytest.raises(ConfigError, match=r"tensors\[1\]"):
        make_worker(arena.view, KVCaches([make_tensors("cpu")[0], torch.zeros(4, 6, 8).transpose(1, 2)]))
    with pytest.raises(ConfigError, match="CUDA"):
        make_worker(arena.view, KVCaches([torch.zeros((4, 8), device="meta")]))


@pytest.mark.gpu
@needs_cuda
def test_cuda_round_trip(arena: Arena) -> None:
    round_trip(arena, "cuda")


@pytest.mark.gpu
@needs_cuda
def test_cuda_round_trip_where_the_driver_copies_one_page_per_call(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = cuda.DriverCopies.find()
    monkeypatch.setattr(cuda.DriverCopies, "find", lambda: cuda.DriverCopies(None, found.single))
    round_trip(arena, "cuda")


@pytest.mark.gpu
@needs_cuda
def test_a_cuda_store_waits_for_the_current_stream(arena: Arena) -> None:
    tensors = make_tensors("cuda")
    worker = make_worker(arena.view, KVCaches(tensors, REFS), 3)
    assert isinstance(worker, TorchOffloadingWorker)
    torch.cuda._sleep(50_000_000)
    tensors[0].fill_(1.5)
    worker.submit_store(1, GPULoadStoreSpec([2], [1, 0]), CPULoadStoreSpec([4]))
    worker.wait({1})
    stored = torch.frombuffer(arena.row(4), dtype=torch.bfloat16, count=PAGE // 2)
    assert torch.equal(stored, torch.full_like(stored, 1.5))
    worker.shutdown()
