"""The directory of a slab: its lock, its owner, the namespaces in it, and the bytes they take together.

DIR/lock                        held (flock) as long as a process uses the directory; names its pid
DIR/<fingerprint>/              one folder a namespace, 32 hexadecimal digits
    namespace.json              what the fingerprint stands for; its time of change is the last use
    headers, data-00000 ...     see `headers.py` and `segments.py`
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from kvtier.errors import StoreUnavailableError
from kvtier.namespace import Namespace
from kvtier.stores.slab.mounts import check_mounted
from kvtier.stores.slab.spare import cut_spare

logger = logging.getLogger(__name__)

LOCK_NAME = "lock"
DESCRIPTION_NAME = "namespace.json"
DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_SHARE = re.compile(r"dp\d+")
"""A data-parallel engine's directory, made within the one that users name."""
_SECONDS_OF_A_LOOK = 0.1
"""Tools that ask who uses a directory hold its lock for a moment."""
_SLAB_FILE = re.compile(r"namespace\.json|headers|data-\d+")


def open_private(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open a file that only its owner may read; symbolic links are refused. Returns a descriptor."""
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)


def used_bytes(folder: Path) -> int:
    """Return the bytes that a folder and the files in it take from the filesystem."""
    total = folder.stat().st_blocks * 512
    for path in folder.iterdir():
        total += path.lstat().st_blocks * 512
    return total


class SlabDirectory:
    """A directory that this process alone uses, until `close` or its end."""

    def __init__(self, path: Path, namespace: Namespace, lock_descriptor: int) -> None:
        """Args: lock_descriptor: an open file that holds the lock; closed by `close`."""
        self.path = path
        self._lock_descriptor = lock_descriptor
        self.namespace_path = path / namespace.fingerprint.hex()
        self._description = namespace.describe()
        self._shortened: set[Path] = set()

    @classmethod
    def open(cls, path: Path, namespace: Namespace, mount_point: str = "/") -> SlabDirectory:
        """Make the directory if it is missing, and take it.

        Args:
            mount_point: what must be mounted for the directory to be the right one.

        Raises:
            StoreUnavailableError: held by another process, of another owner, not a slab, or not usable at all.
        """
        check_mounted(path, mount_point)
        try:
            lock_descriptor = _take(path)
        except OSError as error:
            raise StoreUnavailableError(f"{path}: {error.strerror}") from error
        directory = cls(path, namespace, lock_descriptor)
        try:
            directory._enter_namespace()
        except OSError as error:
            directory.close()
            raise StoreUnavailableError(f"{path}: {error.strerror}") from error
        return directory

    def close(self) -> None:
        """Note the time of the last use and release the lock."""
        try:
            os.utime(self.namespace_path / DESCRIPTION_NAME)
        except OSError as error:
            logger.warning("%s: cannot note its last use: %s", self.namespace_path, error.strerror)
        os.close(self._lock_descriptor)

    def check_present(self) -> None:
        """Raise StoreUnavailableError if the directory was removed under us: it must be made anew."""
        if os.fstat(self._lock_descriptor).st_nlink == 0:
            raise StoreUnavailableError(f"{self.path}: the directory was removed while in use")

    def others(self) -> list[Path]:
        """Return the folders of other namespaces, least recently used first."""
        return sorted(self._other_folders(), key=last_use)

    def give_way(self, own_bytes: int, capacity: int) -> None:
        """Shorten, then delete other namespaces, least recently used first, until all keep to `capacity`."""
        others = self.others()
        sizes = {folder: used_bytes(folder) for folder in others}
        total = own_bytes + sum(sizes.values())
        for folder in others:
            if total > capacity and self._shorten(folder):
                total -= sizes[folder]
                sizes[folder] = used_bytes(folder)
                total += sizes[folder]
        for folder in others:
            if total <= capacity:
                return
            delete_folder(folder)
            total -= sizes[folder]
            logger.info("%s: deleted, another namespace needs its space", folder)

    def has_room(self, own_bytes: int, capacity: int) -> bool:
        """Return whether so many bytes keep to `capacity` beside the blocks of other namespaces.

        What others took ahead of their blocks gives way, if it has to.
        """
        others = self.others()
        if own_bytes + sum(map(used_bytes, others)) <= capacity:
            return True
        shortened = [self._shorten(folder) for folder in others]
        return any(shortened) and own_bytes + sum(map(used_bytes, others)) <= capacity

    def _shorten(self, folder: Path) -> bool:
        """Let another namespace give back what lies behind its last block; False if it did so before."""
        if folder in self._shortened:
            return False
        self._shortened.add(folder)
        with contextlib.suppress(OSError):  # it may be damaged: it is deleted as it is
            cut_spare(folder)
        return True

    def _enter_namespace(self) -> None:
        """Make this namespace's folder, and delete folders that no engine can use again."""
        for folder in self._other_folders():
            if is_past(folder):
                delete_folder(folder)
                logger.info("%s: deleted, it can never be used again", folder)
        self.namespace_path.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
        descriptor = open_private(self.namespace_path / DESCRIPTION_NAME)
        try:
            _put(descriptor, self._description.encode())
            os.utime(descriptor)
        finally:
            os.close(descriptor)

    def _other_folders(self) -> Iterator[Path]:
        for path in self.path.iterdir():
            if path != self.namespace_path and is_namespace(path):
                yield path


def _take(path: Path) -> int:
    """Make `path` ours: private and locked. Returns the lock's descriptor."""
    if _SHARE.fullmatch(path.name) and path.parent.parent.is_dir():
        path.parent.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
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
    if stat.S_IMODE(status.st_mode) & 0o077:
        names = os.listdir(path)
        if names and LOCK_NAME not in names:
            raise StoreUnavailableError(f"{path}: others may open it, and it is neither empty nor a slab")
        path.chmod(DIRECTORY_MODE)
    descriptor = open_private(path / LOCK_NAME)
    try:
        take_lock(path, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def take_lock(path: Path, descriptor: int) -> None:
    """Lock `descriptor`, the open lock file of `path`, and write our pid into it.

    Raises:
        StoreUnavailableError: another process holds it.
    """
    deadline = time.monotonic() + _SECONDS_OF_A_LOOK
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            if time.monotonic() > deadline:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
                raise StoreUnavailableError(
                    f"{path}: held by another process" + (f" (pid {holder})" if holder else "")
                ) from error
        time.sleep(0.01)  # in the I/O process or a command, never on the engine's thread
    with contextlib.suppress(OSError):  # a full disk costs the name of the holder, not the lock
        _put(descriptor, f"{os.getpid()}\n".encode())


def _put(descriptor: int, content: bytes) -> None:
    """Make `content` all that a small file holds: in place, so that a full disk or a kill leaves what was there."""
    if os.pread(descriptor, len(content) + 1, 0) != content:
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))


