"""The directory that hosts share: its owner, the paths of its files, and its clock.

DIR/kvtier.json                     marks the directory as kvtier's; touched to read the filesystem's clock
DIR/swept                           touched when a host begins to sweep
DIR/<fingerprint>/                  one folder per namespace, 32 hexadecimal digits
DIR/<fingerprint>/<shard>/<key>     a block; 4,096 shards, 3 hexadecimal digits of a hash of the key
DIR/<fingerprint>/<shard>/.<x>.new  a block that is being written, or that a dead writer has left
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self

import xxhash

from kvtier.errors import StoreUnavailableError
from kvtier.foreign_text import MAX_QUOTED, one_line
from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.stores.mounts import check_mounted, make_last_directory
from kvtier.stores.own_files import FOLDER_MODE, FOUND_BY_FSCK, Folder, StrangerError

SHARD_DIGITS = 3
MARKER_NAME = "kvtier.json"
SWEPT_NAME = "swept"
UNFINISHED_SUFFIX = ".new"
_CONTENT = json.dumps({"kvtier": "one file a block", "version": 1}).encode()
_MAX_MARKER_BYTES = 4096
_ATTEMPTS = 4
"""To begin a file: a janitor may remove the empty folder before the file is in it."""
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_SHARD = re.compile(rf"[0-9a-f]{{{SHARD_DIGITS}}}")
_BLOCK = re.compile(r"([0-9a-f]{2}){5,68}")


def shard_of(key: OffloadKey) -> str:
    """Return the shard of a key. It comes from a hash, so that shards fill evenly whatever the keys look like."""
    return f"{xxhash.xxh3_64_intdigest(key) >> (64 - 4 * SHARD_DIGITS):0{SHARD_DIGITS}x}"


def is_block(name: str) -> bool:
    """Return whether a file's name is that of a block."""
    return _BLOCK.fullmatch(name) is not None


def is_unfinished(name: str) -> bool:
    """Return whether a file's name is that of a block that is being written."""
    return name.startswith(".") and name.endswith(UNFINISHED_SUFFIX)


class NewFile(NamedTuple):
    """A file for a block that is being written; a context manager that closes its folder.

    Attributes:
        folder: the open folder of the file.
        name: a name that no other writer uses.
        descriptor: open for writing; the caller closes it.
        folder_bytes: bytes that a new folder takes on the filesystem; 0 if the folder existed.
        held: closes the folders.
    """

    folder: Folder
    name: str
    descriptor: int
    folder_bytes: int
    held: ExitStack

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.held.close()


