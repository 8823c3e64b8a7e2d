"""Marks of tensors: what changes when a tensor is written to, replaced or moved."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from kvtier.adapters.weights_digest import plain_parts

NUMBER = "_kvtier_number"
"""Attribute that tells a tensor from any other of this process. A weak reference would do it, too, but torch refuses to
swap tensors that have one."""
_numbers = itertools.count()


@dataclasses.dataclass
class TensorEntry:
    """One plain tensor at one place of a model.

    Attributes:
        label: what tells it apart from a tensor of equal bytes.
        mark: as made by `mark_of`.
        merged: adapters that the layer around it has added to its weights: PEFT does this through `.data`, which leaves
            no mark.
        in_adapter: whether it is an adapter's own: PEFT exchanges these through `.data`, and may then set a scale.
        pin: while this lives, no other storage can get the same identity; it does not keep the memory.
        digest: of its bytes; random if there was no time to read them; None until one of both.
    """

    label: str
    mark: tuple[Any, ...]
    merged: tuple[str, ...]
    in_adapter: bool
    pin: StorageWeakRef
    digest: bytes | None = None

    def is_same_as(self, other: TensorEntry) -> bool:
        """Return whether nothing has happened to the tensor between the two entries, as far as its marks tell."""
        return not self.in_adapter and (self.mark, self.merged) == (other.mark, other.merged)


def mark_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what changes when a tensor is written to, replaced or moved.

    Writes through `.data` or from outside torch leave no mark, nor do any writes to tensors made in inference mode.
    """
    parts = plain_parts("", tensor) if type(tensor) not in (torch.nn.Parameter, torch.Tensor) else ()
    if parts and parts[0][1] is not tensor:
        return tuple(mark_of(part) for _, part in parts)
    return (
        None if tensor.is_inference() else tensor._version,
        vars(tensor).get(NUMBER),
        tensor.data_ptr(),
        tensor.untyped_storage()._cdata,
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
    )


def numbered(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that has a number, as have those that it wraps."""
    for _, part in plain_parts("", tensor):
        vars(part).setdefault(NUMBER, next(_numbers))
    return tensor
