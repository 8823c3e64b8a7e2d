"""Digests of tensors: every byte, on threads, at the speed of memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import xxhash

from kvtier.errors import ConfigError

PIECE_BYTES = 32 << 20
"""Most bytes that are copied at once, of tensors on a device or with gaps; CPU tensors are read in place."""

MAX_THREADS = 8
"""More threads than this add nothing: memory is the limit."""

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def plain_parts(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors with memory of their own that make up `tensor`, each with what tells it apart.

    A plain tensor is its own only part. A wrapper (quantized by torchao, distributed) is taken apart by torch's
    protocol for this, `__tensor_flatten__`.

    Raises:
        ConfigError: the bytes of the tensor cannot be read; the message names it.
    """
    if type(tensor) not in _PLAIN and hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        label = f"{type(tensor).__qualname__}({context!r})"
        return [
            (f"{label}.{inner}.{part_label}", part)
            for inner in names
            for part_label, part in plain_parts(f"{name}.{inner}", getattr(tensor, inner))
        ]
    kind = type(tensor).__qualname__
    if tensor.device.type == "meta" or isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin):
        allowed = (
            "all weights in memory expected, this one is on the meta device or offloaded: no device_map that offloads"
        )
        raise ConfigError("model", name, allowed)
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        raise ConfigError(
            "model", name, f"plain dense tensors expected, not a {kind} of {tensor.dtype}, {tensor.layout}"
        )
    return [(kind if type(tensor) not in _PLAIN else "", tensor)]


def digest_tensors(tensors: Sequence[torch.Tensor], deadline: float | None = None) -> list[bytes | None]:
    """Return an XXH3-128 of each tensor's bytes in their logical order.

    Args:
        tensors: plain and dense; on any device.
        deadline: on `time.monotonic`; a tensor that is not read by then gets None.
    """
    if sum(tensor.nbytes for tensor in tensors) <= PIECE_BYTES:
        return [_digest(tensor, deadline) for tensor in tensors]
    largest_first = sorted(range(len(tensors)), key=lambda index: -tensors[index].nbytes)
    with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0))), "kvtier-weights") as pool:
        digests = pool.map(lambda index: _digest(tensors[index], deadline), largest_first)
        found = dict(zip(largest_first, digests, strict=True))
    return [found[index] for index in range(len(tensors))]


def _digest(tensor: torch.Tensor, deadline: float | None) -> bytes | None:
    digest = xxhash.xxh3_128()
    with torch.inference_mode():
        for piece in _pieces(tensor.detach().resolve_conj().resolve_neg()):
            if deadline is not None and time.monotonic() > deadline:
                return None
            digest.update(piece.cpu().view(-1).view(torch.uint8).numpy())
    return digest.digest()


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the elements in logical order as contiguous tensors of at most `PIECE_BYTES`; in place where they are."""
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(max(1, PIECE_BYTES // tensor.element_size()))
    elif tensor.nbytes <= PIECE_BYTES:
        yield tensor.contiguous()
    else:
        row_bytes = tensor[0].nbytes
        if row_bytes > PIECE_BYTES:
            for row in tensor.unbind(0):
                yield from _pieces(row)
        else:
            for rows in tensor.split(PIECE_BYTES // row_bytes):
                yield rows.contiguous()


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of named tensors: names, types, shapes and every byte.

    Raises:
        ConfigError: the bytes of a tensor cannot be read.
    """
    parts = [(name, *part) for name, tensor in sorted(state.items()) for part in plain_parts(name, tensor)]
    digests = digest_tensors([tensor for _, _, tensor in parts])
    whole = xxhash.xxh3_128()
    for (name, label, tensor), digest in zip(parts, digests, strict=True):
        whole.update(f"{name}\0{describe(label, tensor)}\0".encode())
        whole.update(digest or b"")
    return whole.hexdigest()


def describe(label: str, tensor: Any) -> str:
    """Return what tells tensors of equal bytes apart: type, shape and, where elements are not in order, strides."""
    strides = "" if tensor.is_contiguous() else tuple(tensor.stride())
    return f"{label} {tensor.dtype} {tuple(tensor.shape)} {strides}"
