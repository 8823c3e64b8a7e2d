"""LMCache's objects: their bytes, and the keys of the blocks that hold them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch

from kvtier.adapters.memory_parts import Parts
from kvtier.adapters.staging_slots import PageKeys
from kvtier.keys import make_offload_key

_HASH_BYTES = 32

Form = tuple[int, str]
"""Bytes in an object, and the shapes and data types that give them their meaning."""
Kind = tuple[str, int, int]
"""Objects of one form: model, rank and group of layers, as LMCache numbers them."""


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


class ObjectForms:
    """Knows which form the objects of a lookup have: LMCache gives their keys, and the engine's layout as a hint.

    Objects that LMCache serializes are flat bytes instead. Their stores and loads show how many. No lock is needed: a
    value is replaced as a whole.
    """

    def __init__(self) -> None:
        self._serialized: dict[Kind, Form] = {}

    def of_object(self, key: Any, memory: Any) -> Form:
        """Return the form of an object; remember it for lookups, if LMCache has serialized the object."""
        form = form_of(memory.metadata, memory.get_size())
        if list(memory.metadata.dtypes or ()) == [torch.uint8] and len(memory.metadata.shapes[0]) == 1:
            self._serialized[_kind_of(key)] = form
        return form

    def of_lookup(self, key: Any, layouts: Mapping[int, Any]) -> Form | None:
        """Return the form that an object has, if it is stored; None if nothing tells."""
        serialized = self._serialized.get(_kind_of(key))
        if serialized is not None or key.object_group_id not in layouts:
            return serialized
        return form_of(layouts[key.object_group_id])


def block_keys(key: Any, form: Form, block_bytes: int) -> PageKeys:
    """Return the keys of the blocks that hold an object. All begin with one hash; the number of the block follows.

    Args:
        key: LMCache's `ObjectKey`.
    """
    told = [key.model_name, key.kv_rank, key.object_group_id, key.cache_salt, key.chunk_hash, form]
    digest = hashlib.blake2b(msgspec.msgpack.encode(told), digest_size=_HASH_BYTES).digest()
    return [make_offload_key(digest, number) for number in range(num_blocks_of(form, block_bytes))]


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


def _kind_of(key: Any) -> Kind:
    return key.model_name, key.kv_rank, key.object_group_id
