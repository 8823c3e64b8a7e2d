"""The worker for KV caches that numpy can view: arrays, and CPU tensors as arrays.

Also what all workers share: the planning of a transfer, and the tracking of transfers from start to end.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtier import forks
from kvtier.abc import OffloadingWorker
from kvtier.errors import ConfigError
from kvtier.log import logger
from kvtier.primary.control_page import ControlPage
from kvtier.primary.copies import BlockLayout, CopyPlan, KVCaches, plan_copies
from kvtier.types import (
    BlockIDsLoadStoreSpec,
    CPULoadStoreSpec,
    GPULoadStoreSpec,
    LoadStoreSpec,
    TransferResult,
)

ByteArray = NDArray[np.uint8]

GRACE_ROUNDS = 4
"""Steps after which a missing transfer counts as given up. An engine that defers stores by one step starts a transfer
at most two steps after one that was prepared later; this is twice that."""


class TransferBook:
    """Tracks the transfers of one worker from their start to their result, and publishes how far all have ended.

    The published number is the highest sequence up to which every transfer has ended. Engines may start transfers in
    another order than they were prepared in, so a transfer that has not started holds back all later ones. If it has
    not started `GRACE_ROUNDS` calls of `take` after a later one, the engine has given it up, and it no longer holds
    anything back. Transfers with sequence 0 have no number and are not published.
    """

    def __init__(self, control: ControlPage | None, rank: int) -> None:
        self._control = control
        self._rank = rank
        self._running: set[int] = set()
        self._ended: set[int] = set()
        self._published = 0
        self._highest = 0
        self._highest_by_round: deque[int] = deque(maxlen=GRACE_ROUNDS)
        self._results: list[TransferResult] = []
        self._has_failed = False

    def begin(self, sequence: int) -> None:
        """Record that the transfer `sequence` starts; 0 for a transfer without a number."""
        if sequence:
            self._running.add(sequence)
            self._highest = max(self._highest, sequence)

    def end(self, result: TransferResult, sequence: int) -> None:
        """Record a result, and publish. Caller guarantees: the transfer reads and writes no byte any more."""
        self._results.append(result)
        if sequence:
            self._running.discard(sequence)
            self._ended.add(sequence)
            self._publish(given_up=0)

    def report(self, job_id: int, error: Exception) -> None:
        """Log a failed copy: the first one as an error, later ones at debug level."""
        level = logging.DEBUG if self._has_failed else logging.ERROR
        logger.log(level, "the copy of job %d failed: %s", job_id, error)
        self._has_failed = True

    def take(self) -> list[TransferResult]:
        """Return the results since the last call. Engines call this once per step, so the calls count steps."""
        if len(self._highest_by_round) == GRACE_ROUNDS and self._published < self._highest_by_round[0]:
            self._publish(given_up=self._highest_by_round[0])
        self._highest_by_round.append(self._highest)
        results, self._results = self._results, []
        return results

    def _publish(self, given_up: int) -> None:
        """Publish how far all transfers have ended. Transfers up to `given_up` that have not started count as ended."""
        upto = self._published
        while upto + 1 in self._ended or (upto < given_up and upto + 1 not in self._running):
            upto += 1
            self._ended.discard(upto)
        if upto > self._published:
            self._published = upto
            if self._control is not None:
                self._control.publish(self._rank, upto)


def plan_transfer(layout: BlockLayout, gpu_spec: GPULoadStoreSpec, slots: LoadStoreSpec, num_slots: int) -> CopyPlan:
    """Plan one transfer.

    Raises:
        ValueError: the specs have the wrong types, or do not fit (`plan_copies`).
    """
    if not isinstance(gpu_spec, GPULoadStoreSpec) or not isinstance(slots, BlockIDsLoadStoreSpec):
        raise ValueError(f"a GPULoadStoreSpec and a CPULoadStoreSpec are wanted, not {gpu_spec!r} and {slots!r}")
    return plan_copies(layout, gpu_spec, slots, num_slots)


def sequence_of(spec: LoadStoreSpec) -> int:
    """Return the number of the transfer; 0 if it has none."""
    return spec.sequence if isinstance(spec, CPULoadStoreSpec) else 0


def check_slot_bytes(layout: BlockLayout, view: memoryview) -> None:
    """Check that a block fits into a slot.

    Raises:
        ConfigError: it does not, or `view` does not have the shape (num_blocks, block_bytes) and items of one byte.
    """
    shape = view.shape or ()
    if len(shape) != 2 or view.itemsize != 1:
        raise ConfigError("arena view", shape, "a view of bytes, shape (num_blocks, block_bytes)")
    if layout.block_bytes > shape[1]:
        raise ConfigError("block_bytes", shape[1], f"at least {layout.block_bytes}, the largest group's block")


class NumpyOffloadingWorker(OffloadingWorker):
    """Copies between slots and numpy byte arrays during `submit_*`, on the caller's thread.

    A transfer that cannot be planned copies nothing. It is logged, and its result says that it failed.
    """

    def __init__(
        self,
        view: memoryview,
        kv_caches: KVCaches,
        engine_blocks_per_block: int = 1,
        control: ControlPage | None = None,
        rank: int = 0,
    ) -> None:
        """Make the views; copy nothing.

        Args:
            view: the arena, shape (num_blocks, block_bytes).
            kv_caches: numpy arrays of dtype int8 or uint8, rows of any stride; kept, and written by loads.
            control: where the ends of transfers are published under `rank`; None to publish nothing.

        Raises:
            ConfigError: a shape or dtype is wrong, or a block does not fit into a slot.
        """
        self._layout = BlockLayout.of(kv_caches, engine_blocks_per_block)
        check_slot_bytes(self._layout, view)
        self._num_slots = len(view)
        self._book = TransferBook(control, rank)
        forks.register(self)
        self._pages = _page_views(self._layout, np.asarray(view).view(np.uint8), kv_caches)

    def leave_to_parent(self) -> None:
        """In a forked child, let every transfer fail: its slots belong to the parent."""
        self._pages = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """Copy engine blocks into slots; the copy has ended when this returns."""
        self._transfer(job_id, src_spec, dst_spec, to_slots=True)
        return True

    def submit_load(
        self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec, expedited: bool = False
    ) -> bool:
        """Copy slots into engine blocks; the copy has ended when this returns, so an expedited one never queues."""
        self._transfer(job_id, dst_spec, src_spec, to_slots=False)
        return True

    def get_finished(self) -> list[TransferResult]:
        """Return the results since the last call."""
        return self._book.take()

    def wait(self, job_ids: set[int]) -> None:
        """Do nothing: every submitted transfer has ended already."""

    def shutdown(self) -> None:
        """Drop the references to arena and tensors; later transfers fail."""
        self._pages = []

    def _transfer(self, job_id: int, gpu_spec: GPULoadStoreSpec, slots: LoadStoreSpec, *, to_slots: bool) -> None:
        sequence, started = sequence_of(slots), time.perf_counter()
        self._book.begin(sequence)
        try:
            if not self._pages:
                raise ValueError("the worker was shut down, or is the parent process's")
            plan = plan_transfer(self._layout, gpu_spec, slots, self._num_slots)
            self._copy(plan, to_slots)
        except (ValueError, IndexError) as error:  # what was begun must end, or nothing behind it would be published
            self._book.report(job_id, error)
            self._book.end(TransferResult(job_id, success=False), sequence)
            return
        result = TransferResult(job_id, True, plan.num_bytes, time.perf_counter() - started)
        self._book.end(result, sequence)

    def _copy(self, plan: CopyPlan, to_slots: bool) -> None:
        """Apply a plan, with views made beforehand: to make the views of a layer costs more than to copy a row."""
        for group_idx, runs in plan.groups:
            for pages, rows in self._pages[group_idx]:
                if self._layout.engine_blocks_per_block == 1:
                    for block, slot, _, length in runs:
                        if to_slots:
                            pages[slot : slot + length, 0] = rows[block : block + length]
                        else:
                            rows[block : block + length] = pages[slot : slot + length, 0]
                else:
                    for block, slot, part, length in runs:
                        if to_slots:
                            pages[slot, part : part + length] = rows[block : block + length]
                        else:
                            rows[block : block + length] = pages[slot, part : part + length]


def _page_views(layout: BlockLayout, arena: ByteArray, kv_caches: KVCaches) -> list[list[tuple[ByteArray, ByteArray]]]:
    """Return two views per group and layer, of which one copies pages by plain assignment.

    The first is of the slots, shape (num_slots, parts, page_bytes); the second of the engine blocks, shape
    (num_engine_blocks, page_bytes).
    """
    tensors = [_byte_rows(index, tensor) for index, tensor in enumerate(kv_caches.tensors)]
    factor, views = layout.engine_blocks_per_block, []
    for group_idx in range(len(layout.groups)):
        part_bytes = layout.engine_block_bytes(group_idx)
        # To split an axis copies nothing: numpy returns a view, so assignments reach the arena.
        parts = arena[:, : factor * part_bytes].reshape(len(arena), factor, part_bytes)
        views.append(
            [
                (parts[:, :, offset : offset + ref.page_bytes], tensors[ref.tensor_idx][:, : ref.page_bytes])
                for ref, offset in layout.page_offsets(group_idx)
            ]
        )
    return views


def _byte_rows(index: int, tensor: Any) -> ByteArray:
    if not isinstance(tensor, np.ndarray) or tensor.dtype not in (np.int8, np.uint8):
        kind = getattr(tensor, "dtype", type(tensor).__name__)
        raise ConfigError(f"tensors[{index}].dtype", str(kind), "a numpy array of int8 or uint8")
    return tensor.view(np.uint8)
