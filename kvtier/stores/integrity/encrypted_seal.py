"""The seal of encrypted payloads: a header that says what a block is and vouches for it without a checksum beside.

The header has the layout of `seal.py`, with these differences:

| offset | bytes | field          | meaning                                                                       |
|--------|-------|----------------|-------------------------------------------------------------------------------|
| 4      | 1     | format version | `ENCRYPTED_VERSION`                                                           |
| 20     | 4     | fingerprint    | its beginning only: the whole one is in the key of the cipher                 |
| 24     | 12    | nonce          | random, drawn for this writing                                                |
| 36     | 16    | tag            | of AES-256-GCM over the encrypted payload and, in the clear, the 120 bytes of |
|        |       |                | the header with zeros here                                                    |

So a block is as long as one that is not encrypted, and its payload as long as the block's: direct I/O stays possible.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ClassVar, Self

from kvtier.keys import OffloadKey
from kvtier.namespace import FORMAT_VERSION
from kvtier.stores.integrity.header import UNSIGNED, BlockHeaders, finished, unsigned_body, with_checksum
from kvtier.stores.integrity.secrets import NONCE_BYTES, TAG_BYTES, Bytes, PayloadCipher, tag_of
from kvtier.types import FailureCause

ENCRYPTED_VERSION = FORMAT_VERSION | 0x80
"""What stands for the version in headers of encrypted payloads: who expects others sees another format."""
_MARKED_BYTES = 4
_NONCE = slice(24, 24 + NONCE_BYTES)


class Encryption:
    """One payload, being encrypted."""

    def __init__(self, encryptor: Any, body: bytes) -> None:
        """Args: encryptor: begun with `body`, the first 120 bytes of the header."""
        self.update_into: Callable[[Bytes, memoryview], int] = encryptor.update_into
        """Encrypts the next piece into memory of the same length, elsewhere."""
        self._encryptor = encryptor
        self._body = body

    def header(self) -> bytes:
        """Return the header; called once, after the last piece."""
        return finished(with_checksum(self._body, tag_of(self._encryptor)))


class EncryptedSeal(BlockHeaders):
    """Encrypts payloads and makes their headers; checks and decrypts. Threads may share it."""

    version: ClassVar[int] = ENCRYPTED_VERSION
    marked_bytes: ClassVar[int] = _MARKED_BYTES

    def __init__(self, cipher: PayloadCipher | None, fingerprint: bytes) -> None:
        """Args:
        cipher: of a secret; without it headers can be read, and no payload verifies.
        fingerprint: of the cipher's namespace.
        """
        super().__init__(fingerprint)
        self._cipher = cipher

    @classmethod
    def of(cls, cipher: PayloadCipher) -> Self:
        """Return the seal of a cipher's namespace."""
        return cls(cipher, cipher.namespace.fingerprint)

    def encrypt(self, key: OffloadKey, payload: Bytes, target: memoryview, slot: int = 0) -> bytes:
        """Encrypt `payload` into `target`; return the 128-byte header of the block stored under `key` at `slot`.

        Args:
            target: as long as the payload, and not the same memory.

        Raises:
            KeyFormatError, ValueError: as `Seal.seal_summed`; ValueError, too, without a cipher.
        """
        encryption = self.begin(key, len(payload), slot)
        encryption.update_into(payload, target)
        return encryption.header()

    def encrypt_whole(self, key: OffloadKey, payload: Bytes, target: memoryview, slot: int = 0) -> bytes:
        """Do as `encrypt`, quicker; `target` is `TAG_BYTES` longer than what is to be stored of it."""
        cipher, body, nonce = self._begin(key, len(payload), slot)
        cipher.encrypt_whole(key, nonce, body, payload, target)
        return finished(with_checksum(body, bytes(target[len(payload) :])))

    def begin(self, key: OffloadKey, payload_bytes: int, slot: int = 0) -> Encryption:
        """Return what encrypts a payload of this length in pieces; errors as `encrypt`."""
        cipher, body, nonce = self._begin(key, payload_bytes, slot)
        return Encryption(cipher.encryptor(key, nonce, body), body)

    def _begin(self, key: OffloadKey, payload_bytes: int, slot: int) -> tuple[PayloadCipher, bytes, bytes]:
        """Return the cipher, the header without a tag, and the nonce of a new block."""
        if self._cipher is None:
            raise ValueError("nothing can be encrypted without the secret")
        nonce = os.urandom(NONCE_BYTES)
        body = self.body(key, payload_bytes, slot, self.fingerprint[:_MARKED_BYTES] + nonce, UNSIGNED)
        return self._cipher, body, nonce

    def decrypt(
        self, header: Bytes, key: OffloadKey, payload: Bytes, target: memoryview | None, slot: int = 0
    ) -> FailureCause | None:
        """Decrypt `payload` into `target`; return None if it is what was encrypted under `key` at `slot`.

        Args:
            target: as long as the payload, and not the same memory; it must not be used after a failure. Without
                one, the payload is only checked.

        Returns:
            On failure as `Seal.verify`.
        """
        record = self.record_of(header, key, slot)
        if isinstance(record, FailureCause):
            return record
        if self._cipher is None or record.payload_bytes != len(payload):
            return FailureCause.CORRUPT
        nonce, tag = bytes(header[_NONCE]), record.payload_checksum
        intact = self._cipher.decrypt(key, nonce, unsigned_body(header), tag, payload, target)
        return None if intact else FailureCause.CORRUPT

    def decrypt_whole(
        self, header: Bytes, key: OffloadKey, stored: memoryview, target: memoryview, slot: int = 0
    ) -> FailureCause | None:
        """Do as `decrypt`, quicker.

        Args:
            stored: the encrypted payload, and behind it `TAG_BYTES` of the caller's memory, which are overwritten.
        """
        record = self.record_of(header, key, slot)
        if isinstance(record, FailureCause):
            return record
        if self._cipher is None or not record.payload_bytes == len(target) == len(stored) - TAG_BYTES:
            return FailureCause.CORRUPT
        stored[len(target) :] = record.payload_checksum
        intact = self._cipher.decrypt_whole(key, bytes(header[_NONCE]), unsigned_body(header), stored, target)
        return None if intact else FailureCause.CORRUPT

    def verify(self, header: Bytes, key: OffloadKey, payload: Bytes, slot: int = 0) -> FailureCause | None:
        """Return what `decrypt` does, and decrypt to nowhere."""
        return self.decrypt(header, key, payload, None, slot)
