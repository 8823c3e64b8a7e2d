"""What a peer is: something that keeps blocks on a disk, kvtier's own tier among them."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvtier.cli.disk_speed.scheduler import MeasuredTier
from kvtier.keys import OffloadKey

THREADS = 8
"""Threads of a peer that lets one choose: as many as the disk tier has."""


@dataclass(frozen=True)
class PeerPlace:
    """Where a peer works.

    Attributes:
        folder: an empty folder on the filesystem to measure.
        view: the arena, shape (num_blocks, block_bytes). A round stores each slot once, then loads it.
        arena_fd: the arena's descriptor.
        address: of the arena's first byte.
    """

    folder: Path
    view: memoryview
    arena_fd: int
    address: int
    num_blocks: int
    block_bytes: int


class Peer(ABC):
    """Keeps blocks of the arena on the disk.

    Attributes:
        tier: what the busy scheduler calls.
        note: what is special about it here; empty if nothing is.
    """

    tier: MeasuredTier
    note = ""

    @abstractmethod
    def forget(self, keys: Sequence[OffloadKey]) -> None:
        """Give up blocks that were stored: room for the next round. Its time does not count."""

    def cpu_seconds_elsewhere(self) -> float:
        """Return the processor time so far of processes of the peer's own."""
        return 0.0

    @abstractmethod
    def close(self) -> None:
        """End all threads and processes of the peer."""


def reserve_file(path: Path, num_bytes: int) -> None:
    """Make a file whose blocks the filesystem has reserved."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    finally:
        os.close(descriptor)
