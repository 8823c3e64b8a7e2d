"""Copies between the memory of an engine above, given by address, and rows of kvtier's arena."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import numpy as np

Parts = Sequence[tuple[int, int]]
"""The pieces of memory that a page or an object consists of: (address, bytes), in order."""


def copy_to_rows(parts: Parts, rows: Sequence[memoryview]) -> None:
    """Fill `rows`, one after the other, with the bytes of `parts`. What is left of the rows becomes zero."""
    for address, row, start, num_bytes in _aligned(parts, rows):
        ctypes.memmove(_address(row) + start, address, num_bytes)
    rest = sum(map(len, rows)) - sum(num_bytes for _, num_bytes in parts)
    if rest:
        np.frombuffer(rows[-1], dtype=np.uint8)[-rest:] = 0


def copy_from_rows(rows: Sequence[memoryview], parts: Parts) -> None:
    """Fill `parts` with the bytes of `rows`; what is left of the rows is ignored."""
    for address, row, start, num_bytes in _aligned(parts, rows):
        ctypes.memmove(address, _address(row) + start, num_bytes)


def _aligned(parts: Parts, rows: Sequence[memoryview]) -> Iterator[tuple[int, memoryview, int, int]]:
    """Yield (address, row, offset in the row, bytes) of each copy between a page's parts and the rows that hold it."""
    number, start = 0, 0
    for first, size in parts:
        address, left = first, size
        while left:
            num_bytes = min(left, len(rows[number]) - start)
            yield address, rows[number], start, num_bytes
            address, left, start = address + num_bytes, left - num_bytes, start + num_bytes
            if start == len(rows[number]):
                number, start = number + 1, 0


def _address(row: memoryview) -> int:
    return int(np.frombuffer(row, dtype=np.uint8).ctypes.data)
