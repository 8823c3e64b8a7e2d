"""What an operator may do to a slab that no engine uses: empty bad records, delete namespaces."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvtier.errors import StoreUnavailableError
from kvtier.stores.slab.directory import LOCK_NAME, delete_folder, open_private, take_lock
from kvtier.stores.slab.geometry import SEGMENT_BYTES, SlabGeometry
from kvtier.stores.slab.headers import HeaderFile
from kvtier.stores.slab.reading import HEADERS_NAME


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Keep every engine out of a slab while the context lasts.

    Raises:
        StoreUnavailableError: a process uses it; the message names its pid. Or the lock cannot be opened.
    """
    try:
        descriptor = open_private(path / LOCK_NAME, os.O_RDWR)
    except OSError as error:
        raise StoreUnavailableError(f"{path}: {error.strerror}") from error
    try:
        take_lock(path, descriptor)
        yield
    finally:
        os.close(descriptor)


def empty_records(folder: Path, num_slots: int, slots: Iterable[int]) -> None:
    """Empty the records of `slots`: what they held is a miss from now on. The slab is held.

    Args:
        num_slots: records of the file.

    Raises:
        OSError: they cannot be written.
    """
    records_only = SlabGeometry(1, num_slots, SEGMENT_BYTES, slots_per_growth=1)  # of any blocks: none is touched
    headers = HeaderFile(folder / HEADERS_NAME, records_only)
    try:
        headers.clear(slots)
    finally:
        headers.close()


def delete_namespace(folder: Path) -> None:
    """Delete a namespace with everything of it. The slab is held.

    Raises:
        OSError: it cannot be deleted, or not all of it.
    """
    delete_folder(folder)
