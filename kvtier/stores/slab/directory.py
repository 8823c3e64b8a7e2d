"""The directory of a slab: its lock, its owner, the namespaces in it, and the bytes they take together.

`layout.py` has the names in it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from kvtier.errors import StoreError, StoreUnavailableError, describe
from kvtier.foreign_text import MOST_QUOTED, one_line
from kvtier.log import logger
from kvtier.namespace import Namespace
from kvtier.stores.mounts import check_mounted, make_last_directory
from kvtier.stores.own_files import FOLDER_MODE, FOUND_BY_FSCK, Folder, StrangerError
from kvtier.stores.slab.layout import DESCRIPTION_NAME, LOCK_NAME, is_file_of_namespace, is_fingerprint, rank_of
from kvtier.stores.slab.spare import cut_spare

MOST_DESCRIPTION_BYTES = 256 << 10
_MOST_LOCK_BYTES = 64
_SIGN = b" kvtier\n"
"""What a lock holds behind the pid: it shows that a directory without any namespace is ours, too."""
_LOCK_CONTENT = re.compile(rb"[0-9]{0,20}( kvtier)?\n?\0*")  # zeros: a power cut came before the pid did
_SECONDS_OF_A_LOOK = 0.1
"""Tools that ask who uses a directory hold its lock for a moment."""


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


def used_bytes(folder: Folder) -> int:
    """Return the bytes that a namespace's folder and our files in it take from the filesystem."""
    total = folder.own_bytes
    for name in filter(is_file_of_namespace, folder.names()):
        with contextlib.suppress(FileNotFoundError):
            total += folder.status(name).st_blocks * 512 if folder.is_own_file(name) else 0
    return total


