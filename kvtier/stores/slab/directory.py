"""The directory of a slab: its lock, its owner, its namespaces, and the bytes that they take together.

`layout.py` lists its files.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from kvtier.errors import StoreError, StoreUnavailableError, describe
from kvtier.foreign_text import MAX_QUOTED, one_line
from kvtier.log import logger
from kvtier.namespace import Namespace
from kvtier.stores.mounts import check_mounted, make_last_directory
from kvtier.stores.own_files import FOLDER_MODE, FOUND_BY_FSCK, Folder, StrangerError
from kvtier.stores.slab.layout import DESCRIPTION_NAME, HEADERS_NAME, LOCK_NAME, SEGMENT_BYTES, is_fingerprint, rank_of
from kvtier.stores.slab.lock import SIGN, read_lock, take_lock
from kvtier.stores.slab.namespaces import (
    cut_spare,
    delete_namespace_in,
    differing_facts,
    is_namespace,
    is_past,
    last_use,
    namespaces_in,
    open_slab,
    overwrite,
    read_fields,
    used_bytes,
)


class SlabDirectory:
    """A directory that only this process uses, until `close` or the process's end.

    Attributes:
        path, namespace_path: for messages.
        namespace: the open folder of this namespace.
    """

    def __init__(
        self, path: Path, namespace: Namespace, folder: Folder, lock_descriptor: int, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        """Args:
        folder: the open directory; `close` closes it.
        lock_descriptor: the open, locked lock file; `close` closes it.
        segment_bytes: most bytes per data file, in every namespace.

        Raises:
            OSError: the namespace's folder cannot be created or used; `folder` and `lock_descriptor` are then closed.
        """
        self.path = path
        self.folder = folder
        self._lock_descriptor = lock_descriptor
        self._segment_bytes = segment_bytes
        self._name = namespace.fingerprint.hex()
        self.namespace_path = path / self._name
        self._headers_name = f"{self._name}/{HEADERS_NAME}"
        self._shortened: set[str] = set()
        try:
            self._delete_past()
            is_new = self._name not in self.folder.names()
            self.namespace = self._enter_namespace(namespace.describe())
            if is_new:
                self._say_what_differs(namespace)
        except BaseException:
            os.close(lock_descriptor)
            folder.close()
            raise

    @classmethod
    def open(
        cls, path: Path, namespace: Namespace, mount_point: str = "/", segment_bytes: int = SEGMENT_BYTES
    ) -> SlabDirectory:
        """Create the directory if it is missing, and lock it.

        Args:
            mount_point: a filesystem must be mounted here, see `check_mounted`.
            segment_bytes: most bytes per data file, in every namespace.

        Raises:
            StoreUnavailableError: another process holds the lock, the directory belongs to another user or is not a
                slab, or it cannot be used.
        """
        check_mounted(path, mount_point)
        try:
            return cls(path, namespace, *_take(path), segment_bytes)
        except StrangerError as error:
            raise StoreUnavailableError(f"{error.filename}: {describe(error)}") from error
        except OSError as error:
            raise StoreUnavailableError(f"{path}: {describe(error)}") from error

    def close(self) -> None:
        """Record the time of the last use, and release the lock."""
        try:
            descriptor = self.namespace.open_file(DESCRIPTION_NAME, os.O_RDWR)
            try:
                os.utime(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            logger.warning("%s: cannot record the time of last use: %s", self.namespace_path, error.strerror)
        self.namespace.close()
        self.folder.close()
        os.close(self._lock_descriptor)

    def check_present(self, headers: os.stat_result) -> None:
        """Check that the directory, the namespace's folder and its file of headers were not removed or replaced.

        Args:
            headers: status of the open file of headers. Comparing it with its name checks the folder, too. This runs
                before each job, and a small job takes no longer than a few such system calls.

        Raises:
            StoreUnavailableError: it was. The store must be opened anew.
            StoreError: this is unknown, because a call failed. The disk may work again later, with all its blocks.
        """
        try:
            is_held = os.fstat(self._lock_descriptor).st_nlink > 0
            found = os.stat(self._headers_name, dir_fd=self.folder.descriptor, follow_symlinks=False)
            is_ours = (found.st_ino, found.st_dev) == (headers.st_ino, headers.st_dev)
        except (FileNotFoundError, NotADirectoryError):
            is_held = is_ours = False
        except OSError as error:
            kind = StoreUnavailableError if error.errno == errno.ESTALE else StoreError
            raise kind(f"{self.path}: {describe(error)}") from error
        if not (is_held and is_ours):
            raise StoreUnavailableError(f"{self.path}: the directory was removed while in use, or some of it replaced")

    def give_way(self, own_bytes: int, capacity: int) -> None:
        """Make room for `own_bytes` of this namespace within `capacity`.

        Other namespaces give back space without blocks first. Then they are deleted, least recently used first.
        """
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
        """Return whether `own_bytes` fit into `capacity` beside the blocks of other namespaces.

        If needed, other namespaces give back space without blocks.
        """
        others = self._other_sizes()
        if own_bytes + sum(others.values()) <= capacity:
            return True
        shortened = [self._shorten(name) for name in others]
        return any(shortened) and own_bytes + sum(map(self._size_of, others)) <= capacity

    def _shorten(self, name: str) -> bool:
        """Cut the space after another namespace's last block; return False if that was done before."""
        if name in self._shortened:
            return False
        self._shortened.add(name)
        with contextlib.suppress(OSError), self.folder.folder(name) as other:  # if it is damaged, deletion comes next
            cut_spare(other, self._segment_bytes)
        return True

    def _delete_past(self) -> None:
        """Delete namespaces of past epochs, which no engine can use again."""
        for name in namespaces_in(self.folder):
            if name == self._name or not is_past(self.folder, name):
                continue
            try:
                self._delete(name, "it can never be used again")
            except OSError as error:  # not needed for the start
                logger.warning("%s: cannot be deleted: %s", self.path / name, error.strerror)

    def _delete(self, name: str, why: str) -> None:
        """Delete another namespace, and log why."""
        left = delete_namespace_in(self.folder, name)
        logger.info("%s: deleted, %s", self.path / name, why)
        if left:
            logger.warning(
                "%s: folder kept, %s in it is not kvtier's",
                self.path / name,
                one_line(left[0], MAX_QUOTED),
            )

    def _say_what_differs(self, namespace: Namespace) -> None:
        """Log why the blocks of the namespace that was used last are not found in this new one."""
        others = [name for name in namespaces_in(self.folder) if name != self._name]
        latest = max(others, key=lambda name: last_use(self.folder, name), default=None)
        facts = differing_facts(self.folder, latest, namespace) if latest is not None else []
        if facts:
            logger.warning(
                "%s: begins without blocks; those of %s there are not found, since these differ: %s",
                self.path,
                latest,
                one_line(", ".join(facts), MAX_QUOTED),
            )

    def _enter_namespace(self, description: str) -> Folder:
        """Create this namespace's folder, write its description, and return the open folder."""
        self.folder.make_folder(self._name)
        namespace = self.folder.folder(self._name)
        try:
            if namespace.mode & 0o077:
                os.fchmod(namespace.descriptor, FOLDER_MODE)
            descriptor = namespace.open_file(DESCRIPTION_NAME, os.O_RDWR | os.O_CREAT)
            try:
                overwrite(descriptor, description.encode())
                os.utime(descriptor)
            finally:
                os.close(descriptor)
        except BaseException:
            namespace.close()
            raise
        return namespace

    def _other_sizes(self) -> dict[str, int]:
        """Return the bytes of each other namespace, least recently used first."""
        names = [name for name in namespaces_in(self.folder) if name != self._name]
        return {name: self._size_of(name) for name in sorted(names, key=lambda name: last_use(self.folder, name))}

    def _size_of(self, name: str) -> int:
        """Return the bytes that another namespace takes on the filesystem; 0 if it was deleted."""
        try:
            with self.folder.folder(name) as other:
                return used_bytes(other)
        except (FileNotFoundError, StrangerError):
            return 0


