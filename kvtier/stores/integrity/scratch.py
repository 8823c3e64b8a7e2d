"""Private memory of threads that payloads pass through: page-aligned, in huge pages, used again and again."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import threading
from collections.abc import Sequence

import numpy as np

RING_BYTES = 1 << 20
"""Of pieces on their way out of a thread; a piece has a quarter of it at most."""
_PAGE_BYTES = mmap.PAGESIZE
_HUGE_PAGE_BYTES = 2 << 20


class Bounce(threading.local):
    """One thread's private memory.

    Attributes:
        rooms: what `like` returned last, each with the spare bytes behind it.
    """

    def __init__(self, spare_bytes: int = 0) -> None:
        """Args: spare_bytes: behind each piece."""
        self._spare_bytes = spare_bytes
        self._memory = self._ring = memoryview(b"")
        self._next = 0
        self.rooms: list[memoryview] = []
        self._former: list[memoryview] = []
        self._former_rooms: list[memoryview] = []

    def like(self, buffers: Sequence[memoryview]) -> list[memoryview]:
        """Return memory as long as each of `buffers`, on a page boundary each; the former memory is good no more."""
        if self._fits(buffers):
            self.rooms = self._former_rooms[: len(buffers)]
            return self._former[: len(buffers)]
        spare = self._spare_bytes
        starts = [0, *itertools.accumulate(whole_pages(buffer.nbytes + spare) for buffer in buffers)]
        if len(self._memory) < starts[-1]:
            self._memory = _private_memory(starts[-1])
        lengths = [buffer.nbytes for buffer in buffers]
        memory = self._memory
        self.rooms = [memory[start : start + length + spare] for start, length in zip(starts, lengths, strict=False)]
        self._former_rooms = self.rooms
        self._former = [room[:length] for room, length in zip(self.rooms, lengths, strict=True)]
        return self._former

    def _fits(self, buffers: Sequence[memoryview]) -> bool:
        """Return whether what was handed out before has the right lengths: blocks of a store have one length."""
        former = self._former
        return len(buffers) <= len(former) and all(map(_is_as_long, buffers, former))

    def next_piece(self, num_bytes: int) -> memoryview:
        """Return memory for a piece of at most `RING_BYTES / 4`; good until half of `RING_BYTES` more are asked for."""
        if not self._ring:
            self._ring = _private_memory(RING_BYTES)
        if self._next + num_bytes > RING_BYTES:
            self._next = 0
        start, self._next = self._next, self._next + num_bytes
        return self._ring[start : self._next]


def _is_as_long(one: memoryview, other: memoryview) -> bool:
    return one.nbytes == other.nbytes


def _private_memory(num_bytes: int) -> memoryview:
    """Return so many bytes at least, in huge pages if the system has them for who asks (madvise(2))."""
    length = -(-num_bytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    mapping = mmap.mmap(-1, length + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    address: int = np.frombuffer(mapping, np.uint8).__array_interface__["data"][0]
    start = -address % _HUGE_PAGE_BYTES
    return memoryview(mapping)[start : start + length]


def whole_pages(num_bytes: int) -> int:
    """Return the bytes of the pages that so many bytes take."""
    return -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
