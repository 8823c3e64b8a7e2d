"""Planes of bytes: the first bytes of all numbers of a block, then the second ones, and so on.

The sign and exponent of neighbouring numbers are alike, and their mantissas are noise. Side by side the former compress
well; between the latter they do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.uint8]

ELEMENT_SIZES = (1, 2, 4, 8)
_PIECE_ELEMENTS = 1 << 20
"""Most blocks are one piece. Smaller pieces would stay in a core's own cache, but a thread must win the interpreter
lock back after each call, and among several threads that took longer than the work."""
_SIZES = {
    **dict.fromkeys(("bfloat16", "float16", "half", "bf16", "fp16", "int16"), 2),
    **dict.fromkeys(("float32", "float", "int32"), 4),
    **dict.fromkeys(("float64", "double", "int64"), 8),
}
"""Bytes of a number, by the names of data types in torch and vLLM. All others, such as fp8, are taken as bytes."""
_POOL = "sglang.pool."


def element_bytes(identity: Mapping[str, str | int]) -> int:
    """Return how many bytes a number of the KV cache has, as a namespace's identity tells it; 1 where it does not.

    vLLM's `cache_dtype` is "auto" where the cache has the model's `dtype`. SGLang's pools have each their own.
    """
    pools = [str(value).rpartition(" ")[2] for key, value in identity.items() if key.startswith(_POOL)]
    named = (str(identity[key]) for key in ("cache_dtype", "dtype") if key in identity)
    names = {pool for pool in pools if "torch." in pool} or {next((name for name in named if name != "auto"), "")}
    sizes = {_SIZES.get(name.removeprefix("torch."), 1) for name in names}
    return min(sizes)


def split(payload: memoryview, planes: Sequence[Plane]) -> None:
    """Write the planes of a payload.

    Args:
        payload: a whole number of elements; an element has as many bytes as there are planes.
    """
    size = len(planes)
    if size == 1:
        np.copyto(planes[0], np.frombuffer(payload, np.uint8))
        return
    elements = np.frombuffer(payload, f"<u{size}")
    shifted = np.empty(min(len(elements), _PIECE_ELEMENTS), elements.dtype)
    for start in range(0, len(elements), _PIECE_ELEMENTS):
        piece = elements[start : start + _PIECE_ELEMENTS]
        np.copyto(planes[0][start : start + len(piece)], piece, casting="unsafe")
        for place in range(1, size):
            room = shifted[: len(piece)]
            np.right_shift(piece, 8 * place, out=room)
            np.copyto(planes[place][start : start + len(piece)], room, casting="unsafe")


def merge(planes: Sequence[Plane], target: memoryview) -> None:
    """Write the payload of these planes to `target`, other memory."""
    size = len(planes)
    if size == 1:
        np.copyto(np.frombuffer(target, np.uint8), planes[0])
        return
    elements = np.frombuffer(target, f"<u{size}")
    shifted = np.empty(min(len(elements), _PIECE_ELEMENTS), elements.dtype)
    for start in range(0, len(elements), _PIECE_ELEMENTS):
        piece = elements[start : start + _PIECE_ELEMENTS]
        np.copyto(piece, planes[0][start : start + len(piece)])
        for place in range(1, size):
            room = shifted[: len(piece)]
            np.left_shift(planes[place][start : start + len(piece)], 8 * place, out=room, dtype=room.dtype)
            np.bitwise_or(piece, room, out=piece)
