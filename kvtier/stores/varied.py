"""The contract of kvtier's own stores in which blocks may be shorter than others, because they are compressed."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from kvtier.abc import BlockStore
from kvtier.keys import OffloadKey


class Padding(NamedTuple):
    """Bytes that a store has written, or read, to fill up the space of shorter payloads."""

    written: int = 0
    read: int = 0


class PaddingCount:
    """Counts padding. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.total = Padding()

    def add(self, written: int = 0, read: int = 0) -> None:
        """Count these bytes."""
        with self._lock:
            self.total = Padding(self.total.written + written, self.total.read + read)


class VariedStore(BlockStore):
    """A store that takes shorter payloads than `block_bytes` if its context says `compressed`. It seals blocks itself:
    its sealer has the context's `whole_bytes`.
    """

    seals_itself = True

    @abstractmethod
    def read_varied(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[int]:
        """Fill the beginning of each buffer with a verified payload; return its length, 0 for a block that failed.

        A buffer whose block failed may hold anything.
        """

    def read_into(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        """Fill and verify buffers; a buffer whose result is False may hold anything."""
        return [length > 0 for length in self.read_varied(keys, buffers)]

    def padding(self) -> Padding:
        """Return what has been written and read beyond payloads and headers."""
        return Padding()
