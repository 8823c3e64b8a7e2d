"""Workers for torch tensors.

CPU tensors are viewed as numpy arrays and get `NumpyOffloadingWorker`. CUDA tensors are copied on a separate stream,
and the arena's pages are registered with the CUDA driver.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvtier import forks
from kvtier.abc import OffloadingWorker
from kvtier.errors import CapacityError, ConfigError
from kvtier.primary.control_page import ControlPage
from kvtier.primary.copies import BlockLayout, CopyPlan, KVCaches
from kvtier.primary.worker import (
    NumpyOffloadingWorker,
    TransferBook,
    check_slot_bytes,
    plan_transfer,
    sequence_of,
)
from kvtier.types import GPULoadStoreSpec, LoadStoreSpec, TransferResult


def make_worker(
    view: memoryview,
    kv_caches: KVCaches,
    engine_blocks_per_block: int = 1,
    control: ControlPage | None = None,
    rank: int = 0,
) -> OffloadingWorker:
    """Return the worker for these tensors, all on one device; arguments and order as for `NumpyOffloadingWorker`.

    Args:
        view: the arena, shape (num_blocks, block_bytes).
        kv_caches: torch tensors of any dtype, shape (num_engine_blocks, ...). Each engine block must be contiguous; the
            worker views it as a row of int8, without a copy.

    Raises:
        ConfigError: the tensors are on several devices or on one without a worker, or their shapes do not fit.
        CapacityError: the CUDA driver refused to register the arena's pages.
    """
    tensors: Sequence[torch.Tensor] = kv_caches.tensors
    rows = [byte_rows(index, tensor) for index, tensor in enumerate(tensors)]
    kinds = {tensor.device.type for tensor in tensors}
    if kinds == {"cpu"}:
        arrays = KVCaches([row.numpy() for row in rows], kv_caches.group_data_refs)
        return NumpyOffloadingWorker(view, arrays, engine_blocks_per_block, control, rank)
    if kinds == {"cuda"} and len({tensor.device for tensor in tensors}) == 1:
        pages = KVCaches(rows, kv_caches.group_data_refs)
        return TorchOffloadingWorker(view, pages, engine_blocks_per_block, control, rank)
    raise ConfigError(
        "tensors", [str(tensor.device) for tensor in tensors], "all on the CPU, or all on one CUDA device"
    )


def byte_rows(index: int, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's engine blocks as int8 rows, shape (num_engine_blocks, bytes), without a copy.

    Raises:
        ConfigError: an engine block is not contiguous.
    """
    try:
        return tensor.detach().view(tensor.shape[0], -1).view(torch.int8)
    except (RuntimeError, IndexError):
        found = f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"
        raise ConfigError(f"tensors[{index}]", found, "an engine block's elements must be contiguous") from None


@dataclass
class _Transfer:
    """One transfer on the stream; the event `has_ended` completes after its last copy."""

    job_id: int
    sequence: int
    success: bool
    num_bytes: int
    started: float
    has_ended: torch.cuda.Event


