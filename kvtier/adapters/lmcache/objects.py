"""LMCache's objects: their bytes and form, and in how many blocks of the tiers they fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvtier.adapters.memory_parts import Parts

Form = tuple[int, str]
"""Bytes in an object, and the shapes and data types that give them their meaning."""


def form_of(described: Any, num_bytes: int | None = None) -> Form:
    """Return the form of an LMCache `MemoryLayoutDesc`, or of anything with its fields."""
    shapes, dtypes = described.shapes or (), described.dtypes or ()
    if num_bytes is None:
        num_bytes = sum(shape.numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True))
    parts = [f"{tuple(shape)} {dtype}" for shape, dtype in zip(shapes, dtypes, strict=True)]
    return num_bytes, "; ".join(parts)


def parts_of(memory: Any) -> Parts:
    """Return the one part of a contiguous LMCache `MemoryObj`, which must outlive it."""
    return [(memory.data_ptr, memory.get_size())]


def num_blocks_of(form: Form, block_bytes: int) -> int:
    """Return how many blocks hold an object; one for an object without bytes."""
    return max(1, -(-form[0] // block_bytes))


def in_rounds(sizes: Sequence[int], most: int) -> list[range]:
    """Cut a task into runs of objects whose blocks fit the staging memory together.

    Args:
        sizes: blocks in each object; one above `most` has a run of its own.
    """
    rounds, start, total = [], 0, 0
    for index, size in enumerate(sizes):
        if total and total + size > most:
            rounds.append(range(start, index))
            start, total = index, 0
        total += size
    return [*rounds, range(start, len(sizes))] if sizes else []
