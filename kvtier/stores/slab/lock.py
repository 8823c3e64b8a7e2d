"""The lock of a slab's directory. Only the process that holds it writes there; others can ask which process that is."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kvtier.errors import StoreUnavailableError
from kvtier.stores.own_files import Folder
from kvtier.stores.slab.layout import LOCK_NAME
from kvtier.stores.slab.namespaces import open_slab, overwrite

_MAX_LOCK_BYTES = 64
SIGN = b" kvtier\n"
"""Written after the pid. It shows that the directory is a slab, even without any namespace."""
_LOCK_CONTENT = re.compile(rb"[0-9]{0,20}( kvtier)?\n?\0*")  # zeros: the file's length was on disk before a power cut
_WAIT_SECONDS = 0.1
"""How long to retry: tools that ask for the holder hold the lock for a moment."""


class Holder(NamedTuple):
    """The process that uses a directory, and its parent.

    Attributes:
        pid, parent_pid: None if unknown.
        command, parent_command: the command lines; "" if unknown.
    """

    pid: int | None
    command: str = ""
    parent_pid: int | None = None
    parent_command: str = ""


def take_lock(path: Path, descriptor: int) -> None:
    """Lock `descriptor`, the open lock file of `path`, and write this process's pid into it.

    Raises:
        StoreUnavailableError: another process holds the lock.
    """
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            if time.monotonic() > deadline:
                holder = _pid_in(descriptor)
                raise StoreUnavailableError(
                    f"{path}: held by another process" + ("" if holder is None else f" (pid {holder})")
                ) from error
        time.sleep(0.01)  # flock cannot wait with a timeout. This runs in the I/O process or a command
    with contextlib.suppress(OSError):  # on a full disk the pid is missing, but the lock is held
        overwrite(descriptor, str(os.getpid()).encode() + SIGN)


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the lock of a slab within the context, so that no engine can use it.

    Raises:
        StoreUnavailableError: a process uses the slab (the message names its pid), or the lock cannot be opened.
    """
    try:
        with open_slab(path) as slab:
            descriptor = slab.open_file(LOCK_NAME, os.O_RDWR)
    except OSError as error:
        raise StoreUnavailableError(f"{error.filename or path}: {error.strerror}") from error
    try:
        take_lock(path, descriptor)
        yield
    finally:
        os.close(descriptor)


def find_holder(path: Path) -> Holder | None:
    """Return the process that uses a slab; None if there is none.

    The kernel does not say who holds a flock. So this tries to lock, and releases the lock at once if that succeeds.

    Raises:
        OSError: the lock file cannot be opened or locked.
    """
    try:
        with open_slab(path) as slab:
            descriptor = slab.open_file(LOCK_NAME)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _describe_holder(_pid_in(descriptor))
    finally:
        os.close(descriptor)
    return None


def read_lock(folder: Folder) -> bytes | None:
    """Return the content of a slab's lock file; None if the file is not a slab's."""
    try:
        content = folder.read(LOCK_NAME, _MAX_LOCK_BYTES)
    except OSError:
        return None
    return content if _LOCK_CONTENT.fullmatch(content) else None


def _pid_in(descriptor: int) -> int | None:
    """Return the pid in an open lock file; None if there is none."""
    try:
        return int(os.pread(descriptor, _MAX_LOCK_BYTES, 0).partition(b" ")[0])
    except ValueError:
        return None


def _describe_holder(pid: int | None) -> Holder:
    if pid is None:
        return Holder(None)
    parent = _parent_of(pid)
    return Holder(pid, _command_of(pid), parent, "" if parent is None else _command_of(parent))


def _command_of(pid: int) -> str:
    """Return the command line of a process, with the program's name instead of its path; "" if unknown."""
    try:
        program, _, arguments = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").partition(b"\0")
    except OSError:
        return ""
    words = [program.rpartition(b"/")[2], *arguments.split(b"\0")]
    return b" ".join(words).decode(errors="replace").rstrip()


def _parent_of(pid: int) -> int | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return int(fields[1])
    except (OSError, ValueError, IndexError):
        return None
