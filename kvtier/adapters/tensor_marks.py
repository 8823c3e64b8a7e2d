"""Marks of tensors. A tensor's mark changes when the tensor is written to, replaced or moved."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from kvtier.adapters.weights_digest import plain_parts

NUMBER = "_kvtier_number"
"""Attribute with a number that no other tensor of this process has. Not a weak reference, since torch refuses to swap
tensors that have one."""
_numbers = itertools.count()


@dataclasses.dataclass
class TensorEntry:
    """One plain tensor at one place of a model.

    Attributes:
        label: what distinguishes it from a tensor of equal bytes, see `describe`.
        mark: see `mark_of`.
        merged: adapters that are merged into its bytes. PEFT merges by writing to `.data`, which changes no mark.
        in_adapter: whether it belongs to an adapter. PEFT swaps adapters by writing to `.data`, which changes no mark.
        pin: a weak reference to the storage. While it lives, torch gives no other storage the same address of its
            descriptor, which is part of the mark; the memory itself may be freed.
        digest: of its bytes, or random if there was no time to read them; None until it is set.
    """

    label: str
    mark: tuple[Any, ...]
    merged: tuple[str, ...]
    in_adapter: bool
    pin: StorageWeakRef
    digest: bytes | None = None

    def is_same_as(self, other: TensorEntry) -> bool:
        """Return whether the tensor has not changed between the two entries, as far as marks can tell."""
        return not self.in_adapter and (self.mark, self.merged) == (other.mark, other.merged)


def mark_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return values of which at least one changes when the tensor is written to, replaced or moved.

    torch counts no writes through `.data` or from outside torch, and none to tensors made in inference mode: these do
    not change the mark.
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
    """Give numbers to the plain tensors of `tensor`, unless they have one; return `tensor`."""
    for _, part in plain_parts("", tensor):
        vars(part).setdefault(NUMBER, next(_numbers))
    return tensor
