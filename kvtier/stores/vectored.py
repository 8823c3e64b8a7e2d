"""Whole transfers: several buffers at one offset of a file, in as few system calls as they take."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence

import numpy as np

PAGE_BYTES = 4096
"""Alignment of offset, length and address that direct I/O accepts on every common device."""
MAX_BUFFERS = 1024
"""IOV_MAX of Linux: buffers in one vectored call."""
NO_SPACE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_VectoredCall = Callable[[int, Sequence[memoryview], int], int]


def is_page_aligned(buffer: memoryview) -> bool:
    """Return whether a contiguous buffer starts on a page."""
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address % PAGE_BYTES == 0


def read_fully(descriptor: int, buffers: Sequence[memoryview], offset: int, unit: int = 1) -> int:
    """Fill `buffers` from `offset` on; return the bytes read, fewer than asked only at the end of the file.

    Args:
        unit: bytes of which every call moves a multiple, unless it is the last (PAGE_BYTES for direct I/O).
    """
    return _transfer(os.preadv, descriptor, buffers, offset, unit)


def write_fully(descriptor: int, buffers: Sequence[memoryview], offset: int, unit: int = 1) -> int:
    """Write `buffers` from `offset` on; return the bytes written, fewer only if the system takes no more.

    Args:
        unit: as in `read_fully`.
    """
    return _transfer(os.pwritev, descriptor, buffers, offset, unit)


def _transfer(call: _VectoredCall, descriptor: int, buffers: Sequence[memoryview], offset: int, unit: int) -> int:
    """Repeat `call` until everything is moved, or nothing moves any more, or the rest could not be aligned."""
    done = 0
    pending = list(buffers)
    while pending:
        moved = call(descriptor, pending[:MAX_BUFFERS], offset + done)
        if moved <= 0:
            break
        done += moved
        if moved % unit:
            break
        pending = _without_head(pending, moved)
    return done


def _without_head(buffers: list[memoryview], count: int) -> list[memoryview]:
    """Return what is left of `buffers` after their first `count` bytes."""
    for index, buffer in enumerate(buffers):
        if count < buffer.nbytes:
            return [buffer[count:], *buffers[index + 1 :]]
        count -= buffer.nbytes
    return []
