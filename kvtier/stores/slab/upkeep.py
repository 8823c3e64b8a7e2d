"""What an operator may do to a slab that no engine uses: empty bad records, delete namespaces."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvtier.errors import StoreUnavailableError
from kvtier.stores.slab.directory import delete_namespace_in, open_namespace, open_slab, take_lock
from kvtier.stores.slab.layout import HEADERS_NAME, LOCK_NAME
from kvtier.stores.slab.records import clear_records


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Keep every engine out of a slab while the context lasts.

    Raises:
        StoreUnavailableError: a process uses it; the message names its pid. Or the lock cannot be opened.
    """
    try:
        with open_slab(path) as slab:
            descriptor = slab.open_file(LOCK_NAME, os.O_RDWR)
    except OSError as error:
        raise StoreUnavailableError(f"{error.filename or path}: {error.strerror}") from error
    try:
        take_lock(path, descriptor)
        yield
    finally:
        os.close(descriptor)


def empty_records(folder: Path, slots: Iterable[int]) -> None:
    """Empty the records of `slots`: what they held is a miss from now on. The slab is held.

    Raises:
        OSError: they cannot be written.
    """
    with open_namespace(folder) as namespace:
        descriptor = namespace.open_file(HEADERS_NAME, os.O_RDWR)
    try:
        clear_records(descriptor, slots)
    finally:
        os.close(descriptor)


def delete_namespace(folder: Path) -> list[str]:
    """Delete a namespace with everything of it; return the names in its folder that are not ours. The slab is held.

    Raises:
        OSError: it cannot be deleted, or not all of it.
    """
    with open_slab(folder.parent) as slab:
        return delete_namespace_in(slab, folder.name)
