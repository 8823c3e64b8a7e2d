"""Plans copies between the device and slots: which page of which tensor lies where in which slot. Copies nothing.

An offloaded block consists of one or more engine blocks. For each of them it holds the pages of all layers of its KV
group, in the group's order. Groups differ in layers and page sizes, so a block may leave the end of its slot unused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kvtier.errors import ConfigError
from kvtier.types import BlockIds, BlockIDsLoadStoreSpec, GPULoadStoreSpec


class PageRef(NamedTuple):
    """One layer of a KV group: the tensor that holds its pages, and how many bytes of a row belong to the page."""

    tensor_idx: int
    page_bytes: int


@dataclass(frozen=True)
class KVCaches:
    """The engine's KV caches, as bytes.

    Attributes:
        tensors: 2-D, shape (num_engine_blocks, row_bytes), items of one byte; row b holds the page of engine block b.
        group_data_refs: per KV group its layers, as (tensor_idx, page_bytes); a page is at the start of its row.
            None means one group of all tensors, with pages as long as rows.
    """

    tensors: Sequence[Any]
    group_data_refs: Sequence[Sequence[tuple[int, int]]] | None = None

    def groups(self) -> tuple[tuple[PageRef, ...], ...]:
        """Return the layers of every group; without `group_data_refs`, the one group of all tensors."""
        if self.group_data_refs is None:
            return (tuple(PageRef(index, int(tensor.shape[1])) for index, tensor in enumerate(self.tensors)),)
        return tuple(tuple(PageRef(*ref) for ref in refs) for refs in self.group_data_refs)


class Run(NamedTuple):
    """`length` engine blocks that are adjacent on the device and in the slots, for all layers of the group.

    With one engine block per block they fill the slots from `slot` on. With several per block they fill parts of
    `slot`, from `part` on.
    """

    engine_block: int
    slot: int
    part: int
    length: int


class GroupCopies(NamedTuple):
    """The copies of one KV group; each run applies to every layer."""

    group_idx: int
    runs: list[Run]


@dataclass(frozen=True)
class CopyPlan:
    """All copies of one transfer. Every index in it has been checked, so applying it cannot fail half way."""

    groups: list[GroupCopies]
    num_bytes: int


@dataclass(frozen=True)
class BlockLayout:
    """Where pages lie in a block.

    Attributes:
        groups: per KV group its layers.
        group_engine_blocks: per KV group, the number of engine blocks in its shortest tensor.
        engine_blocks_per_block: engine blocks in one block, the same for every group.
    """

    groups: tuple[tuple[PageRef, ...], ...]
    group_engine_blocks: tuple[int, ...]
    engine_blocks_per_block: int

    @classmethod
    def of(cls, kv_caches: KVCaches, engine_blocks_per_block: int) -> BlockLayout:
        """Return the layout for these tensors.

        Raises:
            ConfigError: `engine_blocks_per_block` is below 1, there is no group, a group has no layer, a tensor is not
                2-D, or a page is outside its tensor.
        """
        if engine_blocks_per_block < 1:
            raise ConfigError("engine_blocks_per_block", engine_blocks_per_block, "at least 1")
        for index, tensor in enumerate(kv_caches.tensors):
            if len(tensor.shape) != 2:
                raise ConfigError(f"tensors[{index}].shape", tuple(tensor.shape), "(num_engine_blocks, row_bytes)")
        groups = kv_caches.groups()
        if not groups or not all(groups):
            raise ConfigError("group_data_refs", groups, "at least one group, each with at least one layer")
        for ref in (ref for refs in groups for ref in refs):
            if not 0 <= ref.tensor_idx < len(kv_caches.tensors):
                raise ConfigError("tensor_idx", ref.tensor_idx, f"0 to {len(kv_caches.tensors) - 1}")
            row_bytes = int(kv_caches.tensors[ref.tensor_idx].shape[1])
            if not 0 < ref.page_bytes <= row_bytes:
                raise ConfigError("page_bytes", ref.page_bytes, f"1 to the tensor's {row_bytes} bytes per row")
        lengths = [min(int(kv_caches.tensors[ref.tensor_idx].shape[0]) for ref in refs) for refs in groups]
        return cls(groups, tuple(lengths), engine_blocks_per_block)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of the largest group; a slot must have at least as many."""
        return self.engine_blocks_per_block * max(map(self.engine_block_bytes, range(len(self.groups))))

    def engine_block_bytes(self, group_idx: int) -> int:
        """Return the bytes of one engine block: the group's pages, one after the other."""
        return sum(ref.page_bytes for ref in self.groups[group_idx])

    def page_offsets(self, group_idx: int) -> Iterator[tuple[PageRef, int]]:
        """Yield the group's layers, each with the offset in bytes of its page inside an engine block."""
        offset = 0
        for ref in self.groups[group_idx]:
            yield ref, offset
            offset += ref.page_bytes


