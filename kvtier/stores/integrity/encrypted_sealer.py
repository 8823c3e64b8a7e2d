"""A sealer that encrypts payloads. `header.py` has the layout of their headers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvtier.keys import OffloadKey
from kvtier.stores.integrity.header import BlockHeaders, Bytes, begun, complete, nonce_of
from kvtier.stores.integrity.scratch import Scratch, copy_bytes, whole_pages
from kvtier.stores.integrity.sealing import (
    MAX_SCRATCH_BYTES,
    NO_SLOTS,
    OpenStream,
    Sealed,
    Sealer,
    SealStream,
)
from kvtier.stores.integrity.secrets import NONCE_BYTES, TAG_BYTES, PayloadCipher
from kvtier.types import FailureCause

_MAX_OPENED_BYTES = 1 << 20
"""Bytes that are read into private memory before they are decrypted: few enough for a core's own (L2) cache."""


class EncryptedSealer(Sealer):
    """Encrypts payloads into private memory before they are stored, and decrypts them from there after a read."""

    def __init__(self, cipher: PayloadCipher, whole_bytes: int | None = None) -> None:
        """Args: whole_bytes: as `BlockHeaders` has it."""
        self.namespace = cipher.namespace
        self.headers = BlockHeaders.encrypted(self.namespace.fingerprint, whole_bytes)
        self._cipher = cipher
        self._scratch = Scratch(TAG_BYTES)

    def most_sealed(self, block_bytes: int) -> int | None:
        """Return how many blocks fit the private memory of a thread."""
        return max(1, MAX_SCRATCH_BYTES // whole_pages(block_bytes + TAG_BYTES))

    def most_opened(self, block_bytes: int) -> int | None:
        """Return how many blocks stay in the processor's cache until they are decrypted."""
        return max(1, _MAX_OPENED_BYTES // whole_pages(block_bytes + TAG_BYTES))

    def seal(
        self, keys: Sequence[OffloadKey], payloads: Sequence[memoryview], slots: Iterable[int] = NO_SLOTS
    ) -> Sealed:
        """Encrypt each payload into private memory, at a page boundary."""
        targets = self._scratch.like(payloads)
        headers = []
        for key, payload, target, room, slot in zip(
            keys, payloads, targets, self._scratch.spacious, slots, strict=False
        ):
            nonce = os.urandom(NONCE_BYTES)
            body = self.headers.begin(key, payload.nbytes, slot, nonce)
            self._cipher.encrypt_whole(key, nonce, body, payload, room)
            headers.append(complete(body, bytes(room[target.nbytes :])))
        return Sealed(targets, headers)

    def rooms(self, buffers: Sequence[memoryview]) -> Sequence[memoryview]:
        """Return private memory for each buffer, at a page boundary."""
        return self._scratch.like(buffers)

    def open(
        self,
        headers: Sequence[Bytes],
        keys: Sequence[OffloadKey],
        stored: Sequence[Bytes],
        buffers: Sequence[memoryview],
        slots: Iterable[int] = NO_SLOTS,
    ) -> list[FailureCause | None]:
        """Decrypt the payloads into the buffers."""
        if self._scratch.handed_out(stored):
            blocks = zip(headers, keys, self._scratch.spacious, buffers, slots, strict=False)
            return [self._decrypt_whole(header, key, room, buffer, slot) for header, key, room, buffer, slot in blocks]
        causes = []
        for header, key, payload, buffer, slot in zip(headers, keys, stored, buffers, slots, strict=False):
            (decrypted,) = self._scratch.like([buffer])
            causes.append(self._decrypt(header, key, payload, decrypted, slot))
            if causes[-1] is None:
                copy_bytes(buffer, decrypted)
        return causes

    def verify(self, header: Bytes, key: OffloadKey, stored: Bytes, slot: int = 0) -> FailureCause | None:
        """Check a payload without writing it anywhere."""
        return self._decrypt(header, key, stored, None, slot)

    def seal_stream(
        self, key: OffloadKey, payload_bytes: int, memory: Callable[[int], memoryview] | None = None, slot: int = 0
    ) -> SealStream:
        """Return a stream that encrypts each piece."""
        nonce = os.urandom(NONCE_BYTES)
        body = self.headers.begin(key, payload_bytes, slot, nonce)
        return _EncryptedSealStream(self._cipher.encryptor(key, nonce, body), body, memory or self._scratch.next_piece)

    def open_stream(self, key: OffloadKey, buffer: memoryview, slot: int = 0) -> OpenStream:
        """Return a stream that collects all pieces: decryption needs the nonce in the header, which comes last."""
        return _EncryptedOpenStream(self, key, buffer, slot)

    def _decrypt(
        self, header: Bytes, key: OffloadKey, stored: Bytes, target: memoryview | None, slot: int
    ) -> FailureCause | None:
        record = self.headers.expect(header, key, slot)
        if isinstance(record, FailureCause):
            return record
        tag = record.payload_checksum
        intact = record.payload_bytes == len(stored) and self._cipher.decrypt(
            key, nonce_of(header), begun(header), tag, stored, target
        )
        return None if intact else FailureCause.CORRUPT

    def _decrypt_whole(
        self, header: Bytes, key: OffloadKey, room: memoryview, target: memoryview, slot: int
    ) -> FailureCause | None:
        """Decrypt as `_decrypt` does, but faster: `room` has space for the tag after the payload."""
        record = self.headers.expect(header, key, slot)
        if isinstance(record, FailureCause):
            return record
        if not record.payload_bytes == len(target) == len(room) - TAG_BYTES:
            return FailureCause.CORRUPT
        room[len(target) :] = record.payload_checksum
        intact = self._cipher.decrypt_whole(key, nonce_of(header), begun(header), room, target)
        return None if intact else FailureCause.CORRUPT


class _EncryptedSealStream(SealStream):
    def __init__(self, encryptor: Any, body: bytes, memory: Callable[[int], memoryview]) -> None:
        self._encryptor, self._body, self._memory = encryptor, body, memory

    def take(self, piece: memoryview) -> memoryview:
        encrypted = self._memory(piece.nbytes)
        self._encryptor.update_into(piece, encrypted)
        return encrypted

    def header(self) -> bytes:
        self._encryptor.finalize()
        return complete(self._body, self._encryptor.tag)


class _EncryptedOpenStream(OpenStream):
    def __init__(self, sealer: EncryptedSealer, key: OffloadKey, buffer: memoryview, slot: int) -> None:
        self._sealer, self._key, self._buffer, self._slot = sealer, key, buffer, slot
        self._rooms = sealer.rooms([buffer])

    def room(self, start: int, stop: int) -> memoryview:
        return self._rooms[0][start:stop]

    def verify(self, header: Bytes) -> FailureCause | None:
        (cause,) = self._sealer.open([header], [self._key], self._rooms, [self._buffer], [self._slot])
        return cause
