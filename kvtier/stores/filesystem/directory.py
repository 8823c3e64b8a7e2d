"""The directory that hosts share: whose it is, where a block's file is, and what time it is there.

DIR/kvtier.json                     says what this directory is; its time of change, when touched, is the clock
DIR/swept                           changed when some host last began to tidy up
DIR/<fingerprint>/                  one folder a namespace, 32 hexadecimal digits
DIR/<fingerprint>/<shard>/<key>     a block; 4,096 shards, 3 hexadecimal digits from a hash of the key
DIR/<fingerprint>/<shard>/.<x>.new  a block that is being written, or that a dead writer left
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
from kvtier.stores.slab.layout import rank_of

SHARD_DIGITS = 3
MARKER_NAME = "kvtier.json"
SWEPT_NAME = "swept"
UNFINISHED_SUFFIX = ".new"
_CONTENT = json.dumps({"kvtier": "one file a block", "version": 1}).encode()
_MAX_MARKER_BYTES = 4096
_ATTEMPTS = 4
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_SHARD = re.compile(rf"[0-9a-f]{{{SHARD_DIGITS}}}")
_BLOCK = re.compile(r"([0-9a-f]{2}){5,68}")


def shard_of(key: OffloadKey) -> str:
    """Return the shard of a key: even, whatever the keys look like."""
    return f"{xxhash.xxh3_64_intdigest(key) >> (64 - 4 * SHARD_DIGITS):0{SHARD_DIGITS}x}"


def is_block(name: str) -> bool:
    """Return whether a file's name is one that a block has."""
    return _BLOCK.fullmatch(name) is not None


def is_unfinished(name: str) -> bool:
    """Return whether a file's name is one that a block has while it is written."""
    return name.startswith(".") and name.endswith(UNFINISHED_SUFFIX)


class NewFile(NamedTuple):
    """A block that is being written; a context that lets go of its folder.

    Attributes:
        folder: where it is, held.
        name: one that nobody else uses.
        descriptor: open for writing; who asked for the file closes it.
        folder_bytes: what making the folder took; 0 if it was there.
        held: what is held.
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
    """A directory of one user, shared by hosts. Nothing is locked; threads may share it."""

    def __init__(self, path: Path, namespace: Namespace, folder: Folder) -> None:
        """Args: folder: the directory, held; closed by `close`."""
        self.path = path
        self.folder = folder
        self.namespace_name = namespace.fingerprint.hex()
        self._writer = secrets.token_hex(8)
        self._number = itertools.count()
        self._ahead = 0.0

    @classmethod
    def open(cls, path: Path, namespace: Namespace, mount_point: str = "/") -> SharedDirectory:
        """Make the directory if it is missing and its parent is there.

        Args:
            mount_point: what must be mounted for the directory to be the right one.

        Raises:
            StoreUnavailableError: of another owner, used for something else, or not usable at all.
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
        """Let go of the directory."""
        self.folder.close()

    def check_present(self) -> None:
        """Raise StoreUnavailableError if the directory was removed, or another one is in its place."""
        try:
            is_there = os.path.samestat(os.stat(self.path), os.fstat(self.folder.descriptor))
        except FileNotFoundError:
            is_there = False
        except OSError as error:
            raise StoreUnavailableError(f"{self.path}: {error.strerror}") from error
        if not is_there:
            raise StoreUnavailableError(f"{self.path}: the directory was removed while in use, or replaced")

    def namespace(self) -> Folder:
        """Hold the folder of this namespace; errors as `Folder.folder`."""
        return self.folder.folder(self.namespace_name)

    def begin_file(self, shard: str) -> NewFile:
        """Begin a file in a shard, whose folder is made if it is missing.

        Raises:
            OSError: it cannot be made, or something else has its name.
        """
        is_new = False
        for _ in range(_ATTEMPTS):  # a janitor removes folders that are empty
            with contextlib.suppress(FileNotFoundError), ExitStack() as held:
                namespace = held.enter_context(self.namespace())
                is_new = namespace.make_folder(shard) or is_new
                folder = held.enter_context(namespace.folder(shard))
                name = f".{self._writer}-{next(self._number)}{UNFINISHED_SUFFIX}"
                descriptor = folder.open_file(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                return NewFile(folder, name, descriptor, folder.own_bytes if is_new else 0, held.pop_all())
            self.folder.make_folder(self.namespace_name)
        raise FileNotFoundError(errno.ENOENT, "its folders are removed again and again", str(self.path))

    def now(self) -> float:
        """Return the time in seconds by the filesystem's clock: hosts need not agree on another."""
        with contextlib.suppress(OSError):  # read-only: our own clock has to do
            self._touch(MARKER_NAME)
            self._ahead = self.folder.status(MARKER_NAME).st_mtime - time.time()
        return self.roughly_now()

    def roughly_now(self) -> float:
        """Return what `now` would, without asking the filesystem."""
        return time.time() + self._ahead

    def last_swept(self) -> float:
        """Return when some host last began to tidy up.

        Raises:
            OSError: it cannot be read.
        """
        return self.folder.status(SWEPT_NAME).st_mtime

    def note_sweep(self) -> None:
        """Let the other hosts know that we tidy up.

        Raises:
            OSError: it cannot be noted.
        """
        self._touch(SWEPT_NAME)

    def namespace_names(self) -> list[str]:
        """Return what the folders of all namespaces are called.

        Raises:
            OSError: the directory cannot be read.
        """
        return [name for name in self.folder.names() if _FINGERPRINT.fullmatch(name)]

    def own_bytes(self) -> int:
        """Return the bytes that the directory and its own small files take."""
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
    """Return the names of a namespace's shards that begin so.

    Raises:
        OSError: it cannot be read.
    """
    if len(prefix) == SHARD_DIGITS:
        return [prefix]
    return [name for name in namespace.names() if _SHARD.fullmatch(name) and name.startswith(prefix)]


def _take(path: Path) -> Folder:
    """Hold the directory, made if it is missing; it is ours alone, and for this."""
    make_last_directory(path)
    folder = Folder.open(path, follow=rank_of(path.name) is None)
    try:
        if folder.owner != os.geteuid():
            raise StoreUnavailableError(f"{path}: belongs to user {folder.owner}, not to {os.geteuid()}")
        content = _marker_of(folder)
        strange = next(_strangers_in(folder), None)
        if not content and strange is not None:
            content = _marker_of(folder)  # another host may have been quicker
        if content not in (b"", _CONTENT):
            raise StoreUnavailableError(f"{path}: {MARKER_NAME} is of another version")
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
    """Return what the directory says it is; nothing if it does not."""
    try:
        return folder.read(MARKER_NAME, _MAX_MARKER_BYTES)
    except FileNotFoundError:
        return b""


def _strangers_in(folder: Folder) -> Iterator[str]:
    """Yield names that a directory has none of in which nothing was stored yet."""
    for name in folder.names():
        is_ours = name in (MARKER_NAME, SWEPT_NAME) and folder.is_own_file(name) and not folder.status(name).st_size
        if not is_ours and name != FOUND_BY_FSCK:
            yield name


def _mark(folder: Folder) -> None:
    """Let the directory say what it is."""
    os.close(folder.open_file(SWEPT_NAME, os.O_WRONLY | os.O_CREAT))
    descriptor = folder.open_file(MARKER_NAME, os.O_WRONLY | os.O_CREAT)
    try:
        os.write(descriptor, _CONTENT)
    finally:
        os.close(descriptor)
