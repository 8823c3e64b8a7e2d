"""A sealer that stores payloads unchanged, with a checksum or, if there is a secret, a signature."""

from __future__ import annotations

import hmac
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import xxhash

from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.stores.integrity.header import BlockHeaders, Bytes, begun, complete
from kvtier.stores.integrity.scratch import Scratch, copy_bytes, whole_pages
from kvtier.stores.integrity.sealing import NO_SLOTS, PORTION_BYTES, OpenStream, Sealed, Sealer, SealStream
from kvtier.stores.integrity.secrets import Authenticator
from kvtier.types import FailureCause

_PIECE_BYTES = 256 << 10
"""Copied and summed at once: few enough for a core's own (L2) cache."""
_HELD_BYTES = 64 << 10
"""xxhash sums at most so many bytes without giving the interpreter lock away."""
_MOST_HELD_BYTES = 256 << 10
"""Payloads up to this length are summed without giving the interpreter lock away: to win it back from other threads
takes longer than the sum, some 10 microseconds, and costs processor time."""


class PlainSealer(Sealer):
    """Stores payloads unchanged, with a checksum or, if there is a secret, a signature.

    Direct I/O with huge pages is much faster than with 4 KiB pages, since the device handles fewer segments. An arena
    has 4 KiB pages on many systems. The sealer of `through_huge_pages` therefore copies payloads through private memory
    in huge pages, in portions of several small blocks, or of a part of a large one. The copy costs processor time
    (docs/performance.md has both).
    """

    def __init__(
        self,
        namespace: Namespace,
        authenticator: Authenticator | None = None,
        *,
        scratch: Scratch | None = None,
        whole_bytes: int | None = None,
    ) -> None:
        """Args:
        authenticator: signs blocks with a secret; the sealer then has the authenticator's namespace.
        whole_bytes: as `BlockHeaders` has it.
        scratch: memory through which payloads go; None to read and write them in the caller's buffers.
        """
        self.namespace = namespace if authenticator is None else authenticator.namespace
        self.headers = BlockHeaders(self.namespace.fingerprint, whole_bytes=whole_bytes)
        self._authenticator = authenticator
        self._scratch = scratch
        self._checksum_of: Callable[[Bytes], bytes] = (
            xxhash.xxh3_128_digest if authenticator is None else authenticator.checksum_of
        )

    @classmethod
    def for_reading(cls, fingerprint: bytes) -> Self:
        """Return a sealer that verifies blocks of a namespace of which only the fingerprint is known.

        It cannot verify blocks that are signed with a secret.
        """
        sealer = cls(Namespace())
        sealer.headers = BlockHeaders(fingerprint)
        return sealer

    def through_huge_pages(self) -> Sealer:
        """Return a sealer that copies payloads through private memory."""
        sealer = PlainSealer(self.namespace, self._authenticator, scratch=Scratch())
        sealer.headers = self.headers  # one count of blocks: the newer record of a slot has the higher number
        return sealer

    def most_sealed(self, block_bytes: int) -> int | None:
        """Return how many blocks are copied before one call of the system; 1 of large blocks, else None, if none is."""
        if block_bytes > PORTION_BYTES:
            return 1
        return None if self._scratch is None else max(1, PORTION_BYTES // whole_pages(block_bytes))

    def reads_portions(self, block_bytes: int) -> bool:
        """Return True if a block is copied, and larger than a portion."""
        return self._scratch is not None and block_bytes > PORTION_BYTES

    def seals_portions(self, block_bytes: int) -> bool:
        """Return True if a block is larger than a portion: while one portion is summed, the device writes those of
        other threads.
        """
        return block_bytes > PORTION_BYTES

    def seal(
        self, keys: Sequence[OffloadKey], payloads: Sequence[memoryview], slots: Iterable[int] = NO_SLOTS
    ) -> Sealed:
        """Return the payloads themselves, or copies in private memory."""
        if self._scratch is not None:
            copies = self._scratch.like(payloads)
            checksums = list(map(self._copy, payloads, copies))
            return Sealed(copies, self._headers_of(keys, copies, checksums, slots))
        # Compute all checksums first. Reading a payload evicts everything else from the processor's cache, so code
        # between two payloads would start with a cold cache each time.
        checksums = self._checksums_of(payloads)
        return Sealed(payloads, self._headers_of(keys, payloads, checksums, slots))

    def _headers_of(
        self, keys: Sequence[OffloadKey], payloads: Sequence[Bytes], checksums: Sequence[bytes], slots: Iterable[int]
    ) -> list[bytes]:
        if self._authenticator is None:
            return self.headers.make(keys, payloads, slots, checksums)
        blocks = zip(keys, payloads, checksums, slots, strict=False)
        return [self.header_of(key, len(payload), checksum, slot) for key, payload, checksum, slot in blocks]

    def _copy(self, payload: memoryview, target: memoryview) -> bytes:
        """Copy a payload and return the checksum of the copy."""
        checksum = self.checksum()
        _copy_summed(checksum, payload, target)
        digest: bytes = checksum.digest()
        return digest

    def _checksums_of(self, payloads: Sequence[Bytes]) -> list[bytes]:
        if self._authenticator is None and payloads and _HELD_BYTES < len(payloads[0]) <= _MOST_HELD_BYTES:
            return list(map(_held_checksum_of, payloads))
        return list(map(self._checksum_of, payloads))

    def header_of(self, key: OffloadKey, payload_bytes: int, checksum: bytes, slot: int = 0) -> bytes:
        """Return the header for a payload with this checksum."""
        if self._authenticator is None:
            return complete(self.headers.begin(key, payload_bytes, slot, checksum=checksum))
        body = self.headers.begin(key, payload_bytes, slot)
        return complete(body, self._authenticator.sign(body, checksum))

    def rooms(self, buffers: Sequence[memoryview]) -> Sequence[memoryview]:
        """Return the buffers themselves, or private memory for each at a page boundary."""
        return buffers if self._scratch is None else self._scratch.like(buffers)

    def open(
        self,
        headers: Sequence[Bytes],
        keys: Sequence[OffloadKey],
        stored: Sequence[Bytes],
        buffers: Sequence[memoryview],
        slots: Iterable[int] = NO_SLOTS,
    ) -> list[FailureCause | None]:
        """Verify payloads in place; copy the verified ones to their buffers if they are elsewhere.

        Payloads in the sealer's private memory are copied while they are summed: so they pass the cache only once.
        """
        if self._scratch is not None and self._scratch.handed_out(stored):
            checksums = [self._copy(memoryview(load), buffer) for load, buffer in zip(stored, buffers, strict=True)]
            return self._verify_all(headers, keys, stored, checksums, slots)
        causes = self._verify_all(headers, keys, stored, self._checksums_of(stored), slots)
        if stored is not buffers:
            for cause, payload, buffer in zip(causes, stored, buffers, strict=True):
                if cause is None:
                    copy_bytes(buffer, memoryview(payload))
        return causes

    def _verify_all(
        self,
        headers: Sequence[Bytes],
        keys: Sequence[OffloadKey],
        stored: Sequence[Bytes],
        checksums: Sequence[bytes],
        slots: Iterable[int],
    ) -> list[FailureCause | None]:
        """Verify payloads together. Only if one fails, look at each for the cause."""
        slots = list(itertools.islice(slots, len(keys)))
        if self._authenticator is None and self.headers.match(headers, keys, stored, slots, checksums):
            return [None] * len(keys)
        blocks = zip(headers, keys, stored, checksums, slots, strict=True)
        return [self.verify_summed(header, key, len(load), sum_, slot) for header, key, load, sum_, slot in blocks]

    def verify(self, header: Bytes, key: OffloadKey, stored: Bytes, slot: int = 0) -> FailureCause | None:
        """Return None if a payload is what was sealed, else the cause."""
        return self.verify_summed(header, key, len(stored), self._checksum_of(stored), slot)

    def verify_summed(
        self, header: Bytes, key: OffloadKey, payload_bytes: int, checksum: bytes, slot: int = 0
    ) -> FailureCause | None:
        """Verify a payload of which only length and checksum are given."""
        record = self.headers.expect(header, key, slot)
        if isinstance(record, FailureCause):
            return record
        if self._authenticator is None:
            vouched = record.payload_checksum == checksum
        else:
            signature = self._authenticator.sign(begun(header), checksum)
            vouched = hmac.compare_digest(record.payload_checksum, signature)
        return None if vouched and record.payload_bytes == payload_bytes else FailureCause.CORRUPT

    def checksum(self) -> Any:
        """Return a new checksum object, with `update` and `digest`."""
        return xxhash.xxh3_128() if self._authenticator is None else self._authenticator.checksum()

    def seal_stream(
        self, key: OffloadKey, payload_bytes: int, memory: Callable[[int], memoryview] | None = None, slot: int = 0
    ) -> SealStream:
        """Return a stream that adds each piece to the checksum, and copies it if the sealer has scratch memory."""
        if self._scratch is not None:
            return _CopiedSealStream(self, key, payload_bytes, slot, self._scratch)
        return _PlainSealStream(self, key, payload_bytes, slot)

    def open_stream(self, key: OffloadKey, buffer: memoryview, slot: int = 0) -> OpenStream:
        """Return a stream that adds each piece to the checksum, and copies it if the sealer has scratch memory."""
        if self._scratch is not None:
            return _CopiedOpenStream(self, key, buffer, slot, self._scratch)
        return _PlainOpenStream(self, key, buffer, slot)


def _copy_summed(checksum: Any, source: memoryview, target: memoryview) -> None:
    """Copy bytes and add them to a checksum. Each piece is summed while it is in the processor's cache."""
    for start in range(0, source.nbytes, _PIECE_BYTES):
        piece = target[start : start + _PIECE_BYTES]
        copy_bytes(piece, source[start : start + _PIECE_BYTES])
        checksum.update(piece)


def _held_checksum_of(payload: Bytes) -> bytes:
    """Return the XXH3-128 of a payload, without giving the interpreter lock away."""
    checksum = xxhash.xxh3_128()
    for start in range(0, len(payload), _HELD_BYTES):
        checksum.update(payload[start : start + _HELD_BYTES])
    return checksum.digest()


class _PlainSealStream(SealStream):
    def __init__(self, sealer: PlainSealer, key: OffloadKey, payload_bytes: int, slot: int) -> None:
        self._sealer, self._key, self._payload_bytes, self._slot = sealer, key, payload_bytes, slot
        self._checksum = sealer.checksum()

    def note(self, piece: memoryview) -> None:
        self._checksum.update(piece)

    def take(self, piece: memoryview) -> memoryview:
        return piece

    def header(self) -> bytes:
        return self._sealer.header_of(self._key, self._payload_bytes, self._checksum.digest(), self._slot)


class _CopiedSealStream(_PlainSealStream):
    def __init__(self, sealer: PlainSealer, key: OffloadKey, payload_bytes: int, slot: int, scratch: Scratch) -> None:
        super().__init__(sealer, key, payload_bytes, slot)
        self._scratch = scratch

    def note(self, piece: memoryview) -> None:
        """Do nothing: `take` has summed it."""

    def take(self, piece: memoryview) -> memoryview:
        (copy,) = self._scratch.like([piece])
        _copy_summed(self._checksum, piece, copy)
        return copy


class _PlainOpenStream(OpenStream):
    def __init__(self, sealer: PlainSealer, key: OffloadKey, buffer: memoryview, slot: int) -> None:
        self._sealer, self._key, self._buffer, self._slot = sealer, key, buffer, slot
        self._checksum = sealer.checksum()

    def note(self, piece: memoryview, /) -> None:
        step = _HELD_BYTES if piece.nbytes <= _MOST_HELD_BYTES else piece.nbytes
        for start in range(0, piece.nbytes, step):
            self._checksum.update(piece[start : start + step])

    def room(self, start: int, stop: int) -> memoryview:
        return self._buffer[start:stop]

    def verify(self, header: Bytes) -> FailureCause | None:
        checksum = self._checksum.digest()
        return self._sealer.verify_summed(header, self._key, self._buffer.nbytes, checksum, self._slot)


class _CopiedOpenStream(_PlainOpenStream):
    def __init__(self, sealer: PlainSealer, key: OffloadKey, buffer: memoryview, slot: int, scratch: Scratch) -> None:
        super().__init__(sealer, key, buffer, slot)
        self._scratch, self._noted = scratch, 0

    def room(self, start: int, stop: int) -> memoryview:
        return self._scratch.like([self._buffer[start:stop]])[0]

    def note(self, piece: memoryview, /) -> None:
        _copy_summed(self._checksum, piece, self._buffer[self._noted : self._noted + piece.nbytes])
        self._noted += piece.nbytes
