"""The unnamed file in memory that holds an arena. It vanishes with the last process that uses it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os

from kvtier.errors import CapacityError, describe
from kvtier.sizes import format_size

SHARED_MEMORY = "/dev/shm"
"""A tmpfs on nearly every Linux: shm_overview(7)."""


def make_memory_file(num_bytes: int) -> int:
    """Return the descriptor of a new file of `num_bytes` bytes; no memory is allocated yet.

    Sandboxes may refuse memfd_create, and some builds of Python lack it. The file is then an O_TMPFILE in
    `SHARED_MEMORY`, which has no name either.

    Raises:
        CapacityError: neither kind of file can be made, or not of this size; the message is one line and says what to
            do.
    """
    try:
        fd = os.memfd_create("kvtier-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (OSError, AttributeError) as refused:
        try:
            fd = os.open(SHARED_MEMORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            why = describe(refused) if isinstance(refused, OSError) else str(refused)
            raise CapacityError(
                f"cpu_bytes_to_use: no memory that processes can share: memfd_create: {why}, {SHARED_MEMORY}:"
                f" {describe(error)}; let the sandbox (seccomp) allow memfd_create, or mount a writable tmpfs there"
            ) from error
    try:
        os.ftruncate(fd, num_bytes)
    except OSError as error:
        os.close(fd)
        raise no_room(num_bytes, error) from error
    return fd


def forbid_resizing(fd: int) -> None:
    """Seal the size of the file: if it shrank, an access to the mapping beyond its end would raise SIGBUS."""
    with contextlib.suppress(PermissionError):  # only a memfd can be sealed; the other file cannot be opened by name
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)


def no_room(num_bytes: int, error: OSError, fd: int = -1) -> CapacityError:
    """Return the error for memory that the system refused, with advice where the cause is known.

    Args:
        fd: the file; shows whether it lies on a tmpfs of limited size.
    """
    text = f"cpu_bytes_to_use: the system could not provide {format_size(num_bytes)}: {describe(error)}"
    if error.errno == errno.ENOSPC and fd >= 0 and os.fstatvfs(fd).f_blocks:  # 0 for a memfd: its tmpfs has no limit
        text += (
            f"; {SHARED_MEMORY} is used because memfd_create is refused: let the sandbox (seccomp) allow it, or make"
            f" {SHARED_MEMORY} larger (docker: --shm-size, Kubernetes: an emptyDir of medium Memory)"
        )
    return CapacityError(text)