class SlabDirectory:
    """A directory that this process alone uses, until `close` or its end.

    Attributes:
        path, namespace_path: for messages.
        namespace: the folder of this namespace, held.
    """

    def __init__(self, path: Path, namespace: Namespace, folder: Folder, lock_descriptor: int) -> None:
        """Args: folder: the directory; lock_descriptor: an open file that holds the lock; `close` closes both.

        Raises:
            OSError: the namespace's folder cannot be made or used; then both are closed.
        """
        self.path = path
        self.folder = folder
        self._lock_descriptor = lock_descriptor
        self._name = namespace.fingerprint.hex()
        self.namespace_path = path / self._name
        self._shortened: set[str] = set()
        try:
            self._delete_past()
            self.namespace = self._enter_namespace(namespace.describe())
        except BaseException:
            os.close(lock_descriptor)
            folder.close()
            raise

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
            return cls(path, namespace, *_take(path))
        except StrangerError as error:
            raise StoreUnavailableError(f"{error.filename}: {describe(error)}") from error
        except OSError as error:
            raise StoreUnavailableError(f"{path}: {describe(error)}") from error

    def close(self) -> None:
        """Note the time of the last use and release the lock."""
        try:
            descriptor = self.namespace.open_file(DESCRIPTION_NAME, os.O_RDWR)
            try:
                os.utime(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            logger.warning("%s: cannot note its last use: %s", self.namespace_path, error.strerror)
        self.namespace.close()
        self.folder.close()
        os.close(self._lock_descriptor)

    def check_present(self) -> None:
        """Check that the directory was not removed or replaced under us.

        Raises:
            StoreUnavailableError: it was, and must be opened anew.
            StoreError: it cannot be looked at; a disk that fails may be back with all that it has.
        """
        try:
            is_held = os.fstat(self._lock_descriptor).st_nlink > 0
            is_ours = self.folder.holds(self._name, self.namespace)
        except OSError as error:
            kind = StoreUnavailableError if error.errno == errno.ESTALE else StoreError
            raise kind(f"{self.path}: {describe(error)}") from error
        if not (is_held and is_ours):
            raise StoreUnavailableError(f"{self.path}: the directory was removed while in use, or some of it replaced")

    def give_way(self, own_bytes: int, capacity: int) -> None:
        """Shorten, then delete other namespaces, least recently used first, until all keep to `capacity`."""
        sizes = self._other_sizes()
        total = own_bytes + sum(sizes.values())
        for name in sizes:
            if total > capacity and self._shorten(name):
                total -= sizes[name]
                sizes[name] = self._size_of(name)
                total += sizes[name]
        for name in sizes:
            if total <= capacity:
                return
            self._delete(name, "another namespace needs its space")
            total += self._size_of(name) - sizes[name]

    def has_room(self, own_bytes: int, capacity: int) -> bool:
        """Return whether so many bytes keep to `capacity` beside the blocks of other namespaces.

        What others took ahead of their blocks gives way, if it has to.
        """
        others = self._other_sizes()
        if own_bytes + sum(others.values()) <= capacity:
            return True
        shortened = [self._shorten(name) for name in others]
        return any(shortened) and own_bytes + sum(map(self._size_of, others)) <= capacity

    def _shorten(self, name: str) -> bool:
        """Let another namespace give back what lies behind its last block; False if it did so before."""
        if name in self._shortened:
            return False
        self._shortened.add(name)
        with contextlib.suppress(OSError), self.folder.folder(name) as other:  # damaged, it is deleted as it is
            cut_spare(other)
        return True

    def _delete_past(self) -> None:
        """Delete namespaces that no engine can use again."""
        for name in namespaces_in(self.folder):
            if name == self._name or not is_past(self.folder, name):
                continue
            try:
                self._delete(name, "it can never be used again")
            except OSError as error:  # it is in nobody's way
                logger.warning("%s: cannot be deleted: %s", self.path / name, error.strerror)

    def _delete(self, name: str, why: str) -> None:
        """Delete another namespace and say so."""
        left = delete_namespace_in(self.folder, name)
        logger.info("%s: deleted, %s", self.path / name, why)
        if left:
            logger.warning(
                "%s: its folder stays, %s in it is not kvtier's", self.path / name, one_line(left[0], MOST_QUOTED)
            )

    def _enter_namespace(self, description: str) -> Folder:
        """Make this namespace's folder, say in it what it is, and hold it."""
        self.folder.make_folder(self._name)
        namespace = self.folder.folder(self._name)
        try:
            if namespace.mode & 0o077:
                os.fchmod(namespace.descriptor, FOLDER_MODE)
            descriptor = namespace.open_file(DESCRIPTION_NAME, os.O_RDWR | os.O_CREAT)
            try:
                _put(descriptor, description.encode())
                os.utime(descriptor)
            finally:
                os.close(descriptor)
        except BaseException:
            namespace.close()
            raise
        return namespace

    def _other_sizes(self) -> dict[str, int]:
        """Return the other namespaces and their bytes, least recently used first."""
        names = [name for name in namespaces_in(self.folder) if name != self._name]
        return {name: self._size_of(name) for name in sorted(names, key=lambda name: last_use(self.folder, name))}

    def _size_of(self, name: str) -> int:
        """Return the bytes that another namespace takes; 0 if it is gone."""
        try:
            with self.folder.folder(name) as other:
                return used_bytes(other)
        except (FileNotFoundError, StrangerError):
            return 0


def _take(path: Path) -> tuple[Folder, int]:
    """Make `path` ours: private and locked. Returns the directory and the lock's descriptor."""
    if rank_of(path.name) is not None and path.parent.parent.is_dir() and not os.path.lexists(path):
        make_last_directory(path.parent)
        with Folder.open(path.parent) as shares:
            _check_ours(shares)
    make_last_directory(path)
    folder = open_slab(path)
    try:
        _check_ours(folder)
        if folder.mode & 0o077:
            os.fchmod(folder.descriptor, FOLDER_MODE)
        descriptor = folder.open_file(LOCK_NAME, os.O_RDWR | os.O_CREAT)
        try:
            take_lock(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
    except BaseException:
        folder.close()
        raise
    return folder, descriptor


def _check_ours(folder: Folder) -> None:
    """Raise StoreUnavailableError for a directory of somebody else, before anything in it is changed."""
    if folder.owner != os.geteuid():
        raise StoreUnavailableError(f"{folder.path}: belongs to user {folder.owner}, not to {os.geteuid()}")
    strange = next(strangers_of(folder), None)
    if strange is not None:
        found = one_line(strange, MOST_QUOTED)
        raise StoreUnavailableError(
            f"{folder.path}: neither empty nor a slab, it holds '{found}'; name a directory of its own"
        )


def strangers_of(folder: Folder) -> Iterator[str]:
    """Yield names that show a directory to be no slab; none if it is one, or empty, or the parent of ranks' slabs.

    What is in a directory counts, not what it is called: the lock has our sign, a folder holds a slab's files. Others'
    files are let be where that, or a namespace that describes itself, shows that somebody put them into a slab.
    """
    names = [name for name in folder.names() if name != FOUND_BY_FSCK]
    lock = _lock_of(folder) if LOCK_NAME in names else b""
    if lock is None:
        yield LOCK_NAME
    elif not lock.endswith(_SIGN) and not any(_describes_itself(folder, name) for name in names):
        yield from (name for name in names if name != LOCK_NAME and not _is_part(folder, name))


def _lock_of(folder: Folder) -> bytes | None:
    """Return what the directory's lock holds; None if it is not one of a slab, which is empty or holds a pid."""
    try:
        content = folder.read(LOCK_NAME, _MOST_LOCK_BYTES)
    except OSError:
        return None
    return content if _LOCK_CONTENT.fullmatch(content) else None


def pid_in_lock(descriptor: int) -> int | None:
    """Return whose pid an open lock holds; None if it holds none."""
    try:
        return int(os.pread(descriptor, _MOST_LOCK_BYTES, 0).partition(b" ")[0])
    except ValueError:
        return None


def _describes_itself(folder: Folder, name: str) -> bool:
    """Return whether a folder is a namespace that says so, or a rank's directory with one."""
    try:
        if is_fingerprint(name):
            with folder.folder(name) as namespace:
                described = json.loads(namespace.read(DESCRIPTION_NAME, MOST_DESCRIPTION_BYTES))
                return bool({"epoch", "format", "identity"} <= described.keys())
        if rank_of(name) is not None:
            with folder.folder(name, may_be_mounted=True) as share:
                return any(_describes_itself(share, one) for one in share.names() if is_fingerprint(one))
    except (OSError, ValueError, AttributeError, RecursionError):
        pass
    return False


def _is_part(folder: Folder, name: str) -> bool:
    """Return whether a folder is, or was about to be, a namespace or a rank's directory."""
    if rank_of(name) is None:
        return is_namespace(folder, name)
    try:
        with folder.folder(name, may_be_mounted=True) as share:
            return next(strangers_of(share), None) is None
    except OSError:
        return False


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
                holder = pid_in_lock(descriptor)
                raise StoreUnavailableError(
                    f"{path}: held by another process" + ("" if holder is None else f" (pid {holder})")
                ) from error
        time.sleep(0.01)  # in the I/O process or a command, never on the engine's thread
    with contextlib.suppress(OSError):  # a full disk costs the name of the holder, not the lock
        _put(descriptor, str(os.getpid()).encode() + _SIGN)


def _put(descriptor: int, content: bytes) -> None:
    """Make `content` all that a small file holds: in place, so that a full disk or a kill leaves what was there."""
    if os.pread(descriptor, len(content) + 1, 0) != content:
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))


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
            return bool(json.loads(folder.read(DESCRIPTION_NAME, MOST_DESCRIPTION_BYTES))["epoch"])
    except FileNotFoundError:
        return True
    except OSError:
        return False
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return True
