"""The interface of sealers: to seal is to make the stored bytes of a block, to open is to verify and restore them.

Stores only move bytes, so the same store serves plain and encrypted blocks, in batches or as a stream. Payloads are
never encrypted in place, since other processes read the arena at the same time.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.stores.integrity.header import BlockHeaders, Bytes
from kvtier.stores.integrity.scratch import copy_bytes
from kvtier.types import FailureCause

MAX_SCRATCH_BYTES = 16 << 20
"""Private memory that a thread keeps for one batch, unless one block needs more."""
PORTION_BYTES = 2 << 20
"""Bytes that pass private memory, or are summed and written, at once: as many as a call into a slab moves, so that it
makes one system call, and so few that several threads have some under way. Of a larger block, the device writes one
portion while other threads sum theirs.

Portions of 1 MiB stay in a core's own (L2) cache, and yet take more processor time, up to a third more for small
blocks: four times as many system calls, and as many times the steps around them. The copy itself works in pieces that
stay in the cache.
"""
NO_SLOTS: Iterable[int] = itertools.repeat(0)
"""The slots for stores without slots, in which the key is the location."""


class Sealed(NamedTuple):
    """The bytes to store: payloads of unchanged length, and a header for each."""

    payloads: Sequence[memoryview]
    headers: list[bytes]


class SealStream(ABC):
    """Seals one payload piece by piece; its header is known after the last piece."""

    @abstractmethod
    def take(self, piece: memoryview) -> memoryview:
        """Return the bytes to store for the next piece, of the same length.

        They may be used until another half MiB has been taken.

        Args:
            piece: at most `RING_BYTES / 4` long.
        """

    def note(self, piece: memoryview) -> None:
        """Learn that the next piece was sent or will be. Call it once per plain piece, in order."""
        return

    @abstractmethod
    def header(self) -> bytes:
        """Return the header. Call it once, after the last piece."""


class OpenStream(ABC):
    """Opens one payload that arrives piece by piece, before its header."""

    @abstractmethod
    def room(self, start: int, stop: int) -> memoryview:
        """Return memory for the stored bytes `start` to `stop`. It may be used until the next call."""

    def note(self, piece: memoryview, /) -> None:
        """Learn that the next piece, a room or a part of one, is filled. Call it once per piece, in order."""
        return

    @abstractmethod
    def verify(self, header: Bytes) -> FailureCause | None:
        """Write the payload to its buffer and return None, or return why it failed. Call it once, at the end."""


class Sealer(ABC):
    """Seals and opens the blocks of one namespace. Threads may share it; memory that it returns is the thread's own.

    Attributes:
        namespace: of the blocks; with a secret, the namespace derived from it. Stores use it in names and paths.
        headers: makes and parses their headers.
    """

    namespace: Namespace
    headers: BlockHeaders

    def most_sealed(self, block_bytes: int) -> int | None:
        """Return the most blocks per call of `seal`; None for any number."""
        return None

    def most_opened(self, block_bytes: int) -> int | None:
        """Return the most blocks per call of `rooms` and `open`; None for any number."""
        return self.most_sealed(block_bytes)

    def reads_portions(self, block_bytes: int) -> bool:
        """Return whether it is faster to read a payload through `open_stream`, in portions of `PORTION_BYTES`."""
        return False

    def seals_portions(self, block_bytes: int) -> bool:
        """Return whether it is faster to write a payload through `seal_stream`, in portions of `PORTION_BYTES`. Then
        `take` accepts these, and what it returns may be used until the next call.
        """
        return False

    def through_huge_pages(self) -> Sealer:
        """Return a sealer for the same blocks that is faster with direct I/O between small pages and a device: what it
        seals and what it receives is in huge pages.
        """
        return self

    @abstractmethod
    def seal(
        self, keys: Sequence[OffloadKey], payloads: Sequence[memoryview], slots: Iterable[int] = NO_SLOTS
    ) -> Sealed:
        """Return the bytes to store for payloads. They may be used until this thread's next call.

        Raises:
            KeyFormatError: a key's length is not allowed.
            ValueError: slot or payload length above 2**32 - 1.
        """

    def seal_into(self, key: OffloadKey, payload: memoryview, target: memoryview) -> bytes:
        """Write the bytes to store for a payload into `target`, other memory of the same length; return the header."""
        stream = self.seal_stream(key, payload.nbytes, lambda num_bytes: target)
        stored = stream.take(payload)
        if stored is payload:
            copy_bytes(target, payload)
        stream.note(payload)
        return stream.header()

    @abstractmethod
    def rooms(self, buffers: Sequence[memoryview]) -> Sequence[memoryview]:
        """Return memory for reading the blocks of `buffers`. It may be used until this thread's next call."""

    @abstractmethod
    def open(
        self,
        headers: Sequence[Bytes],
        keys: Sequence[OffloadKey],
        stored: Sequence[Bytes],
        buffers: Sequence[memoryview],
        slots: Iterable[int] = NO_SLOTS,
    ) -> list[FailureCause | None]:
        """Verify `stored` blocks and write their payloads to `buffers`; return per block None, or why it failed.

        A buffer whose block failed may hold anything. Causes are those of `BlockHeaders.parse`, FOREIGN for a block of
        another key or slot, and CORRUPT for a wrong payload.

        Args:
            stored: the result of `rooms(buffers)`, filled, or any other memory.
        """

    @abstractmethod
    def verify(self, header: Bytes, key: OffloadKey, stored: Bytes, slot: int = 0) -> FailureCause | None:
        """Verify one block as `open` does, without writing its payload."""

    @abstractmethod
    def seal_stream(
        self, key: OffloadKey, payload_bytes: int, memory: Callable[[int], memoryview] | None = None, slot: int = 0
    ) -> SealStream:
        """Return a stream that seals a payload piece by piece.

        Args:
            memory: returns memory for a piece of so many bytes; None for the thread's own memory.
        """

    @abstractmethod
    def open_stream(self, key: OffloadKey, buffer: memoryview, slot: int = 0) -> OpenStream:
        """Return a stream that opens a payload for `buffer` piece by piece. A thread may use one at a time."""
