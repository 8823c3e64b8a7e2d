"""The unnamed file in memory that holds an arena. It vanishes with the last process that uses it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from kvtier.errors import CapacityError, describe
from kvtier.primary.huge_pages import SMALL, Memory, MemoryKind
from kvtier.sizes import format_size

SHARED_MEMORY = "/dev/shm"
"""A tmpfs on nearly every Linux: shm_overview(7)."""


def make_memory_file(num_bytes: int, memory: Memory = SMALL) -> int:
    """Return the descriptor of a new file of `num_bytes` bytes; no memory is allocated yet.

    Sandboxes may refuse memfd_create, and some builds of Python lack it. A file in small pages is then an O_TMPFILE in
    `SHARED_MEMORY`, which has no name either.

    Args:
        num_bytes: a multiple of `memory.page_bytes`.
        memory: the kind of memory.

    Raises:
        CapacityError: the file cannot be made, or not of this size; the message is one line and says what to do.
    """
    fd = _file_in(memory.folder) if memory.folder is not None else _file_without_folder(memory)
    try:
        os.ftruncate(fd, num_bytes)
    except OSError as error:
        os.close(fd)
        raise no_room(num_bytes, error) from error
    return fd


def _file_without_folder(memory: Memory) -> int:
    try:
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        if memory.kind is MemoryKind.RESERVED:
            flags |= os.MFD_HUGETLB | (memory.page_bytes.bit_length() - 1) << os.MFD_HUGE_SHIFT
        return os.memfd_create("kvtier-arena", flags)
    except (OSError, AttributeError) as refused:
        why = describe(refused) if isinstance(refused, OSError) else str(refused)
        if memory.kind is MemoryKind.RESERVED:
            raise CapacityError(f"cpu_bytes_to_use: no {memory.kind.value}: memfd_create: {why}") from refused
        try:
            return os.open(SHARED_MEMORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CapacityError(
                f"cpu_bytes_to_use: no memory that processes can share: memfd_create: {why}, {SHARED_MEMORY}:"
                f" {describe(error)}; let the sandbox (seccomp) allow memfd_create, or mount a writable tmpfs there"
            ) from error


def _file_in(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CapacityError(f"arena_path: no file can be made in {folder}: {describe(error)}") from error


def forbid_resizing(fd: int) -> None:
    """Seal the size of the file: if it shrank, an access to the mapping beyond its end would raise SIGBUS."""
    with contextlib.suppress(PermissionError):  # only a memfd can be sealed; the other file cannot be opened by name
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)


def no_room(num_bytes: int, error: OSError, fd: int = -1, memory: Memory = SMALL) -> CapacityError:
    """Return the error for memory that the system refused, with advice where the cause is known.

    Args:
        fd: the file; shows whether it lies on a tmpfs of limited size.
        memory: the kind of memory that was asked for.
    """
    text = f"cpu_bytes_to_use: the system could not provide {format_size(num_bytes)}: {describe(error)}"
    if memory is not SMALL:
        where = "" if memory.folder is None else f" in {memory.folder}"
        return CapacityError(f"{text}, in {memory.kind.value}{where}")
    if error.errno == errno.ENOSPC and fd >= 0 and os.fstatvfs(fd).f_blocks:  # 0 for a memfd: its tmpfs has no limit
        text += (
            f"; {SHARED_MEMORY} is used because memfd_create is refused: let the sandbox (seccomp) allow it, or make"
            f" {SHARED_MEMORY} larger (docker: --shm-size, Kubernetes: an emptyDir of medium Memory)"
        )
    return CapacityError(text)