class SharedDirectory:
    """A directory of one user that hosts share. It uses no locks; threads may share the object."""

    def __init__(self, path: Path, namespace: Namespace, folder: Folder) -> None:
        """Args: folder: the open directory; `close` closes it."""
        self.path = path
        self.folder = folder
        self.namespace_name = namespace.fingerprint.hex()
        self._writer = secrets.token_hex(8)
        self._number = itertools.count()
        self._ahead = 0.0

    @classmethod
    def open(cls, path: Path, namespace: Namespace, mount_point: str = "/") -> SharedDirectory:
        """Open the directory; create it if it is missing and its parent exists.

        Args:
            mount_point: a filesystem must be mounted here, see `check_mounted`.

        Raises:
            StoreUnavailableError: the directory belongs to another user, holds something else, or cannot be used.
        """
        check_mounted(path, mount_point)
        try:
            directory = cls(path, namespace, _take(path))
        except StrangerError as error:
            raise StoreUnavailableError(f"{error.filename}: {error.strerror}") from error
        except OSError as error:
            raise StoreUnavailableError(f"{path}: {error.strerror}") from error
        directory.now()
        return directory

    def close(self) -> None:
        """Close the directory's descriptor."""
        self.folder.close()

    def check_present(self) -> None:
        """Raise StoreUnavailableError if the directory was removed or replaced."""
        try:
            is_there = os.path.samestat(os.stat(self.path), os.fstat(self.folder.descriptor))
        except FileNotFoundError:
            is_there = False
        except OSError as error:
            raise StoreUnavailableError(f"{self.path}: {error.strerror}") from error
        if not is_there:
            raise StoreUnavailableError(f"{self.path}: the directory was removed while in use, or replaced")

    def namespace(self) -> Folder:
        """Open the folder of this namespace; raise as `Folder.folder`."""
        return self.folder.folder(self.namespace_name)

    def begin_file(self, shard: str) -> NewFile:
        """Create a file in a shard, and the shard's folder if it is missing.

        Raises:
            OSError: the file cannot be created, or something else has the name of its folder.
        """
        is_new = False
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError), ExitStack() as held:
                namespace = held.enter_context(self.namespace())
                is_new = namespace.make_folder(shard) or is_new
                folder = held.enter_context(namespace.folder(shard))
                name = f".{self._writer}-{next(self._number)}{UNFINISHED_SUFFIX}"
                descriptor = folder.open_file(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                return NewFile(folder, name, descriptor, folder.own_bytes if is_new else 0, held.pop_all())
            self.folder.make_folder(self.namespace_name)
        raise FileNotFoundError(errno.ENOENT, "its folders were removed again and again", str(self.path))

    def now(self) -> float:
        """Return the time in seconds by the filesystem's clock, which all hosts share, unlike their own clocks."""
        with contextlib.suppress(OSError):  # a read-only filesystem: this host's clock has to do
            self._touch(MARKER_NAME)
            self._ahead = self.folder.status(MARKER_NAME).st_mtime - time.time()
        return self.roughly_now()

    def roughly_now(self) -> float:
        """Return about the same as `now` without a call on the filesystem."""
        return time.time() + self._ahead

    def last_swept(self) -> float:
        """Return when a host last began to sweep, by the filesystem's clock.

        Raises:
            OSError: the time cannot be read.
        """
        return self.folder.status(SWEPT_NAME).st_mtime

    def note_sweep(self) -> None:
        """Tell the other hosts that this one sweeps now.

        Raises:
            OSError: the file cannot be touched.
        """
        self._touch(SWEPT_NAME)

    def namespace_names(self) -> list[str]:
        """Return the names of all namespaces' folders.

        Raises:
            OSError: the directory cannot be read.
        """
        return [name for name in self.folder.names() if _FINGERPRINT.fullmatch(name)]

    def own_bytes(self) -> int:
        """Return the bytes that the directory and its two files take on the filesystem."""
        total = self.folder.own_bytes
        for name in (MARKER_NAME, SWEPT_NAME):
            with contextlib.suppress(FileNotFoundError):
                total += self.folder.status(name).st_blocks * 512
        return total

    def _touch(self, name: str) -> None:
        descriptor = self.folder.open_file(name)
        try:
            os.utime(descriptor)
        finally:
            os.close(descriptor)


def shard_names(namespace: Folder, prefix: str) -> list[str]:
    """Return the names of a namespace's shards that begin with `prefix`.

    Raises:
        OSError: the folder cannot be read.
    """
    if len(prefix) == SHARD_DIGITS:
        return [prefix]
    return [name for name in namespace.names() if _SHARD.fullmatch(name) and name.startswith(prefix)]


def _take(path: Path) -> Folder:
    """Open the directory, create it if it is missing, and check that it is this user's and a tier's."""
    make_last_directory(path)
    folder = Folder.open(path)
    try:
        if folder.owner != os.geteuid():
            raise StoreUnavailableError(f"{path}: belongs to user {folder.owner}, not to {os.geteuid()}")
        content = _marker_of(folder)
        strange = next(_strangers_in(folder), None)
        if not content and strange is not None:
            content = _marker_of(folder)  # another host may have marked the directory meanwhile
        if content not in (b"", _CONTENT):
            raise StoreUnavailableError(f"{path}: {MARKER_NAME} is from another version of kvtier")
        if not content:
            if strange is not None:
                raise StoreUnavailableError(f"{path}: holds something else ('{one_line(strange, MAX_QUOTED)}')")
            _mark(folder)
        if folder.mode & 0o077:
            os.fchmod(folder.descriptor, FOLDER_MODE)
    except BaseException:
        folder.close()
        raise
    return folder


def _marker_of(folder: Folder) -> bytes:
    """Return the content of the marker file; empty if there is none."""
    try:
        return folder.read(MARKER_NAME, _MAX_MARKER_BYTES)
    except FileNotFoundError:
        return b""


def _strangers_in(folder: Folder) -> Iterator[str]:
    """Yield names that are not expected in a new, empty directory."""
    for name in folder.names():
        is_ours = name in (MARKER_NAME, SWEPT_NAME) and folder.is_own_file(name) and not folder.status(name).st_size
        if not is_ours and name != FOUND_BY_FSCK:
            yield name


def _mark(folder: Folder) -> None:
    """Write the marker file."""
    os.close(folder.open_file(SWEPT_NAME, os.O_WRONLY | os.O_CREAT))
    descriptor = folder.open_file(MARKER_NAME, os.O_WRONLY | os.O_CREAT)
    try:
        os.write(descriptor, _CONTENT)
    finally:
        os.close(descriptor)
