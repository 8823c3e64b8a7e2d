"""Opens files and folders in a tier's directory, where others could have put something else. No other module does.

A tier's directory is held open by a descriptor. Everything below it is opened by one name relative to a descriptor, so
that nobody can exchange a folder on the way. Links are never followed, and opening never blocks. Anything that is not a
plain file or folder of the directory's owner, or that is a mount point, is a *stranger*: it is not read, changed or
deleted, whatever its name. Links are followed only in a path that a user has configured.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Self

FOLDER_MODE = 0o700
FILE_MODE = 0o600
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_MOUNT_ID = b"mnt_id:"
_STRANGE_ERRORS = frozenset({errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP})
"""Errors of opening a link, a folder, a pipe, a device or a socket instead of a file."""
_SAID = {stat.S_IFDIR: "Is a directory", stat.S_IFLNK: "symbolic links are not followed", stat.S_IFIFO: "a pipe"}
LARGEST_NAMED_FILE = 1 << 20
FOUND_BY_FSCK = "lost+found"
"""mkfs creates it at the top of a filesystem; it holds nobody's data."""


class StrangerError(OSError):
    """Something that is not kvtier's has the name of one of its files. It was left alone."""

    def __init__(self, why: str, path: str | os.PathLike[str]) -> None:
        super().__init__(errno.EPERM, why, os.fspath(path))


