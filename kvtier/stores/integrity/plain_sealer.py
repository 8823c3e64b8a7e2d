"""Payloads stored as they are, with a checksum; a secret, if there is one, vouches for them."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import xxhash

from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.stores.integrity.header import BlockHeaders, Bytes, begun, complete
from kvtier.stores.integrity.scratch import Scratch, whole_pages
from kvtier.stores.integrity.sealing import NO_SLOTS, PORTION_BYTES, OpenStream, Sealed, Sealer, SealStream
from kvtier.stores.integrity.secrets import Authenticator
from kvtier.types import FailureCause


class PlainSealer(Sealer):
    """Stores payloads as they are; a secret, if there is one, vouches for them.

    A device moves its bytes into few large pages much faster than into many small ones, and an arena that several
    processes share has small ones on most systems. `for_direct_reads` receives payloads in private memory and copies
    them from there. That costs processor time (docs/performance.md has both), least in portions that stay in the
    processor's cache: several small blocks, or a piece of a large one.
    """

    def __init__(
        self, namespace: Namespace, authenticator: Authenticator | None = None, *, scratch: Scratch | None = None
    ) -> None:
        """Args:
        authenticator: of a secret; its namespace, made of `namespace`, is the one that counts then.
        scratch: receives what is read; without it, the buffers do.
        """
        self.namespace = namespace if authenticator is None else authenticator.namespace
        self.headers = BlockHeaders(self.namespace.fingerprint)
        self._authenticator = authenticator
        self._scratch = scratch
        self._checksum_of: Callable[[Bytes], bytes] = (
            xxhash.xxh3_128_digest if authenticator is None else authenticator.checksum_of
        )

    @classmethod
    def for_reading(cls, fingerprint: bytes) -> Self:
        """Return a sealer that verifies blocks of a namespace of which nothing but the fingerprint is known.

        Only who knows the secret can verify payloads that one vouches for.
        """
        sealer = cls(Namespace())
        sealer.headers = BlockHeaders(fingerprint)
        return sealer

    def for_direct_reads(self) -> Sealer:
        """Return one that copies what it receives."""
        return PlainSealer(self.namespace, self._authenticator, scratch=Scratch())

    def most_opened(self, block_bytes: int) -> int | None:
        """Return how many blocks stay in the processor's cache until they are copied; any number without a copy."""
        return None if self._scratch is None else max(1, PORTION_BYTES // whole_pages(block_bytes))

    def reads_portions(self, block_bytes: int) -> bool:
        """Return whether a block would not stay in the cache until it is copied."""
        return self._scratch is not None and block_bytes > PORTION_BYTES

    def seal(
        self, keys: Sequence[OffloadKey], payloads: Sequence[memoryview], slots: Iterable[int] = NO_SLOTS
    ) -> Sealed:
        """Return the payloads themselves."""
        # All checksums first: a payload leaves nothing else in the processor's cache, so that whatever is done after
        # each of many starts cold.
        summed = zip(keys, payloads, list(map(self._checksum_of, payloads)), slots, strict=False)
        return Sealed(payloads, [self.header_of(key, load.nbytes, sum_, slot) for key, load, sum_, slot in summed])

    def header_of(self, key: OffloadKey, payload_bytes: int, checksum: bytes, slot: int = 0) -> bytes:
        """Return the header of a payload whose checksum is known."""
        if self._authenticator is None:
            return complete(self.headers.begin(key, payload_bytes, slot, checksum=checksum))
        body = self.headers.begin(key, payload_bytes, slot)
        return complete(body, self._authenticator.sign(body, checksum))

    def rooms(self, buffers: Sequence[memoryview]) -> Sequence[memoryview]:
        """Return the buffers themselves, or private memory, on a page boundary for each."""
        return buffers if self._scratch is None else self._scratch.like(buffers)

    def open(
        self,
        headers: Sequence[Bytes],
        keys: Sequence[OffloadKey],
        stored: Sequence[Bytes],
        buffers: Sequence[memoryview],
        slots: Iterable[int] = NO_SLOTS,
    ) -> list[FailureCause | None]:
        """Verify payloads where they are; copy those that did and are not in their buffers."""
        summed = zip(headers, keys, stored, list(map(self._checksum_of, stored)), slots, strict=False)
        causes = [self.verify_summed(header, key, len(load), sum_, slot) for header, key, load, sum_, slot in summed]
        if stored is not buffers:
            for cause, payload, buffer in zip(causes, stored, buffers, strict=True):
                if cause is None:
                    buffer[:] = payload
        return causes

    def verify(self, header: Bytes, key: OffloadKey, stored: Bytes, slot: int = 0) -> FailureCause | None:
        """Return why not, if a payload is not what was sealed."""
        return self.verify_summed(header, key, len(stored), self._checksum_of(stored), slot)

    def verify_summed(
        self, header: Bytes, key: OffloadKey, payload_bytes: int, checksum: bytes, slot: int = 0
    ) -> FailureCause | None:
        """Return what `verify` does, for a payload whose checksum is known."""
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
        """Return the checksum of nothing yet, with `update` and `digest`."""
        return xxhash.xxh3_128() if self._authenticator is None else self._authenticator.checksum()

    def seal_stream(
        self, key: OffloadKey, payload_bytes: int, memory: Callable[[int], memoryview] | None = None
    ) -> SealStream:
        """Return what sums the pieces."""
        return _PlainSealStream(self, key, payload_bytes)

    def open_stream(self, key: OffloadKey, buffer: memoryview, slot: int = 0) -> OpenStream:
        """Return what sums the pieces."""
        if self._scratch is not None:
            return _CopiedOpenStream(self, key, buffer, slot, self._scratch)
        return _PlainOpenStream(self, key, buffer, slot)


class _PlainSealStream(SealStream):
    def __init__(self, sealer: PlainSealer, key: OffloadKey, payload_bytes: int) -> None:
        self._sealer, self._key, self._payload_bytes = sealer, key, payload_bytes
        self._checksum = sealer.checksum()

    def note(self, piece: memoryview) -> None:
        self._checksum.update(piece)

    def take(self, piece: memoryview) -> memoryview:
        return piece

    def header(self) -> bytes:
        return self._sealer.header_of(self._key, self._payload_bytes, self._checksum.digest())


class _PlainOpenStream(OpenStream):
    def __init__(self, sealer: PlainSealer, key: OffloadKey, buffer: memoryview, slot: int) -> None:
        self._sealer, self._key, self._buffer, self._slot = sealer, key, buffer, slot
        self._checksum = sealer.checksum()

    def note(self, piece: memoryview, /) -> None:
        self._checksum.update(piece)

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
        super().note(piece)
        self._buffer[self._noted : self._noted + piece.nbytes] = piece
        self._noted += piece.nbytes
