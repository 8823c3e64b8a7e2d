"""The namespaces in a slab's directory: their descriptions, their sizes, and what may be done to an unused one."""

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
    """What `namespace.json` says.

    Attributes:
        identity: names and values that make bytes incompatible when they differ.
        epoch: hexadecimal; empty before the first reset.
        format_version: of the blocks.
        is_ours: whether it is the description of the namespace whose folder it lies in.
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
    """Hold the directory of a slab; links in a path that a person configured are followed.

    Raises:
        StrangerError: the folder of a data-parallel rank is a link.
        OSError: it cannot be opened.
    """
    return Folder.open(path, follow=rank_of(path.name) is None)


def open_namespace(folder: Path) -> Folder:
    """Hold the folder of a namespace; errors as `open_slab` and `Folder.folder`."""
    with open_slab(folder.parent) as slab:
        return slab.folder(folder.name)


def namespaces_in(folder: Folder) -> list[str]:
    """Return the names of a slab's namespaces."""
    return [name for name in folder.names() if is_namespace(folder, name)]


def is_namespace(slab: Folder, name: str) -> bool:
    """Return whether a folder holds a slab, a part of one, or nothing; a stranger's folder is never touched."""
    if not is_fingerprint(name):
        return False
    try:
        with slab.folder(name) as folder:
            names = folder.names()
            return not names or any(is_file_of_namespace(one) and folder.is_own_file(one) for one in names)
    except OSError:
        return False


def read_fields(namespace: Folder) -> dict[str, Any]:
    """Return the fields of a namespace's description; of its kind there are at least an epoch, a format, an identity.

    Raises:
        ValueError: it is not such a description.
        OSError: there is none, it is not ours, or it may not be read.
    """
    try:
        content = json.loads(namespace.read(DESCRIPTION_NAME, _MAX_DESCRIPTION_BYTES))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict) or not content.keys() >= {"epoch", "format", "identity"}:
        raise ValueError("no description of a namespace")
    return content


def read_description(folder: Path) -> Description | None:
    """Return what a namespace's folder stands for, or None if nothing readable says so.

    Raises:
        OSError: the folder, or what says so, is not ours or may not be read.
    """
    try:
        with open_namespace(folder) as namespace:
            content = read_fields(namespace)
        identity, epoch, version = content["identity"], bytes.fromhex(content["epoch"]), int(content["format"])
        is_ours = version != FORMAT_VERSION or Namespace(identity, epoch).fingerprint.hex() == folder.name
        json.dumps(identity, ensure_ascii=False).encode()  # raises a ValueError for what nobody could print
        return Description(dict(identity), epoch.hex(), version, is_ours)
    except (FileNotFoundError, ValueError, TypeError, OverflowError, RecursionError):
        return None


def last_use(slab: Folder, name: str) -> float:
    """Return when a namespace was last opened or closed; 0 for one without a description."""
    try:
        with slab.folder(name) as folder:
            return folder.status(DESCRIPTION_NAME).st_mtime
    except OSError:
        return 0.0


def is_past(slab: Folder, name: str) -> bool:
    """Return whether a folder is of an epoch that has ended, or an unfinished one; not one that cannot be read."""
    try:
        with slab.folder(name) as folder:
            return bool(read_fields(folder)["epoch"])
    except (FileNotFoundError, ValueError):
        return True
    except OSError:
        return False


def used_bytes(folder: Folder) -> int:
    """Return the bytes that a namespace's folder and our files in it take from the filesystem."""
    total = folder.own_bytes
    for name in filter(is_file_of_namespace, folder.names()):
        with contextlib.suppress(FileNotFoundError):
            total += folder.status(name).st_blocks * 512 if folder.is_own_file(name) else 0
    return total


def delete_namespace(folder: Path) -> list[str]:
    """Delete a namespace with everything of it; return the names in its folder that are not ours. The slab is held.

    Raises:
        OSError: it cannot be deleted, or not all of it.
    """
    with open_slab(folder.parent) as slab:
        return delete_namespace_in(slab, folder.name)


def delete_namespace_in(slab: Folder, name: str) -> list[str]:
    """Delete a namespace, file by file; return the names in its folder that are not ours and stay, with the folder.

    Raises:
        OSError: it cannot be deleted, or not all of it.
    """
    with slab.folder(name) as folder:
        left = [one for one in folder.names() if not (is_file_of_namespace(one) and folder.unlink(one))]
    if not left and not slab.remove_empty(name):
        raise OSError(errno.ENOTEMPTY, "its folder cannot be removed", str(slab.path / name))
    return left


def empty_records(folder: Path, slots: Iterable[int]) -> None:
    """Empty the records of `slots`: what they held is a miss from now on. The slab is held.

    Raises:
        OSError: they cannot be written.
    """
    with open_namespace(folder) as namespace, RecordFile.open(namespace, os.O_RDWR) as records:
        records.clear(slots)


def cut_spare(folder: Folder, segment_bytes: int = SEGMENT_BYTES) -> None:
    """Shorten the data files of a namespace to its last record, whatever that says; nobody else may use it.

    Slabs take space ahead of their blocks. Without this, one with a handful of blocks would have to be deleted whole
    as soon as another namespace needs the space.

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
    """Cut a file; this is no use of the namespace, and does not look like one."""
    descriptor = folder.open_file(name, os.O_RDWR)
    try:
        status = os.fstat(descriptor)
        os.ftruncate(descriptor, length)
        os.utime(descriptor, ns=(status.st_atime_ns, status.st_mtime_ns))
    finally:
        os.close(descriptor)


def overwrite(descriptor: int, content: bytes) -> None:
    """Make `content` all that a small file holds: in place, so that a full disk or a kill leaves what was there."""
    if os.pread(descriptor, len(content) + 1, 0) != content:
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
