"""Reads and writes several buffers at one offset of a file completely, in as few system calls as possible."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from operator import attrgetter

import numpy as np

PAGE_BYTES = 4096
"""Direct I/O needs offset, length and address to be multiples of this on common devices."""
MAX_BUFFERS = 1024
"""Most buffers per vectored call (IOV_MAX of Linux)."""
NO_SPACE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NUM_BYTES = attrgetter("nbytes")

VectoredCall = Callable[[int, Sequence[memoryview], int], int]


def is_page_aligned(buffer: memoryview) -> bool:
    """Return whether a contiguous buffer starts at a multiple of a page."""
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address % PAGE_BYTES == 0


def read_fully(descriptor: int, buffers: Sequence[memoryview], offset: int, unit: int = 1) -> int:
    """Fill `buffers` from `offset` on; return the bytes read: fewer only at the end of the file.

    Args:
        unit: PAGE_BYTES for direct I/O. After a call that moves no multiple of it, no further call could be aligned.
    """
    return move_fully(os.preadv, descriptor, buffers, offset, unit)


def write_fully(descriptor: int, buffers: Sequence[memoryview], offset: int, unit: int = 1) -> int:
    """Write `buffers` from `offset` on; return the bytes written: fewer only if the kernel accepts no more.

    Args:
        unit: as in `read_fully`.
    """
    return move_fully(os.pwritev, descriptor, buffers, offset, unit)


def move_fully(call: VectoredCall, descriptor: int, buffers: Sequence[memoryview], offset: int, unit: int) -> int:
    """Repeat a call until all bytes are moved, it moves none, or the rest would not be aligned; return the bytes moved.

    Args:
        call: `os.preadv` or `os.pwritev`.
        unit: as in `read_fully`.
    """
    done = 0
    pending = list(buffers)
    total = sum(map(_NUM_BYTES, pending))
    while done < total:
        moved = call(descriptor, pending[:MAX_BUFFERS], offset + done)
        if moved <= 0:
            break
        done += moved
        if moved % unit:
            break
        if done < total:
            pending = without_head(pending, moved)
    return done


def without_head(buffers: list[memoryview], count: int) -> list[memoryview]:
    """Return `buffers` without their first `count` bytes."""
    for index, buffer in enumerate(buffers):
        if count < buffer.nbytes:
            return [buffer[count:], *buffers[index + 1 :]]
        count -= buffer.nbytes
    return []
