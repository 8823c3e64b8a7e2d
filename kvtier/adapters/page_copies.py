"""The copies of a transfer as a driver takes them, addresses and sizes, and which transfers must wait for which.

Pure: nothing is copied here, and no device is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtier.primary.copies import BlockLayout, CopyPlan

Numbers = NDArray[np.int64]
"""Numbers, sizes or addresses: no program has addresses above 2**63, and drivers read the same 8 bytes."""


class Rows(NamedTuple):
    """Where rows lie in memory: the first one's address, and the bytes from each to the next."""

    address: int
    stride: int


_NONE: Numbers = np.empty(0, np.int64)


@dataclass(frozen=True)
class PageCopies:
    """All pages of one transfer.

    Attributes:
        device, host: the pages' addresses, shape (num_pages,).
        sizes: the pages' bytes, shape (num_pages,).
        engine_blocks, slots: what the pages belong to, in any order; some more than once.
    """

    device: Numbers
    host: Numbers
    sizes: Numbers
    engine_blocks: Numbers
    slots: Numbers

    def __len__(self) -> int:
        return len(self.sizes)


def page_copies(layout: BlockLayout, plan: CopyPlan, tensors: Sequence[Rows], arena: Rows) -> PageCopies:
    """Return the pages that a plan copies.

    Args:
        tensors: the rows of each tensor of the layout, in its order.
        arena: the rows are slots.
    """
    factor = layout.engine_blocks_per_block
    device, host, sizes, all_blocks, all_slots = [_NONE], [_NONE], [_NONE], [_NONE], [_NONE]
    for group_idx, runs in plan.groups:
        block, slot, part, length = np.array(runs, np.int64).T
        steps = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        blocks = np.repeat(block, length) + steps
        slots, parts = np.divmod(np.repeat(slot * factor + part, length) + steps, factor)
        all_blocks.append(blocks)
        all_slots.append(slots)
        starts = arena.address + slots * arena.stride + parts * layout.engine_block_bytes(group_idx)
        for ref, offset in layout.page_offsets(group_idx):
            rows = tensors[ref.tensor_idx]
            device.append(rows.address + blocks * rows.stride)
            host.append(starts + offset)
            sizes.append(np.full(len(blocks), ref.page_bytes))
    return PageCopies(*(np.concatenate(column) for column in (device, host, sizes, all_blocks, all_slots)))


class TransferOrder:
    """Finds the earlier transfers with which a transfer shares a slot or an engine block.

    Transfers run on several streams, in any order. One that shares a place with an earlier one must wait for it.
    Only the last transfer of each place is kept: that one has waited for those before it.
    """

    def __init__(self, num_slots: int, num_engine_blocks: int) -> None:
        self._number = 0
        self._last_of_slot = np.zeros(num_slots, np.int64)
        self._last_of_block = np.zeros(num_engine_blocks, np.int64)

    def enter(self, copies: PageCopies) -> tuple[int, list[int]]:
        """Return the number of a new transfer, and the numbers of those that it must wait for."""
        self._number += 1
        last = np.concatenate((self._last_of_slot[copies.slots], self._last_of_block[copies.engine_blocks]))
        self._last_of_slot[copies.slots] = self._number
        self._last_of_block[copies.engine_blocks] = self._number
        return self._number, [number for number in np.unique(last).tolist() if number]
