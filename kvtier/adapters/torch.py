"""Workers for torch tensors.

CPU tensors are viewed as numpy arrays and get `NumpyOffloadingWorker`. CUDA tensors are copied on streams of the
worker's own, with one call of the driver per transfer, and the arena's pages are registered with the driver.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvtier import forks
from kvtier.abc import OffloadingWorker
from kvtier.adapters.cuda import CopyDevice, CudaDevice, DeviceEvent
from kvtier.adapters.page_copies import Rows, TransferOrder, page_copies
from kvtier.errors import ConfigError
from kvtier.primary.control_page import ControlPage
from kvtier.primary.copies import BlockLayout, KVCaches
from kvtier.primary.worker import (
    NumpyOffloadingWorker,
    TransferBook,
    check_slot_bytes,
    plan_transfer,
    sequence_of,
)
from kvtier.types import GPULoadStoreSpec, LoadStoreSpec, TransferResult

STREAMS_PER_DIRECTION = 2
"""The second one begins a transfer while the first one ends another."""


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
        device = CudaDevice(tensors[0].device)
        return TorchOffloadingWorker(device, view, pages, engine_blocks_per_block, control, rank)
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
    """One transfer on its stream; the event `has_ended` completes after its last copy."""

    job_id: int
    number: int
    sequence: int
    stream: Any
    success: bool
    num_bytes: int
    started: float
    has_ended: DeviceEvent


class TorchOffloadingWorker(OffloadingWorker):
    """Copies between slots and tensors of a device, on two streams per direction.

    A transfer first waits for the stream that is current at `submit_*`: so a store reads finished results, and a load
    overwrites nothing that is still read. It also waits for earlier transfers of its slots or engine blocks. Otherwise
    transfers may overtake each other. `get_finished` polls one event per transfer.
    """

    def __init__(
        self,
        device: CopyDevice,
        view: memoryview,
        kv_caches: KVCaches,
        engine_blocks_per_block: int = 1,
        control: ControlPage | None = None,
        rank: int = 0,
    ) -> None:
        """Register the arena's pages with the device and create the streams.

        Args:
            device: where the tensors are.
            view: as for `NumpyOffloadingWorker`, like the arguments below.
            kv_caches: tensors of int8, 2-D, rows of any stride.

        Raises:
            ConfigError: a shape is wrong, or a block does not fit into a slot.
            CapacityError: the device refused the arena's pages.
        """
        self._layout = BlockLayout.of(kv_caches, engine_blocks_per_block)
        check_slot_bytes(self._layout, view)
        self._view = view  # the mapping lives as long as copies may run
        self._tensors = kv_caches.tensors
        arena = np.asarray(view)
        self._arena = Rows(arena.ctypes.data, arena.strides[0])
        self._rows = [Rows(tensor.data_ptr(), tensor.stride(0)) for tensor in kv_caches.tensors]
        self._order = TransferOrder(len(view), max(map(len, kv_caches.tensors)))
        self._book = TransferBook(control, rank)
        self._running: dict[int, _Transfer] = {}
        self._device = device
        # A share of an arena has gaps between its rows.
        device.register(self._arena.address, (len(view) - 1) * self._arena.stride + arena.shape[1])
        self._stores, self._loads = ([device.make_stream() for _ in range(STREAMS_PER_DIRECTION)] for _ in range(2))
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

        Any load takes the stream with the fewest transfers, so an expedited one has no road of its own.
        """
        self._submit(job_id, dst_spec, src_spec, to_slots=False)
        return True

    def get_finished(self) -> list[TransferResult]:
        """Return the transfers whose event has completed since the last call."""
        for transfer in list(self._running.values()):
            if transfer.has_ended.query():
                self._end(transfer)
        return self._book.take()

    def wait(self, job_ids: set[int]) -> None:
        """Block until the named transfers have ended; `get_finished` returns them."""
        for job_id in job_ids & self._running.keys():
            self._running[job_id].has_ended.synchronize()

    def shutdown(self) -> None:
        """Wait for all transfers, then unregister the arena's pages; no call may follow."""
        if self._left_to_parent:
            return
        for transfer in list(self._running.values()):
            transfer.has_ended.synchronize()
            self._end(transfer)
        self._device.unregister(self._arena.address)
        self._tensors, self._view = (), memoryview(b"")

    def _submit(self, job_id: int, gpu_spec: GPULoadStoreSpec, slots: LoadStoreSpec, *, to_slots: bool) -> None:
        sequence, started = sequence_of(slots), time.perf_counter()
        self._book.begin(sequence)
        try:
            if self._left_to_parent:
                raise ValueError("this is a forked child: the worker belongs to the parent process")
            plan = plan_transfer(self._layout, gpu_spec, slots, len(self._view))
        except ValueError as error:
            self._book.report(job_id, error)
            self._book.end(TransferResult(job_id, success=False), sequence)
            return
        copies = page_copies(self._layout, plan, self._rows, self._arena)
        number, earlier = self._order.enter(copies)
        events = [transfer.has_ended for transfer in self._running.values() if transfer.number in earlier]
        stream, success = self._idlest(self._stores if to_slots else self._loads), True
        try:
            self._device.wait(stream, events)
            if len(copies):
                # Slots hold what they hold, unless a store of an earlier transfer fills them first.
                self._device.copy(stream, copies, to_slots=to_slots, early=not to_slots and not events)
        except RuntimeError as error:  # copies that were queued before the error still run: wait for their event
            self._book.report(job_id, error)
            success = False
        self._running[job_id] = _Transfer(
            job_id, number, sequence, stream, success, plan.num_bytes, started, self._device.record(stream)
        )

    def _idlest(self, streams: Sequence[Any]) -> Any:
        """Return the stream with the fewest running transfers."""
        return min(streams, key=lambda stream: sum(running.stream is stream for running in self._running.values()))

    def _end(self, transfer: _Transfer) -> None:
        del self._running[transfer.job_id]
        seconds = time.perf_counter() - transfer.started
        result = TransferResult(transfer.job_id, transfer.success, transfer.num_bytes, seconds)
        self._book.end(result, transfer.sequence)