def plan_copies(
    layout: BlockLayout, gpu_spec: GPULoadStoreSpec, cpu_spec: BlockIDsLoadStoreSpec, num_slots: int
) -> CopyPlan:
    """Match engine blocks with their places in the slots; copy nothing.

    The first engine block of group g lies `block_indices[g] % engine_blocks_per_block` parts into the group's first
    slot. The last one may leave the end of the last slot untouched. Both specs list their blocks in group order.

    Args:
        num_slots: number of slots of the arena.

    Raises:
        ValueError: the specs do not fit each other or the layout; the message names what does not match.
    """
    if len(gpu_spec.group_sizes) != len(layout.groups):
        raise ValueError(f"group_sizes={gpu_spec.group_sizes}: {len(layout.groups)} KV groups wanted")
    factor = layout.engine_blocks_per_block
    skips = [index % factor for index in gpu_spec.block_indices]
    slot_counts = [
        -(-(skip + size) // factor) if size else 0 for skip, size in zip(skips, gpu_spec.group_sizes, strict=True)
    ]
    if sum(slot_counts) != len(cpu_spec.block_ids):
        raise ValueError(
            f"{len(cpu_spec.block_ids)} slots for {gpu_spec.group_sizes} engine blocks, which start at"
            f" {gpu_spec.block_indices}, {factor} a block: {sum(slot_counts)} wanted"
        )
    _check_range("slot", cpu_spec.block_ids, num_slots)
    groups, num_bytes, first_block, first_slot = [], 0, 0, 0
    for group_idx, (size, num_group_slots) in enumerate(zip(gpu_spec.group_sizes, slot_counts, strict=True)):
        if not size:
            continue
        engine_blocks = gpu_spec.block_ids[first_block : first_block + size]
        _check_range(f"engine block of group {group_idx}", engine_blocks, layout.group_engine_blocks[group_idx])
        slots = cpu_spec.block_ids[first_slot : first_slot + num_group_slots]
        groups.append(GroupCopies(group_idx, _runs(engine_blocks, slots, skips[group_idx], factor)))
        num_bytes += size * layout.engine_block_bytes(group_idx)
        first_block += size
        first_slot += num_group_slots
    return CopyPlan(groups, num_bytes)


def _runs(engine_blocks: BlockIds, slots: BlockIds, skip: int, factor: int) -> list[Run]:
    """Return the copies of one group; adjacent ones are joined into one run."""
    positions = skip + np.arange(len(engine_blocks))
    slot_of, part_of = slots[positions // factor], positions % factor
    follows = np.diff(engine_blocks) == 1
    follows &= np.diff(slot_of) == 1 if factor == 1 else part_of[1:] != 0
    starts = np.flatnonzero(np.concatenate(([True], ~follows)))
    lengths = np.diff(starts, append=len(engine_blocks))
    columns = (engine_blocks[starts], slot_of[starts], part_of[starts], lengths)
    return [Run(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _check_range(what: str, block_ids: BlockIds, limit: int) -> None:
    if len(block_ids) and (block_ids.min() < 0 or block_ids.max() >= limit):
        wrong = block_ids[(block_ids < 0) | (block_ids >= limit)][0]
        raise ValueError(f"{what} {wrong}: 0 to {limit - 1} allowed")
