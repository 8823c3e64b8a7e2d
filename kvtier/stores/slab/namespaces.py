"""The namespaces in a slab's directory: reads descriptions and sizes; deletes and shortens unused namespaces."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kvtier.namespace import FORMAT_VERSION, Namespace
from kvtier.stores.integrity.secrets import ENCRYPTION_NAME, SECRET_NAME
from kvtier.stores.own_files import Folder
from kvtier.stores.slab.layout import (
    DESCRIPTION_NAME,
    SEGMENT_BYTES,
    is_file_of_namespace,
    is_fingerprint,
    rank_of,
    segment_of,
)
from kvtier.stores.slab.records import RecordFile

_MAX_DESCRIPTION_BYTES = 256 << 10


class Description(NamedTuple):
    """The content of `namespace.json`.

    Attributes:
        identity: names and values on which the blocks' bytes depend, see `Namespace`.
        epoch: hexadecimal; "" before the first reset.
        format_version: of the blocks.
        is_ours: whether it describes the namespace in whose folder it is.
    """

    identity: Mapping[str, Any]
    epoch: str
    format_version: int
    is_ours: bool

    @property
    def needs_secret(self) -> bool:
        """Whether a secret guards the blocks."""
        return SECRET_NAME in self.identity

    @property
    def is_encrypted(self) -> bool:
        """Whether the blocks are encrypted."""
        return ENCRYPTION_NAME in self.identity


def open_slab(path: Path) -> Folder:
    """Open the directory of a slab. Links are followed, except for the folder of a data-parallel rank.

    Raises:
        StrangerError: the folder of a data-parallel rank is a link.
        OSError: the directory cannot be opened.
    """
    return Folder.open(path, follow=rank_of(path.name) is None)


def open_namespace(folder: Path) -> Folder:
    """Open the folder of a namespace; raise as `open_slab` and `Folder.folder`."""
    with open_slab(folder.parent) as slab:
        return slab.folder(folder.name)


def namespaces_in(folder: Folder) -> list[str]:
    """Return the names of a slab's namespaces."""
    return [name for name in folder.names() if is_namespace(folder, name)]


def is_namespace(slab: Folder, name: str) -> bool:
    """Return whether a folder is a namespace: it has a fingerprint as its name, and is empty or has kvtier's files."""
    if not is_fingerprint(name):
        return False
    try:
        with slab.folder(name) as folder:
            names = folder.names()
            return not names or any(is_file_of_namespace(one) and folder.is_own_file(one) for one in names)
    except OSError:
        return False


def read_fields(namespace: Folder) -> dict[str, Any]:
    """Return the fields of a namespace's description, with at least `epoch`, `format` and `identity`.

    Raises:
        ValueError: the file is no description.
        OSError: the file does not exist, is not kvtier's, or cannot be read.
    """
    try:
        content = json.loads(namespace.read(DESCRIPTION_NAME, _MAX_DESCRIPTION_BYTES))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict) or not content.keys() >= {"epoch", "format", "identity"}:
        raise ValueError("no description of a namespace")
    return content


def read_description(folder: Path) -> Description | None:
    """Return a namespace's description; None if there is no valid one.

    Raises:
        OSError: the folder or the file is not kvtier's, or cannot be read.
    """
    try:
        with open_namespace(folder) as namespace:
            content = read_fields(namespace)
        identity, epoch, version = content["identity"], bytes.fromhex(content["epoch"]), int(content["format"])
        is_ours = version != FORMAT_VERSION or Namespace(identity, epoch).fingerprint.hex() == folder.name
        json.dumps(identity, ensure_ascii=False).encode()  # raises a ValueError if it cannot be printed as UTF-8
        return Description(dict(identity), epoch.hex(), version, is_ours)
    except (FileNotFoundError, ValueError, TypeError, OverflowError, RecursionError):
        return None