class Folder:
    """An open directory; a context manager that closes it. Threads may share it.

    Attributes:
        path: for messages only. The descriptor stays on this directory even if it is renamed.
        descriptor: open until the context ends, or `close`.
        owner: user id of the directory; all of kvtier's files in it must have it, too.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        """Args: descriptor: of the directory; `close` closes it."""
        self.path = path
        self.descriptor = descriptor
        self._status = os.fstat(descriptor)
        self._mount = _mount_of(descriptor)
        self.owner = self._status.st_uid

    @classmethod
    def open(cls, path: Path, follow: bool = True) -> Self:
        """Open the directory at a path that a user has configured.

        Args:
            follow: whether the last part of the path may be a link; the other parts may be links anyway.

        Raises:
            StrangerError: the last part is a link, and `follow` is False.
            OSError: the directory cannot be opened.
        """
        try:
            return cls(path, os.open(path, _FOLDER | (0 if follow else os.O_NOFOLLOW)))
        except NotADirectoryError:
            if follow or not path.is_symlink():
                raise
            raise StrangerError("a symbolic link, and the name is one that kvtier gives to folders", path) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)

    @property
    def mode(self) -> int:
        """The directory's permissions when it was opened."""
        return stat.S_IMODE(self._status.st_mode)

    @property
    def own_bytes(self) -> int:
        """Bytes that the directory itself takes on the filesystem, without its files."""
        return os.fstat(self.descriptor).st_blocks * 512

    def folder(self, name: str, may_be_mounted: bool = False) -> Folder:
        """Open a folder in this directory.

        Args:
            may_be_mounted: whether the folder may be a mount point.

        Raises:
            StrangerError: it is a link, a file or another user's, or it is a mount point and may not be one.
            OSError: the folder cannot be opened.
        """
        try:
            found = Folder(self.path / name, os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=self.descriptor))
        except OSError as error:
            raise self._translated(error, name) from error
        why = f"belongs to user {found.owner}" if found.owner != self.owner else ""
        is_mounted = found._mount != self._mount or found._status.st_dev != self._status.st_dev
        if is_mounted and not may_be_mounted:
            why = "another directory is mounted here"
        if why:
            found.close()
            raise StrangerError(why, found.path)
        return found

    def make_folder(self, name: str) -> bool:
        """Create a folder with mode 0700; return False if the name exists.

        Raises:
            OSError: the folder cannot be created; FileNotFoundError: this directory was removed.
        """
        try:
            os.mkdir(name, FOLDER_MODE, dir_fd=self.descriptor)
        except FileExistsError:
            return False
        return True

    def open_file(self, name: str, flags: int = os.O_RDONLY) -> int:
        """Open a plain file of this directory's owner; return its descriptor.

        Args:
            flags: of `os.open`. A file with a second hard link is not opened for writing: the other name would change.

        Raises:
            StrangerError: something else has this name.
            OSError: the file cannot be opened.
        """
        try:
            descriptor = os.open(name, flags | _FILE, FILE_MODE, dir_fd=self.descriptor)
        except OSError as error:
            raise self._translated(error, name) from error
        if flags & os.O_EXCL:
            return descriptor  # O_EXCL: this call has created the file
        try:
            why = self._strange(os.fstat(descriptor))
            if not why and flags & os.O_ACCMODE != os.O_RDONLY:
                if os.fstat(descriptor).st_nlink > 1:
                    why = "has another name, too (a hard link): what is written here would change it there"
                elif _mount_of(descriptor) != self._mount:
                    why = "another file is mounted here"
            if why:
                raise StrangerError(why, self.path / name)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def read(self, name: str, most: int) -> bytes:
        """Return the content of a file; raise as `open_file`, and StrangerError if it has more than `most` bytes."""
        descriptor = self.open_file(name)
        try:
            return _read_bounded(descriptor, most, self.path / name)
        finally:
            os.close(descriptor)

    def names(self) -> list[str]:
        """Return the names in the directory."""
        # listdir moves the descriptor's offset, which threads would share: a descriptor of its own has its own offset.
        descriptor = os.open(".", _FOLDER, dir_fd=self.descriptor)
        try:
            return os.listdir(descriptor)
        finally:
            os.close(descriptor)

    def status(self, name: str) -> os.stat_result:
        """Return the status of a name; of a link, not of its target.

        Raises:
            OSError: nothing has this name.
        """
        try:
            return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except OSError as error:
            raise self._translated(error, name) from error

    def is_own_file(self, name: str) -> bool:
        """Return whether a plain file of the directory's owner has this name."""
        try:
            return not self._strange(self.status(name))
        except OSError:
            return False

    def holds(self, name: str, folder: Folder) -> bool:
        """Return whether `name` still names `folder` here.

        Raises:
            OSError: this is unknown; ESTALE if another host has removed the directory from a network filesystem.
        """
        try:
            return os.path.samestat(self.status(name), folder._status)
        except FileNotFoundError:
            return False

    def has_file(self, folder: str, name: str) -> bool:
        """Return whether a folder in this directory has a plain file of this name; faster than `folder`.

        Raises:
            OSError: this is unknown; ENOTDIR or ELOOP: something else has the folder's name.
        """
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(folder, flags, dir_fd=self.descriptor)
        except FileNotFoundError:
            return False
        try:
            return stat.S_ISREG(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return False
        finally:
            os.close(descriptor)

    def rename(self, old: str, new: str) -> None:
        """Rename a file within this directory; a file or link with the new name is replaced."""
        os.rename(old, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def unlink(self, name: str) -> bool:
        """Delete a plain file of the directory's owner. Return True if the name is gone, False if a stranger has it.

        Raises:
            OSError: the file cannot be deleted.
        """
        try:
            if self._strange(self.status(name)):
                return False
            os.unlink(name, dir_fd=self.descriptor)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno == errno.EBUSY:  # the kernel's answer for a mount point
                return False
            raise self._translated(error, name) from error
        return True

    def remove_empty(self, name: str) -> bool:
        """Remove a folder if it is empty; return whether it is gone."""
        try:
            os.rmdir(name, dir_fd=self.descriptor)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def _strange(self, status: os.stat_result) -> str:
        """Return why something of this status is a stranger; "" if it is a file of the directory's owner."""
        if not stat.S_ISREG(status.st_mode):
            return _SAID.get(stat.S_IFMT(status.st_mode), "no plain file")
        return "" if status.st_uid == self.owner else f"belongs to user {status.st_uid}"

    def _translated(self, error: OSError, name: str) -> OSError:
        """Return the error with the whole path and, if a stranger has the name, with its kind."""
        if error.errno in _STRANGE_ERRORS:
            try:
                kind = stat.S_IFMT(os.stat(name, dir_fd=self.descriptor, follow_symlinks=False).st_mode)
            except OSError:
                kind = 0
            return StrangerError(_SAID.get(kind, "no file and no folder of kvtier's"), self.path / name)
        return OSError(error.errno, error.strerror, str(self.path / name))


def read_named(path: str | os.PathLike[str], most: int = LARGEST_NAMED_FILE) -> bytes:
    """Return the content of a file that a user has named; links are followed.

    Raises:
        StrangerError: `path` is no plain file, or has more than `most` bytes.
        OSError: the file cannot be read.
        ValueError: no file can have this name.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise StrangerError("no plain file", path)
        return _read_bounded(descriptor, most, path)
    finally:
        os.close(descriptor)


def _read_bounded(descriptor: int, most: int, path: str | os.PathLike[str]) -> bytes:
    size = os.fstat(descriptor).st_size
    if size > most:
        raise StrangerError(f"it holds more than {most} bytes", path)
    content = b""
    while len(content) <= most and (part := os.read(descriptor, most + 1 - len(content))):
        content += part
    return content[:most]


def _mount_of(descriptor: int) -> int | None:
    """Return the id of the mount that a descriptor was opened in; None if /proc is not there.

    A bind mount within one filesystem has the same device number as any folder: only the mount id shows it. Without
    /proc such a mount is taken for a folder.
    """
    try:
        own = os.open(f"/proc/self/fdinfo/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    try:
        words = os.read(own, 4096).split()
    finally:
        os.close(own)
    return int(words[words.index(_MOUNT_ID) + 1]) if _MOUNT_ID in words else None
