"""Compresses single blocks with zstd, plane by plane, and restores them.

A compressed payload, little endian, no padding:

| bytes     | meaning                                                                              |
|-----------|--------------------------------------------------------------------------------------|
| 1         | number of planes, which is the number of bytes of an element: 1, 2, 4 or 8           |
| 3         | zeros                                                                                |
| 4 a plane | length of the plane as stored; that of a plane of the block if it is not compressed  |
| the rest  | the planes: each one frame of zstd that tells its content's length, or its own bytes |

Zstandard: https://www.rfc-editor.org/rfc/rfc8878. The package `zstandard` is imported when a codec is made.
"""

from __future__ import annotations

import struct
import threading
from importlib import import_module
from typing import Any

import numpy as np

from kvtier.stores.compression.planes import ELEMENT_SIZES, Plane, merge, split
from kvtier.stores.integrity.scratch import Scratch, copy_bytes

_LEVEL = 1
_HASH_LOG, _MIN_MATCH = 10, 7
"""Hardly anything repeats in a plane, so looking for less of it is faster, and leaves more to the entropy coder, which
does the work: of a plane of exponents it made 3.5 times less instead of 3.3."""
_GAIN = 20
"""A plane or a block that does not shrink by one part in so many is stored as it is."""
_HEAD = struct.Struct("<B3x")
_LENGTH = struct.Struct("<I")


class BlockCodec:
    """Compresses and restores blocks of one length. Threads may share it."""

    def __init__(self, block_bytes: int, element_bytes: int) -> None:
        """Args: element_bytes: of a number in a block, 1 if unknown. It is only for the blocks that this one writes."""
        self._block_bytes = block_bytes
        self._num_planes = 1 if block_bytes % element_bytes else element_bytes
        self.most_bytes = block_bytes - -(-block_bytes // _GAIN)
        """Most bytes of a compressed block."""
        self._zstandard: Any = import_module("zstandard")
        self._tools = _Tools(self._zstandard)

    def compress(self, payload: memoryview, target: memoryview) -> int:
        """Write a payload's compressed form to `target`, and return its length; 0 if it shrinks too little.

        Args:
            target: at least `most_bytes` long.
        """
        count = self._num_planes
        length = self._block_bytes // count
        planes = _planes(self._tools.scratch.piece(self._block_bytes), count)
        split(payload, planes)
        most, end = length - -(-length // _GAIN), _HEAD.size + count * _LENGTH.size
        lengths = []
        for plane in planes:
            frame = memoryview(self._tools.compressor.compress(plane.data))
            stored = frame if len(frame) <= most else plane.data
            if end + len(stored) > self.most_bytes:
                return 0
            copy_bytes(target[end : end + len(stored)], stored)
            end += len(stored)
            lengths.append(len(stored))
        _HEAD.pack_into(target, 0, count)
        for place, stored_bytes in enumerate(lengths):
            _LENGTH.pack_into(target, _HEAD.size + place * _LENGTH.size, stored_bytes)
        return end

    def expand(self, buffer: memoryview, stored_bytes: int) -> bool:
        """Replace a compressed payload at the beginning of `buffer` by the block; return False if it is not valid.

        No more memory is taken than for a few blocks, whatever the payload claims.
        """
        stored = self._tools.stored.piece(stored_bytes)
        copy_bytes(stored, buffer[:stored_bytes])
        planes = self._planes_of(stored)
        if planes is None:
            return False
        merge(planes, buffer)
        return True

    def try_expand(self, stored: memoryview) -> None:
        """Restore a compressed payload into private memory, to see how long that takes."""
        planes = self._planes_of(stored)
        if planes is not None:
            merge(planes, self._tools.scratch.piece(self._block_bytes))

    def _planes_of(self, stored: memoryview) -> list[Plane] | None:
        """Return the planes of a compressed payload; None if it is not valid."""
        count = stored[0] if len(stored) > _HEAD.size else 0
        start = _HEAD.size + count * _LENGTH.size
        if count not in ELEMENT_SIZES or self._block_bytes % count or len(stored) < start or any(stored[1:4]):
            return None
        length = self._block_bytes // count
        planes = []
        for place in range(count):
            (stored_bytes,) = _LENGTH.unpack_from(stored, _HEAD.size + place * _LENGTH.size)
            plane = self._plane_of(stored[start : start + stored_bytes], length)
            if plane is None:
                return None
            planes.append(plane)
            start += stored_bytes
        return planes if start == len(stored) else None

    def _plane_of(self, stored: memoryview, length: int) -> Plane | None:
        if len(stored) == length:
            return np.frombuffer(stored, np.uint8)
        try:
            # zstandard takes as much memory as a frame claims, so the claim is looked at first.
            if self._zstandard.frame_content_size(stored) != length:
                return None
            plane = self._tools.decompressor.decompress(stored, allow_extra_data=False)
        except self._zstandard.ZstdError:
            return None
        return np.frombuffer(plane, np.uint8) if len(plane) == length else None


class _Tools(threading.local):
    """What threads cannot share."""

    def __init__(self, zstandard: Any) -> None:
        settings = zstandard.ZstdCompressionParameters.from_level(_LEVEL, hash_log=_HASH_LOG, min_match=_MIN_MATCH)
        self.compressor = zstandard.ZstdCompressor(compression_params=settings)
        self.decompressor = zstandard.ZstdDecompressor()
        self.scratch, self.stored = Scratch(), Scratch()


def _planes(memory: memoryview, count: int) -> list[Plane]:
    return list(np.frombuffer(memory, np.uint8).reshape(count, -1))
