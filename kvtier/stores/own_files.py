"""The only place that opens what others could have put there.

A tier's directory is held by its descriptor. Everything below it is reached by one name at a time, relative to a
descriptor, so that nobody can lead us elsewhere in between; links are never followed, and opening never waits. What is
no plain file or folder of the directory's owner, or is mounted there, is a *stranger*: it is not read, not changed and
not deleted, whatever its name is. Only a path that a person configured is followed wherever it leads, once.
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
"""What opening a link, a folder, a pipe, a device or a socket gives instead of a file."""
_SAID = {stat.S_IFDIR: "Is a directory", stat.S_IFLNK: "symbolic links are not followed", stat.S_IFIFO: "a pipe"}
LARGEST_NAMED_FILE = 1 << 20
FOUND_BY_FSCK = "lost+found"
"""Made with a filesystem, at the top of it; nobody's data."""


class StrangerError(OSError):
    """Something that is not ours lies where one of our files belongs; it was left as it is."""

    def __init__(self, why: str, path: str | os.PathLike[str]) -> None:
        super().__init__(errno.EPERM, why, os.fspath(path))


class Folder:
    """A directory, held by its descriptor; a context that closes it. Threads may share it.

    Attributes:
        path: for messages only: what was opened stays this directory, wherever it is moved.
        descriptor: open for as long as the context, or until `close`.
        owner: the user to whom it and everything of ours in it belongs.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        """Args: descriptor: of the directory; closed by `close`."""
        self.path = path
        self.descriptor = descriptor
        self._status = os.fstat(descriptor)
        self._mount = _mount_of(descriptor)
        self.owner = self._status.st_uid

    @classmethod
    def open(cls, path: Path, follow: bool = True) -> Self:
        """Hold the directory at a path that a person configured.

        Args:
            follow: whether the last part of the path may be a link, as all others may.

        Raises:
            StrangerError: it is a link and may not be.
            OSError: there is none, or it may not be opened.
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
        """Let go of the directory."""
        os.close(self.descriptor)

    @property
    def mode(self) -> int:
        """Its permissions, as they were when it was opened."""
        return stat.S_IMODE(self._status.st_mode)

    @property
    def own_bytes(self) -> int:
        """Bytes that the directory itself takes from the filesystem, without what is in it."""
        return os.fstat(self.descriptor).st_blocks * 512

    def folder(self, name: str, may_be_mounted: bool = False) -> Folder:
        """Hold the folder of this name.

        Args:
            may_be_mounted: whether a filesystem of its own may be mounted there.

        Raises:
            StrangerError: it is a link, a file, another user's, or mounted and may not be.
            OSError: there is none, or it may not be opened.
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
        """Make the folder of this name, for its owner only; return False if there is something already.

        Raises:
            OSError: it cannot be made; FileNotFoundError: this directory was removed.
        """
        try:
            os.mkdir(name, FOLDER_MODE, dir_fd=self.descriptor)
        except FileExistsError:
            return False
        return True

    def open_file(self, name: str, flags: int = os.O_RDONLY) -> int:
        """Return a descriptor of a plain file that belongs to this directory's owner.

        Args:
            flags: as `os.open` has them. What is opened for writing has no second name: a write would show there, too.

        Raises:
            StrangerError: something else has this name.
            OSError: it cannot be opened.
        """
        try:
            descriptor = os.open(name, flags | _FILE, FILE_MODE, dir_fd=self.descriptor)
        except OSError as error:
            raise self._translated(error, name) from error
        if flags & os.O_EXCL:
            return descriptor  # made by this call
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
        """Return what a file of at most `most` bytes holds; errors as `open_file`, StrangerError if it is longer."""
        descriptor = self.open_file(name)
        try:
            return _read_bounded(descriptor, most, self.path / name)
        finally:
            os.close(descriptor)

    def names(self) -> list[str]:
        """Return the names in the directory."""
        descriptor = os.open(".", _FOLDER, dir_fd=self.descriptor)  # its own place in the list: threads may ask at once
        try:
            return os.listdir(descriptor)
        finally:
            os.close(descriptor)

    def status(self, name: str) -> os.stat_result:
        """Return what the filesystem says of a name; of a link, not of where it leads.

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
        """Return whether `folder` is still what has this name here.

        Raises:
            OSError: it cannot be told; ESTALE from a network filesystem of which the directory was removed.
        """
        try:
            return os.path.samestat(self.status(name), folder._status)
        except FileNotFoundError:
            return False

    def has_file(self, folder: str, name: str) -> bool:
        """Return whether a plain file of this name is in a folder here; quicker than to hold the folder.

        Raises:
            OSError: it cannot be told; ENOTDIR or ELOOP: something else has the folder's name.
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
        """Give a file another name here, in place of whatever file or link has it."""
        os.rename(old, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def unlink(self, name: str) -> bool:
        """Delete a plain file of the directory's owner; return whether it is gone, False for a stranger.

        Raises:
            OSError: it cannot be deleted.
        """
        try:
            if self._strange(self.status(name)):
                return False
            os.unlink(name, dir_fd=self.descriptor)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno == errno.EBUSY:  # a file is mounted there
                return False
            raise self._translated(error, name) from error
        return True

    def remove_empty(self, name: str) -> bool:
        """Remove a folder if there is nothing in it; return whether it is gone."""
        try:
            os.rmdir(name, dir_fd=self.descriptor)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def _strange(self, status: os.stat_result) -> str:
        """Return why what has this status is no file of ours; empty if it is one."""
        if not stat.S_ISREG(status.st_mode):
            return _SAID.get(stat.S_IFMT(status.st_mode), "no plain file")
        return "" if status.st_uid == self.owner else f"belongs to user {status.st_uid}"

    def _translated(self, error: OSError, name: str) -> OSError:
        """Return an error that names the whole path, and says what lies there instead of what was expected."""
        if error.errno in _STRANGE_ERRORS:
            try:
                kind = stat.S_IFMT(os.stat(name, dir_fd=self.descriptor, follow_symlinks=False).st_mode)
            except OSError:
                kind = 0
            return StrangerError(_SAID.get(kind, "no file and no folder of kvtier's"), self.path / name)
        return OSError(error.errno, error.strerror, str(self.path / name))


def read_named(path: str | os.PathLike[str], most: int = LARGEST_NAMED_FILE) -> bytes:
    """Return what a file holds that a person named; links are followed.

    Raises:
        StrangerError: no plain file, or longer than `most` bytes.
        OSError: it cannot be read.
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
    """Return which mount something was opened in; None where the kernel's list of descriptors is hidden.

    Where it is hidden, a directory of the same filesystem that is mounted below ours looks like a folder of ours.
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
