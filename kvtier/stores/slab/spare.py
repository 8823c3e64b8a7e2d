"""Gives back what a namespace that is not in use holds without need: space behind its last block."""

from __future__ import annotations

import os

import numpy as np

from kvtier.stores.integrity.header import HEADER_BYTES, HEADER_DTYPE, MAX_SLOT
from kvtier.stores.own_files import Folder
from kvtier.stores.slab.layout import HEADERS_NAME, segment_of, slots_of_segment
from kvtier.stores.slab.records import has_data

_RECORDS_PER_READ = 1 << 16


def cut_spare(folder: Folder) -> None:
    """Shorten the data files of a namespace to its last record, whatever that says; nobody else may use it.

    Slabs take space ahead of their blocks. Without this, one with a handful of blocks would have to be deleted whole
    as soon as another namespace needs the space.

    Raises:
        OSError: the folder cannot be read or written.
    """
    slot, block_bytes = _last_record(folder)
    last, length = 0, 0
    if block_bytes:
        last, index = divmod(slot, max(1, slots_of_segment(block_bytes)))
        length = (index + 1) * block_bytes
    for name in folder.names():
        segment = segment_of(name)
        if segment is None or segment < last or not folder.is_own_file(name):
            continue
        needed = length if segment == last else 0
        if folder.status(name).st_size > needed:
            _cut(folder, name, needed)


def _cut(folder: Folder, name: str, length: int) -> None:
    """Cut a file; this is no use of the namespace, and does not look like one."""
    descriptor = folder.open_file(name, os.O_RDWR)
    try:
        status = os.fstat(descriptor)
        os.ftruncate(descriptor, length)
        os.utime(descriptor, ns=(status.st_atime_ns, status.st_mtime_ns))
    finally:
        os.close(descriptor)


def _last_record(folder: Folder) -> tuple[int, int]:
    """Return slot and payload length of the last record that is not empty; zeros if there is none."""
    descriptor = folder.open_file(HEADERS_NAME)
    try:
        end = min(os.fstat(descriptor).st_size // HEADER_BYTES, MAX_SLOT + 1)
        while end:
            start = max(0, end - _RECORDS_PER_READ)
            if not has_data(descriptor, start, end):
                end = start
                continue
            raw = os.pread(descriptor, (end - start) * HEADER_BYTES, start * HEADER_BYTES)
            rows = np.frombuffer(raw, dtype=np.uint8, count=len(raw) // HEADER_BYTES * HEADER_BYTES)
            used = np.flatnonzero(rows.reshape(-1, HEADER_BYTES).any(axis=1))
            if used.size:
                record = np.frombuffer(raw, HEADER_DTYPE, count=1, offset=int(used[-1]) * HEADER_BYTES)[0]
                return start + int(used[-1]), int(record["payload_length"])
            end = start
    finally:
        os.close(descriptor)
    return 0, 0
