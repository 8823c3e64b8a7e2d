"""Digests of tensors. Threads read every byte, at the speed of memory."""

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
"""Most bytes that are copied at once from a device, or from a tensor that is not contiguous."""

MAX_THREADS = 8
"""More threads read no faster: memory bandwidth is the limit."""

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def plain_parts(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Return the plain tensors that `tensor` is made of, each with a label that is unique within `tensor`.

    A plain tensor is its own only part, with the label "". A wrapper (quantized by torchao, distributed) is taken apart
    by torch's protocol `__tensor_flatten__`.

    Raises:
        ConfigError: the bytes of the tensor cannot be read; the message has its name.
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
        allowed = "weights in memory expected, not on the meta device or offloaded: load without such a device_map"
        raise ConfigError("model", name, allowed)
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        raise ConfigError(
            "model", name, f"plain dense tensors expected, not a {kind} of {tensor.dtype}, {tensor.layout}"
        )
    return [(kind if type(tensor) not in _PLAIN else "", tensor)]


def digest_tensors(
    tensors: Sequence[torch.Tensor], deadline: float | None = None, piece_bytes: int = PIECE_BYTES
) -> list[bytes | None]:
    """Return an XXH3-128 of each tensor's bytes, read in the tensor's logical order.

    Args:
        tensors: plain and dense, on any device.
        deadline: on `time.monotonic`; a tensor that is not read by then gets None.
        piece_bytes: most bytes that are copied at once. The digests do not depend on it.
    """
    if sum(tensor.nbytes for tensor in tensors) <= piece_bytes:
        return [_digest(tensor, deadline, piece_bytes) for tensor in tensors]
    largest_first = sorted(range(len(tensors)), key=lambda index: -tensors[index].nbytes)
    # xxhash and torch's copies release the interpreter lock, so that threads read in parallel.
    with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0))), "kvtier-weights") as pool:
        digests = pool.map(lambda index: _digest(tensors[index], deadline, piece_bytes), largest_first)
        found = dict(zip(largest_first, digests, strict=True))
    return [found[index] for index in range(len(tensors))]


def _digest(tensor: torch.Tensor, deadline: float | None, piece_bytes: int) -> bytes | None:
    digest = xxhash.xxh3_128()
    with torch.inference_mode():
        # torch conjugates and negates lazily, by a flag beside the bytes: resolve both before the bytes are read.
        for piece in _pieces(tensor.detach().resolve_conj().resolve_neg(), piece_bytes):
            if deadline is not None and time.monotonic() > deadline:
                return None
            digest.update(piece.cpu().view(-1).view(torch.uint8).numpy())
    return digest.digest()


def _pieces(tensor: torch.Tensor, piece_bytes: int) -> Iterator[torch.Tensor]:
    """Yield the elements in logical order, as contiguous tensors of about `piece_bytes` at most.

    Contiguous tensors are not copied.
    """
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(max(1, piece_bytes // tensor.element_size()))
    elif tensor.nbytes <= piece_bytes:
        yield tensor.contiguous()
    else:
        row_bytes = tensor[0].nbytes
        if row_bytes > piece_bytes:
            for row in tensor.unbind(0):
                yield from _pieces(row, piece_bytes)
        else:
            for rows in tensor.split(piece_bytes // row_bytes):
                yield rows.contiguous()


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return one digest of named tensors: names, types, shapes and every byte.

    Raises:
        ConfigError: the bytes of a tensor cannot be read.
    """
    parts = [(name, *part) for name, tensor in sorted(tensors.items()) for part in plain_parts(name, tensor)]
    whole = xxhash.xxh3_128()
    for (name, label, tensor), digest in zip(parts, digest_tensors([part[2] for part in parts]), strict=True):
        whole.update(f"{name}\0{describe(label, tensor)}\0".encode() + (digest or b""))
    return whole.hexdigest()


def describe(label: str, tensor: Any) -> str:
    """Return what distinguishes tensors of equal bytes: label, type, shape and, if not contiguous, strides."""
    strides = "" if tensor.is_contiguous() else tuple(tensor.stride())
    return f"{label} {tensor.dtype} {tuple(tensor.shape)} {strides}"