class TorchOffloadingWorker(OffloadingWorker):
    """Copies between slots and CUDA tensors on one side stream, in the order of submission.

    The side stream first waits for the stream that is current at `submit_*`: so a store reads finished results, and a
    load overwrites nothing that is still read. `get_finished` polls one event per transfer.
    """

    def __init__(
        self,
        view: memoryview,
        kv_caches: KVCaches,
        engine_blocks_per_block: int = 1,
        control: ControlPage | None = None,
        rank: int = 0,
    ) -> None:
        """Register the arena's pages with the driver and create the stream; arguments as in `make_worker`."""
        self._layout = BlockLayout.of(kv_caches, engine_blocks_per_block)
        check_slot_bytes(self._layout, view)
        self._tensors = kv_caches.tensors
        self._arena = torch.from_numpy(np.asarray(view).view(np.int8))
        self._device = kv_caches.tensors[0].device
        self._book = TransferBook(control, rank)
        self._running: dict[int, _Transfer] = {}
        with torch.cuda.device(self._device):
            status = int(torch.cuda.cudart().cudaHostRegister(self._arena.data_ptr(), self._arena.nbytes, 0))
            if status:
                raise CapacityError(f"cudaHostRegister of {self._arena.nbytes} bytes failed with status {status}")
            self._stream = torch.cuda.Stream()
        self._left_to_parent = False
        forks.register(self)

    def leave_to_parent(self) -> None:
        """In a forked child, copy nothing and unregister nothing: CUDA does not work in a forked child."""
        self._left_to_parent = True
        self._running.clear()

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """Queue copies of engine blocks into slots, after all work already queued on the current stream."""
        self._submit(job_id, src_spec, dst_spec, to_slots=True)
        return True

    def submit_load(
        self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec, expedited: bool = False
    ) -> bool:
        """Queue copies of slots into engine blocks, after all work already queued on the current stream.

        An expedited load takes its turn, too: all copies share one stream.
        """
        self._submit(job_id, dst_spec, src_spec, to_slots=False)
        return True

    def get_finished(self) -> list[TransferResult]:
        """Return the transfers whose event has completed since the last call."""
        for transfer in list(self._running.values()):
            if not transfer.has_ended.query():
                break  # a CUDA stream runs in order: later transfers end later
            self._end(transfer)
        return self._book.take()

    def wait(self, job_ids: set[int]) -> None:
        """Block until the named transfers have ended; `get_finished` returns them."""
        for job_id in job_ids & self._running.keys():
            self._running[job_id].has_ended.synchronize()

    def shutdown(self) -> None:
        """Wait for the stream, then unregister the arena's pages; no call may follow."""
        if self._left_to_parent:
            return
        self._stream.synchronize()
        for transfer in list(self._running.values()):
            self._end(transfer)
        with torch.cuda.device(self._device):
            torch.cuda.cudart().cudaHostUnregister(self._arena.data_ptr())
        self._tensors, self._arena = (), torch.empty((0, 0), dtype=torch.int8)

    def _submit(self, job_id: int, gpu_spec: GPULoadStoreSpec, slots: LoadStoreSpec, *, to_slots: bool) -> None:
        sequence, started = sequence_of(slots), time.perf_counter()
        self._book.begin(sequence)
        try:
            if self._left_to_parent:
                raise ValueError("this is a forked child: the worker belongs to the parent process")
            plan = plan_transfer(self._layout, gpu_spec, slots, len(self._arena))
        except ValueError as error:
            self._book.report(job_id, error)
            self._book.end(TransferResult(job_id, success=False), sequence)
            return
        success, has_ended, current = True, torch.cuda.Event(), torch.cuda.current_stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            try:
                self._stream.wait_stream(current)
                copy_pages(self._layout, plan, self._arena, self._tensors, to_slots=to_slots)
            except RuntimeError as error:  # copies that were queued before the error still run: wait for their event
                self._book.report(job_id, error)
                success = False
            has_ended.record(self._stream)
        self._running[job_id] = _Transfer(job_id, sequence, success, plan.num_bytes, started, has_ended)

    def _end(self, transfer: _Transfer) -> None:
        del self._running[transfer.job_id]
        seconds = time.perf_counter() - transfer.started
        result = TransferResult(transfer.job_id, transfer.success, transfer.num_bytes, seconds)
        self._book.end(result, transfer.sequence)


def copy_pages(
    layout: BlockLayout, plan: CopyPlan, arena: torch.Tensor, tensors: Sequence[torch.Tensor], *, to_slots: bool
) -> None:
    """Queue a plan on the current stream, page by page: torch copies strided memory through an unpinned buffer.

    Args:
        arena: int8, shape (num_slots, slot_bytes), pinned if the tensors are on a device.
        tensors: int8, shape (num_engine_blocks, row_bytes) each.
    """
    factor = layout.engine_blocks_per_block
    for group_idx, runs in plan.groups:
        part_bytes = layout.engine_block_bytes(group_idx)
        for ref, offset in layout.page_offsets(group_idx):
            rows = tensors[ref.tensor_idx]
            for run in runs:
                for step in range(run.length):
                    slot, part = divmod(run.slot * factor + run.part + step, factor)
                    start = part * part_bytes + offset
                    page = arena[slot, start : start + ref.page_bytes]
                    row = rows[run.engine_block + step, : ref.page_bytes]
                    source, target = (row, page) if to_slots else (page, row)
                    target.copy_(source, non_blocking=True)
