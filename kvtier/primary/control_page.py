"""The control page at the end of an arena, in which workers of other processes report to the scheduler."""

from __future__ import annotations

import mmap

import numpy as np

CONTROL_BYTES = mmap.PAGESIZE
MAX_RANKS = 256
_NO_FAILURES = bytes(8 * MAX_RANKS)


class ControlPage:
    """Shared memory in which workers report, per rank, which device copies have ended and how many have failed.

    Each rank has two 64-bit words, and only that rank writes them. A write is one aligned store, so the scheduler can
    read without a lock: it sees the old or the new value.
    """

    def __init__(self, page: memoryview) -> None:
        """Args: page: at least `MAX_RANKS` * 16 writable bytes, 8-byte aligned, zero in a new arena."""
        self._sequences = np.frombuffer(page, dtype=np.uint64, count=MAX_RANKS)
        self._failures = np.frombuffer(page, dtype=np.uint64, count=MAX_RANKS, offset=self._sequences.nbytes)

    def publish(self, rank: int, sequence: int) -> None:
        """Report that all transfers of `rank` up to and including `sequence` have ended.

        Raises:
            ValueError: the rank is not in 0 to `MAX_RANKS` - 1.
        """
        if not 0 <= rank < MAX_RANKS:
            raise ValueError(f"rank {rank}: 0 to {MAX_RANKS - 1} allowed")
        self._sequences[rank] = sequence

    def finished(self, world_size: int) -> int:
        """Return the highest sequence up to which each of `world_size` ranks has ended all transfers.

        Raises:
            ValueError: the world size is not in 1 to `MAX_RANKS`.
        """
        if not 0 < world_size <= MAX_RANKS:
            raise ValueError(f"world_size {world_size}: 1 to {MAX_RANKS} allowed")
        return int(self._sequences[:world_size].min())

    def count_failure(self, rank: int) -> None:
        """Count one more failed copy of `rank`, for engines whose workers cannot report a failure in a result.

        Call it before the copy's result is passed on, so that whoever reads the result finds the failure counted.

        Raises:
            ValueError: the rank is not in 0 to `MAX_RANKS` - 1.
        """
        if not 0 <= rank < MAX_RANKS:
            raise ValueError(f"rank {rank}: 0 to {MAX_RANKS - 1} allowed")
        self._failures[rank] += np.uint64(1)

    @property
    def has_failures(self) -> bool:
        """Whether any copy of any rank has failed."""
        return self._failures.tobytes() != _NO_FAILURES  # asked at every store: a sum takes six times as long

    def failures(self) -> int:
        """Return how many copies failed on all ranks together."""
        return int(self._failures.sum())