def is_namespace(folder: Path) -> bool:
    """Return whether a folder holds a slab, a part of one, or nothing; a stranger's folder is never touched."""
    if not _FINGERPRINT.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
        return False
    names = os.listdir(folder)
    return not names or any(map(_SLAB_FILE.fullmatch, names))


def delete_folder(folder: Path) -> None:
    """Delete a namespace; what somebody else put into its folder stays there.

    Raises:
        OSError: it cannot be deleted, or not all of it.
    """
    strangers = False
    for path in list(folder.iterdir()):
        if not _SLAB_FILE.fullmatch(path.name):
            strangers = True
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if strangers:
        logger.warning("%s: its folder stays, there are files in it that are not kvtier's", folder)
    else:
        folder.rmdir()


def last_use(folder: Path) -> float:
    """Return when a namespace was last opened or closed; 0 for one without a description."""
    try:
        return (folder / DESCRIPTION_NAME).stat().st_mtime
    except OSError:
        return 0.0


def is_past(folder: Path) -> bool:
    """Return whether a folder is of an epoch that has ended, or an unfinished one; not one that cannot be read."""
    try:
        description = json.loads((folder / DESCRIPTION_NAME).read_bytes())
        return bool(description["epoch"])
    except FileNotFoundError:
        return True
    except OSError:
        return False
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return True
