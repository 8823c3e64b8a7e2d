"""The directory that hosts share: whose it is, where a block's file is, and what time it is there.

DIR/kvtier.json                     says what this directory is; its time of change, when touched, is the clock
DIR/swept                           changed when some host last began to tidy up
DIR/<fingerprint>/                  one folder a namespace, 32 hexadecimal digits
DIR/<fingerprint>/<shard>/<key>     a block; 4,096 shards, 3 hexadecimal digits from a hash of the key
DIR/<fingerprint>/<shard>/.<x>.new  a block that is being written, or that a dead writer left
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import stat
import time
from pathlib import Path

import xxhash

from kvtier.errors import StoreUnavailableError
from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.stores.slab.mounts import check_mounted

SHARD_DIGITS = 3
MARKER_NAME = "kvtier.json"
SWEPT_NAME = "swept"
UNFINISHED_SUFFIX = ".new"
DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
_CONTENT = json.dumps({"kvtier": "one file a block", "version": 1}).encode()
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


class SharedDirectory:
    """A directory of one user, shared by hosts. Nothing is locked; threads may share it."""

    def __init__(self, path: Path, namespace: Namespace) -> None:
        self.path = path
        self.namespace_path = path / namespace.fingerprint.hex()
        self._prefix = f"{self.namespace_path}/"
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
            _take(path)
        except OSError as error:
            raise StoreUnavailableError(f"{path}: {error.strerror}") from error
        directory = cls(path, namespace)
        directory.now()
        return directory

    def block_path(self, key: OffloadKey, shard: str) -> str:
        """Return the place of a block."""
        return f"{self._prefix}{shard}/{key.hex()}"

    def unfinished_path(self, shard: str) -> str:
        """Return a name that nobody else uses, beside the blocks of a shard."""
        return f"{self._prefix}{shard}/.{self._writer}-{next(self._number)}{UNFINISHED_SUFFIX}"

    def make_shard(self, shard: str) -> None:
        """Make the folder of a shard, and the namespace's.

        Raises:
            StoreUnavailableError: the directory itself is gone: removed, or not mounted any more.
            OSError: they cannot be made.
        """
        for _ in range(3):  # a janitor removes folders that are empty
            with contextlib.suppress(FileExistsError):
                try:
                    self.namespace_path.mkdir(mode=DIRECTORY_MODE)
                except FileNotFoundError as error:
                    raise StoreUnavailableError(f"{self.path}: the directory was removed while in use") from error
            with contextlib.suppress(FileNotFoundError):
                (self.namespace_path / shard).mkdir(mode=DIRECTORY_MODE, exist_ok=True)
                return

    def now(self) -> float:
        """Return the time in seconds by the filesystem's clock: hosts need not agree on another."""
        marker = self.path / MARKER_NAME
        with contextlib.suppress(OSError):  # read-only: our own clock has to do
            os.utime(marker)
            self._ahead = marker.stat().st_mtime - time.time()
        return self.roughly_now()

    def roughly_now(self) -> float:
        """Return what `now` would, without asking the filesystem."""
        return time.time() + self._ahead

    def last_swept(self) -> float:
        """Return when some host last began to tidy up.

        Raises:
            OSError: it cannot be read.
        """
        return (self.path / SWEPT_NAME).stat().st_mtime

    def note_sweep(self) -> None:
        """Let the other hosts know that we tidy up.

        Raises:
            OSError: it cannot be noted.
        """
        os.utime(self.path / SWEPT_NAME)

    def namespaces(self) -> list[Path]:
        """Return the folders of all namespaces.

        Raises:
            OSError: the directory cannot be read.
        """
        with os.scandir(self.path) as entries:
            return [
                Path(entry.path)
                for entry in entries
                if _FINGERPRINT.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            ]


def shards_in(namespace_path: Path, prefix: str) -> list[Path]:
    """Return the folders of a namespace's shards whose names begin so; none if the namespace is gone.

    Raises:
        OSError: it cannot be read.
    """
    if len(prefix) == SHARD_DIGITS:
        return [namespace_path / prefix]
    try:
        names = os.listdir(namespace_path)
    except FileNotFoundError:
        return []
    return [namespace_path / name for name in names if _SHARD.fullmatch(name) and name.startswith(prefix)]


def _take(path: Path) -> None:
    """Make sure that the directory exists, is ours alone, and is for this."""
    try:
        path.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
    except FileNotFoundError as error:
        raise StoreUnavailableError(
            f"{path}: {path.parent} does not exist; kvtier makes only the last directory of a path, so that it never"
            " fills the disk below a filesystem that is not mounted"
        ) from error
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise StoreUnavailableError(f"{path}: belongs to user {status.st_uid}, not to {os.geteuid()}")
    marker = path / MARKER_NAME
    try:
        content = marker.read_bytes()
    except FileNotFoundError:
        content = b""
        others = [name for name in os.listdir(path) if name not in (MARKER_NAME, SWEPT_NAME)]
        if others and not marker.exists():  # another host may have been quicker
            raise StoreUnavailableError(f"{path}: holds something else ({others[0]})") from None
    if content != _CONTENT:
        if content:
            raise StoreUnavailableError(f"{path}: {MARKER_NAME} is of another version")
        swept = path / SWEPT_NAME
        os.close(os.open(swept, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE))
        descriptor = os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
        try:
            os.write(descriptor, _CONTENT)
        finally:
            os.close(descriptor)
    if stat.S_IMODE(status.st_mode) & 0o077:
        path.chmod(DIRECTORY_MODE)