def last_use(slab: Folder, name: str) -> float:
    """Return when a namespace was last opened or closed; 0 if it has no description."""
    try:
        with slab.folder(name) as folder:
            return folder.status(DESCRIPTION_NAME).st_mtime
    except OSError:
        return 0.0


def is_past(slab: Folder, name: str) -> bool:
    """Return whether a namespace's epoch has ended, or it was never completed; False if it cannot be read."""
    try:
        with slab.folder(name) as folder:
            return bool(read_fields(folder)["epoch"])
    except (FileNotFoundError, ValueError):
        return True
    except OSError:
        return False


def differing_facts(slab: Folder, name: str, ours: Namespace) -> list[str]:
    """Return the names of the facts in which another namespace differs from `ours`; none if it has no description."""
    try:
        with slab.folder(name) as folder:
            theirs = dict(read_fields(folder)["identity"])
    except (OSError, ValueError, TypeError):
        return []
    return [fact for fact in sorted({*theirs, *ours.identity}) if theirs.get(fact) != ours.identity.get(fact)]


def used_bytes(folder: Folder) -> int:
    """Return the bytes that a namespace's folder and kvtier's files in it take on the filesystem."""
    total = folder.own_bytes
    for name in filter(is_file_of_namespace, folder.names()):
        with contextlib.suppress(FileNotFoundError):
            total += folder.status(name).st_blocks * 512 if folder.is_own_file(name) else 0
    return total


def delete_namespace(folder: Path) -> list[str]:
    """Delete a namespace; see `delete_namespace_in`. The caller holds the slab's lock."""
    with open_slab(folder.parent) as slab:
        return delete_namespace_in(slab, folder.name)


def delete_namespace_in(slab: Folder, name: str) -> list[str]:
    """Delete the files and the folder of a namespace. Return the names that are not kvtier's: they stay, with the
    folder.

    Raises:
        OSError: a file or the folder cannot be deleted.
    """
    with slab.folder(name) as folder:
        left = [one for one in folder.names() if not (is_file_of_namespace(one) and folder.unlink(one))]
    if not left and not slab.remove_empty(name):
        raise OSError(errno.ENOTEMPTY, "its folder cannot be removed", str(slab.path / name))
    return left


def empty_records(folder: Path, slots: Iterable[int]) -> None:
    """Empty the records of `slots`, so that lookups of their blocks miss. The caller holds the slab's lock.

    Raises:
        OSError: the records cannot be written.
    """
    with open_namespace(folder) as namespace, RecordFile.open(namespace, os.O_RDWR) as records:
        records.clear(slots)


def cut_spare(folder: Folder, segment_bytes: int = SEGMENT_BYTES) -> None:
    """Cut a namespace's data files after the slot of its last record. The caller holds the slab's lock.

    Slabs allocate space ahead of their blocks. With this, a namespace with few blocks can give back that space, and
    need not be deleted when another namespace needs it.

    Raises:
        OSError: the folder cannot be read or written.
    """
    with RecordFile.open(folder) as records:
        slot, block_bytes = records.last_used()
    last, length = 0, 0
    if block_bytes:
        last, index = divmod(slot, max(1, segment_bytes // block_bytes))
        length = (index + 1) * block_bytes
    for name in folder.names():
        segment = segment_of(name)
        if segment is None or segment < last or not folder.is_own_file(name):
            continue
        needed = length if segment == last else 0
        if folder.status(name).st_size > needed:
            _cut(folder, name, needed)


def _cut(folder: Folder, name: str, length: int) -> None:
    """Cut a file, and restore its times: cutting does not count as a use of the namespace."""
    descriptor = folder.open_file(name, os.O_RDWR)
    try:
        status = os.fstat(descriptor)
        os.ftruncate(descriptor, length)
        os.utime(descriptor, ns=(status.st_atime_ns, status.st_mtime_ns))
    finally:
        os.close(descriptor)


def overwrite(descriptor: int, content: bytes) -> None:
    """Replace the content of a small file. It is written in place, which needs no new space on a full disk."""
    if os.pread(descriptor, len(content) + 1, 0) != content:
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