def _take(path: Path) -> tuple[Folder, int]:
    """Create `path` if needed, check it, make it private and lock it; return the directory and the lock's
    descriptor.
    """
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
    """Raise StoreUnavailableError if the directory is another user's or not a slab; change nothing in it."""
    if folder.owner != os.geteuid():
        raise StoreUnavailableError(f"{folder.path}: belongs to user {folder.owner}, not to {os.geteuid()}")
    strange = next(strangers_of(folder), None)
    if strange is not None:
        found = one_line(strange, MAX_QUOTED)
        raise StoreUnavailableError(
            f"{folder.path}: neither empty nor a slab, it holds '{found}'; name a directory of its own"
        )


def strangers_of(folder: Folder) -> Iterator[str]:
    """Yield names that show that a directory is not a slab; none for a slab, an empty directory, or ranks' directories.

    Contents decide, not names: a lock file contains kvtier's sign, a namespace's folder contains a slab's files. If the
    sign or a valid description shows that the directory is a slab, other files in it are allowed and left alone.
    """
    names = [name for name in folder.names() if name != FOUND_BY_FSCK]
    lock = read_lock(folder) if LOCK_NAME in names else b""
    if lock is None:
        yield LOCK_NAME
    elif not lock.endswith(SIGN) and not any(_describes_itself(folder, name) for name in names):
        yield from (name for name in names if name != LOCK_NAME and not _is_part(folder, name))


def _describes_itself(folder: Folder, name: str) -> bool:
    """Return whether a folder is a namespace with a valid description, or a rank's directory with one."""
    try:
        if is_fingerprint(name):
            with folder.folder(name) as namespace:
                return bool(read_fields(namespace))
        if rank_of(name) is not None:
            with folder.folder(name, may_be_mounted=True) as share:
                return any(_describes_itself(share, one) for one in share.names() if is_fingerprint(one))
    except (OSError, ValueError):
        pass
    return False


def _is_part(folder: Folder, name: str) -> bool:
    """Return whether a folder is a namespace or a rank's directory, possibly still empty."""
    if rank_of(name) is None:
        return is_namespace(folder, name)
    try:
        with folder.folder(name, may_be_mounted=True) as share:
            return next(strangers_of(share), None) is None
    except OSError:
        return False
