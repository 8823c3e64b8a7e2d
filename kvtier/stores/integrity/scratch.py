"""Private memory of threads, through which payloads pass. It is page-aligned, in huge pages, and reused."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import threading
from collections.abc import Sequence

import numpy as np

RING_BYTES = 1 << 20
"""Size of the ring for `next_piece`. A piece has at most a quarter of it."""
_PAGE_BYTES = mmap.PAGESIZE
_HUGE_PAGE_BYTES = 2 << 20
_FEW_BYTES = 32 << 10
"""Copied sooner than two numpy arrays are made."""


class Scratch(threading.local):
    """Private memory; each thread that uses the object has its own (`threading.local`)."""

    def __init__(self, spare_bytes: int = 0) -> None:
        """Args: spare_bytes: extra bytes after each piece."""
        self._spare_bytes = spare_bytes
        self._memory = self._ring = memoryview(b"")
        self._next = 0
        self._spacious: list[memoryview] = []
        self._pieces: list[memoryview] = []
        self._handed_out: list[memoryview] = []

    def like(self, buffers: Sequence[memoryview]) -> list[memoryview]:
        """Return a piece per buffer, of its length and at a page boundary. Earlier pieces must not be used any more."""
        if not self._fits(buffers):
            self._divide([buffer.nbytes for buffer in buffers])
        self._handed_out = self._pieces[: len(buffers)]
        return self._handed_out

    def piece(self, num_bytes: int) -> memoryview:
        """Return one piece of memory. Earlier pieces must not be used any more."""
        self._spacious = self._pieces = self._handed_out = []
        if len(self._memory) < num_bytes:
            self._memory = private_memory(num_bytes)
        return self._memory[:num_bytes]

    def handed_out(self, pieces: Sequence[object]) -> bool:
        """Return whether `pieces` is the list that `like` has returned last."""
        return pieces is self._handed_out

    @property
    def spacious(self) -> list[memoryview]:
        """The pieces that `like` has returned last, each with its spare bytes."""
        return self._spacious[: len(self._handed_out)]

    def _divide(self, lengths: Sequence[int]) -> None:
        spare = self._spare_bytes
        starts = [0, *itertools.accumulate(whole_pages(length + spare) for length in lengths)]
        memory = self.piece(starts[-1])
        self._spacious = [
            memory[start : start + length + spare] for start, length in zip(starts, lengths, strict=False)
        ]
        self._pieces = [room[:length] for room, length in zip(self._spacious, lengths, strict=True)]

    def _fits(self, buffers: Sequence[memoryview]) -> bool:
        """Return whether the last pieces have the right lengths; a store's blocks usually have one length."""
        return len(buffers) <= len(self._pieces) and all(map(_is_as_long, buffers, self._pieces))

    def next_piece(self, num_bytes: int) -> memoryview:
        """Return memory for a piece of at most `RING_BYTES / 4`.

        It may be used until another `RING_BYTES / 2` have been taken.
        """
        if not self._ring:
            self._ring = private_memory(RING_BYTES)
        if self._next + num_bytes > RING_BYTES:
            self._next = 0
        start, self._next = self._next, self._next + num_bytes
        return self._ring[start : self._next]


def _is_as_long(one: memoryview, other: memoryview) -> bool:
    return one.nbytes == other.nbytes


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy bytes between buffers of one length. Other threads run meanwhile: a memoryview's own assignment keeps the
    interpreter lock, and numpy's does not.
    """
    if source.nbytes < _FEW_BYTES:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def private_memory(num_bytes: int) -> memoryview:
    """Return at least `num_bytes`, in huge pages if the kernel gives them (see madvise(2)).

    A huge page must begin at a multiple of its size, and mmap promises only small pages. So one more is mapped, and the
    memory begins at the first multiple.
    """
    length = -(-num_bytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    mapping = mmap.mmap(-1, length + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    address: int = np.frombuffer(mapping, np.uint8).__array_interface__["data"][0]
    start = -address % _HUGE_PAGE_BYTES
    return memoryview(mapping)[start : start + length]


def whole_pages(num_bytes: int) -> int:
    """Return `num_bytes`, rounded up to whole pages."""
    return -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
