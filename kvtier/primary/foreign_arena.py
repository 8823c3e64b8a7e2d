"""An arena in memory of somebody else's: of an engine that keeps blocks in shared memory of its own."""

from __future__ import annotations

import os
from typing import Self

from kvtier import forks
from kvtier.descriptors import Descriptor
from kvtier.errors import ConfigError
from kvtier.primary.arena import Arena, Rows, SharedMapping
from kvtier.primary.control_page import CONTROL_BYTES, ControlPage


class ForeignArena(Arena):
    """The first blocks of a file in memory that its owner has made, maps too, and does not shrink.

    Its control page is of this process only: nobody copies between it and a device.
    """

    def __init__(self, fd: int, num_blocks: int, block_bytes: int) -> None:
        """Map `fd` and take ownership of it; callers use `attach`."""
        self.fd, self.num_blocks, self.block_bytes, self.memory = fd, num_blocks, block_bytes, None
        self._descriptor = Descriptor(fd)
        self._mapping = SharedMapping(fd, num_blocks * block_bytes)
        place = memoryview(self._mapping)[self._mapping.offset :][: num_blocks * block_bytes]
        self.view = place.cast("B", (num_blocks, block_bytes))
        self._rows = Rows(self.view)
        self.control = ControlPage(memoryview(bytearray(CONTROL_BYTES)))
        self._closed = False
        forks.register(self)

    @classmethod
    def attach(cls, fd: int, num_blocks: int, block_bytes: int) -> Self:
        """Map the first blocks of a file. The descriptor is duplicated: the caller still owns `fd`.

        Raises:
            ConfigError: the file is shorter.
        """
        found, total = os.fstat(fd).st_size, num_blocks * block_bytes
        if min(num_blocks, block_bytes) < 1 or found < total:
            raise ConfigError("arena_fd", fd, f"a file of {total} bytes is needed, it has {found}")
        return cls._over_duplicate(fd, num_blocks, block_bytes)
