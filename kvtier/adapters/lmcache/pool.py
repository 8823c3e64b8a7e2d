"""LMCache's memory as an arena: a POSIX shared memory segment, which other processes can map by its name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvtier.errors import ConfigError
from kvtier.primary.foreign_arena import ForeignArena

_FOLDER = "/dev/shm/"
_NEEDS = "lmcache server with --no-l1-use-lazy and a --shm-name"


class Pool:
    """The blocks of LMCache's memory.

    LMCache's allocator begins each object at a multiple of its alignment, and gives it whole multiples. So if that is a
    multiple of a block, the blocks of an object are its own, also behind its end.

    Attributes:
        num_blocks, block_bytes: its shape.
    """

    def __init__(self, described: Any, block_bytes: int) -> None:
        """Args: described: LMCache's `L1MemoryDesc`.

        Raises:
            ConfigError: the memory has no name, or its alignment is not one of blocks.
        """
        if described is None or not described.ptr:
            raise ConfigError("shared_memory", True, f"{_NEEDS}: LMCache does not say where its memory is")
        if described.align_bytes % block_bytes:
            allowed = f"--l1-align-bytes {block_bytes}, or a multiple: LMCache aligns to {described.align_bytes} bytes"
            raise ConfigError("shared_memory", True, allowed)
        self._address = described.ptr
        self.num_blocks, self.block_bytes = described.size // block_bytes, block_bytes
        self._path, self._file = _segment_at(described.ptr)

    def open(self) -> ForeignArena:
        """Map the memory a second time, to hand it to I/O processes.

        Raises:
            ConfigError: the name belongs to another file now.
        """
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise ConfigError("shared_memory", True, f"{_NEEDS}: {self._path}: {error.strerror}") from error
        try:
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino) != self._file:
                raise ConfigError("shared_memory", True, f"{_NEEDS}: {self._path} is another file now")
            return ForeignArena.attach(descriptor, self.num_blocks, self.block_bytes)
        finally:
            os.close(descriptor)

    def slots(self, memory: Any, count: int) -> Sequence[int] | None:
        """Return the blocks that LMCache has given to a `MemoryObj`; None if it lies elsewhere or has fewer."""
        first, rest = divmod(memory.data_ptr - self._address, self.block_bytes)
        enough = memory.get_physical_size() >= count * self.block_bytes
        if rest or not enough or not 0 <= first <= self.num_blocks - count:
            return None
        return range(first, first + count)


def _segment_at(address: int) -> tuple[str, tuple[int, int]]:
    """Return path, and device and inode, of the segment that this process has mapped at an address (proc(5)).

    Raises:
        ConfigError: there is none whose first byte is at the address.
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, _, offset, device, inode, *path = line.split(maxsplit=5)
        if int(place.partition("-")[0], 16) == address and path and path[0].startswith(_FOLDER):
            if int(offset, 16) or path[0].endswith(" (deleted)"):
                break
            major, minor = (int(part, 16) for part in device.split(":"))
            return path[0], (os.makedev(major, minor), int(inode))
    raise ConfigError("shared_memory", True, f"{_NEEDS}: its memory has no name below {_FOLDER}")
