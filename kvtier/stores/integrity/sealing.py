"""Seals payloads before they are stored, and opens what was stored: plain or encrypted, in batches or as a stream.

A store moves bytes and asks its sealer what they are, so that one code serves both kinds. Payloads are never encrypted
where they are, since others read the arena at the same time.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.stores.integrity.header import BlockHeaders, Bytes
from kvtier.types import FailureCause

MAX_SCRATCH_BYTES = 16 << 20
"""Private memory that a thread keeps for one batch, unless one block is more."""
PORTION_BYTES = 1 << 20
"""Read at once into private memory, and then copied: less than a processor's own cache has."""
NO_SLOTS: Iterable[int] = itertools.repeat(0)
"""For stores in which the key is the location."""


class Sealed(NamedTuple):
    """What is to be stored: payloads as long as they were, and a header for each."""

    payloads: Sequence[memoryview]
    headers: list[bytes]


class SealStream(ABC):
    """One payload that leaves in pieces, for a header that follows it."""

    @abstractmethod
    def take(self, piece: memoryview) -> memoryview:
        """Return what is to be stored of the next piece, of the same length; good until half a MiB more is taken.

        Args:
            piece: at most `RING_BYTES / 4` long.
        """

    def note(self, piece: memoryview) -> None:
        """Learn that the next piece has left, or is about to; each is noted once, in order, as it was given."""
        return

    @abstractmethod
    def header(self) -> bytes:
        """Return the header; called once, after the last piece."""


class OpenStream(ABC):
    """One payload that arrives in pieces, before its header."""

    @abstractmethod
    def room(self, start: int, stop: int) -> memoryview:
        """Return where bytes `start` to `stop` of what is stored are to be put; good until the next room."""

    def note(self, piece: memoryview, /) -> None:
        """Learn that the next piece, a room or a part of one, is filled; each is noted once, in order."""
        return

    @abstractmethod
    def verify(self, header: Bytes) -> FailureCause | None:
        """Leave the payload in its buffer and return None, or return the cause; called once, after the last piece."""


class Sealer(ABC):
    """Seals and opens the blocks of one namespace. Threads may share it; memory that it hands out is the thread's own.

    Attributes:
        namespace: of the blocks; with a secret the one derived from it, which decides about names and paths.
        headers: makes and reads their headers.
    """

    namespace: Namespace
    headers: BlockHeaders

    def most_sealed(self, block_bytes: int) -> int | None:
        """Return how many blocks one call of `seal` takes; None for any number."""
        return None

    def most_opened(self, block_bytes: int) -> int | None:
        """Return how many blocks one call of `rooms` and `open` takes; None for any number."""
        return self.most_sealed(block_bytes)

    def reads_portions(self, block_bytes: int) -> bool:
        """Return whether a payload is better read through `open_stream`, in portions of `PORTION_BYTES`."""
        return False

    def for_direct_reads(self) -> Sealer:
        """Return a sealer for the same blocks whose rooms are private memory in large pages."""
        return self

    @abstractmethod
    def seal(
        self, keys: Sequence[OffloadKey], payloads: Sequence[memoryview], slots: Iterable[int] = NO_SLOTS
    ) -> Sealed:
        """Return what is to be stored of payloads; good until this thread's next call.

        Raises:
            KeyFormatError: a key has a length that no key has.
            ValueError: slot or payload length above 2**32 - 1.
        """

    def seal_into(self, key: OffloadKey, payload: memoryview, target: memoryview) -> bytes:
        """Put what is to be stored of a payload into `target`, of the same length and elsewhere; return the header."""
        stream = self.seal_stream(key, payload.nbytes, lambda num_bytes: target)
        stored = stream.take(payload)
        if stored is payload:
            target[:] = payload
        stream.note(payload)
        return stream.header()

    @abstractmethod
    def rooms(self, buffers: Sequence[memoryview]) -> Sequence[memoryview]:
        """Return where a store should put what it reads for `buffers`; good until this thread's next call."""

    @abstractmethod
    def open(
        self,
        headers: Sequence[Bytes],
        keys: Sequence[OffloadKey],
        stored: Sequence[Bytes],
        buffers: Sequence[memoryview],
        slots: Iterable[int] = NO_SLOTS,
    ) -> list[FailureCause | None]:
        """Leave what was `stored` in `buffers`; return, each, None if it verified, else the cause.

        Args:
            stored: what `rooms(buffers)` returned, filled, or any other memory.

        A buffer whose payload did not verify may hold anything. Causes are as `BlockHeaders.parse` has them, FOREIGN
        for a block of another key or slot, CORRUPT for another payload.
        """

    @abstractmethod
    def verify(self, header: Bytes, key: OffloadKey, stored: Bytes, slot: int = 0) -> FailureCause | None:
        """Return what `open` does for one block, and leave the payload nowhere."""

    @abstractmethod
    def seal_stream(
        self, key: OffloadKey, payload_bytes: int, memory: Callable[[int], memoryview] | None = None
    ) -> SealStream:
        """Return what takes a payload in pieces.

        Args:
            memory: gives memory for a piece of so many bytes, if one is needed; default the thread's own.
        """

    @abstractmethod
    def open_stream(self, key: OffloadKey, buffer: memoryview, slot: int = 0) -> OpenStream:
        """Return what receives a payload for `buffer`, and then its header; one at a time for a thread."""
