"""The seal: 128 bytes that say what a stored block is, so that a reader can refuse anything else.

Layout, little endian, no padding:

| offset | bytes | field            | meaning                                                            |
|--------|-------|------------------|--------------------------------------------------------------------|
| 0      | 4     | magic            | `KVTB`                                                             |
| 4      | 1     | format version   | `kvtier.namespace.FORMAT_VERSION`                                  |
| 5      | 1     | key length       | 5 to 68                                                            |
| 6      | 6     | sequence         | order of writing, for approximate recency after a restart          |
| 12     | 4     | slot             | place of the block in a slot store; 0 where the key is the place   |
| 16     | 4     | payload length   | bytes                                                              |
| 20     | 16    | fingerprint      | of the namespace                                                   |
| 36     | 16    | payload checksum | XXH3-128, big endian as `digest()` gives it; with a secret, keyed  |
|        |       |                  | BLAKE3 over the 120 bytes, zeros here, and the payload's own digest |
| 52     | 68    | key              | padded with zeros                                                  |
| 120    | 8     | header checksum  | XXH3-64 over the 120 bytes before it                               |

A header of zeros only means "nothing here". Magic and version keep their place in every version; the header
checksum is looked at after them, since another version may compute it otherwise. Encrypted payloads have headers of
this layout, too; `encrypted_seal.py` says what is different.
XXH3: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
"""

from __future__ import annotations

import hmac
import itertools
import struct
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol, Self

import numpy as np
import xxhash

from kvtier.errors import KeyFormatError
from kvtier.keys import MAX_KEY_BYTES, MIN_KEY_BYTES, OffloadKey
from kvtier.namespace import FINGERPRINT_BYTES, FORMAT_VERSION, Namespace
from kvtier.stores.integrity.secrets import Authenticator
from kvtier.types import FailureCause

MAGIC = b"KVTB"
HEADER_BYTES = 128
CHECKED_BYTES = 120
"""Bytes of the header that its own checksum covers."""
MAX_SLOT = 2**32 - 1
MAX_PAYLOAD_BYTES = 2**32 - 1

_BODY = struct.Struct("<4sBB6sII16s16s68s")
_HEADER_CHECKSUM = struct.Struct("<Q")
_NOTHING = bytes(HEADER_BYTES)
_CHECKSUM = slice(36, 52)
UNSIGNED = bytes(16)
_MOST_SEQUENCES = 1 << 48

HEADER_DTYPE = np.dtype(
    [
        ("magic", "S4"),
        ("version", "u1"),
        ("key_length", "u1"),
        ("sequence_low", "<u4"),
        ("sequence_high", "<u2"),
        ("slot", "<u4"),
        ("payload_length", "<u4"),
        ("fingerprint", "V16"),
        ("payload_checksum", "V16"),
        ("key", "V68"),
        ("header_checksum", "<u8"),
    ]
)
"""The same layout for reading many headers at once."""


class Record(NamedTuple):
    """What a valid header of this namespace says."""

    key: OffloadKey
    slot: int
    payload_bytes: int
    sequence: int
    payload_checksum: bytes


def header_checksum(header: bytes | memoryview) -> int:
    """Return the checksum that belongs at the end of `header` (at least its first 120 bytes)."""
    return xxhash.xxh3_64_intdigest(header[:CHECKED_BYTES])


def finished(body: bytes) -> bytes:
    """Return the header whose first 120 bytes are `body`."""
    return body + _HEADER_CHECKSUM.pack(header_checksum(body))


def with_checksum(body: bytes, checksum: bytes) -> bytes:
    """Return the first 120 bytes of a header with another payload checksum."""
    return body[: _CHECKSUM.start] + checksum + body[_CHECKSUM.stop : CHECKED_BYTES]


def unsigned_body(header: bytes | bytearray | memoryview) -> bytes:
    """Return the first 120 bytes of a header with zeros for the payload checksum."""
    return with_checksum(bytes(header), UNSIGNED)


class PayloadChecksum(Protocol):
    """The 16 bytes that vouch for a payload, computed while its pieces pass by."""

    def update(self, piece: bytes | bytearray | memoryview, /) -> None:
        """Take the next piece into account."""
        ...

    def digest(self) -> bytes:
        """Return the checksum of the pieces so far."""
        ...


class BlockHeaders:
    """Headers of the blocks of one namespace, without the payloads; the base of the seals. Threads may share it.

    Attributes:
        fingerprint: of the namespace, 16 bytes.
        version: what the headers carry as the version of the format.
        marked_bytes: how many bytes of the fingerprint they carry.
    """

    version: ClassVar[int] = FORMAT_VERSION
    marked_bytes: ClassVar[int] = FINGERPRINT_BYTES

    def __init__(self, fingerprint: bytes) -> None:
        self.fingerprint = fingerprint
        self._sequence = itertools.count(1)

    def continue_after(self, sequence: int) -> None:
        """Number the next headers above `sequence`; called before the first one, by who recovers."""
        self._sequence = itertools.count(sequence + 1)

    def body(self, key: OffloadKey, payload_bytes: int, slot: int, fingerprint: bytes, checksum: bytes) -> bytes:
        """Return the 120 bytes of a new header that its own checksum covers; errors as `Seal.seal_summed`."""
        if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
            raise KeyFormatError(f"key of {len(key)} bytes: {MIN_KEY_BYTES} to {MAX_KEY_BYTES} allowed")
        if not 0 <= slot <= MAX_SLOT or payload_bytes > MAX_PAYLOAD_BYTES:
            raise ValueError(f"slot={slot}, payload of {payload_bytes} bytes: both up to 2**32 - 1 allowed")
        sequence = next(self._sequence) % _MOST_SEQUENCES  # a forged header may have been the last one
        return _BODY.pack(
            MAGIC,
            self.version,
            len(key),
            sequence.to_bytes(6, "little"),
            slot,
            payload_bytes,
            fingerprint,
            checksum,
            key,
        )

    def parse(self, header: bytes | bytearray | memoryview) -> Record | FailureCause:
        """Return what a header says, without its payload, or why it says nothing to this namespace.

        Returns:
            ABSENT (zeros only), OLD_FORMAT (another version), CORRUPT or FOREIGN (another namespace) on failure.
        """
        header = bytes(header)
        if header == _NOTHING:
            return FailureCause.ABSENT
        if len(header) != HEADER_BYTES or header[:4] != MAGIC:
            return FailureCause.CORRUPT
        if header[4] != self.version:
            return FailureCause.OLD_FORMAT
        if _HEADER_CHECKSUM.unpack_from(header, CHECKED_BYTES)[0] != header_checksum(header):
            return FailureCause.CORRUPT
        _, _, key_length, sequence, slot, length, fingerprint, checksum, key = _BODY.unpack_from(header)
        if fingerprint[: self.marked_bytes] != self.fingerprint[: self.marked_bytes]:
            return FailureCause.FOREIGN
        if not MIN_KEY_BYTES <= key_length <= MAX_KEY_BYTES:
            return FailureCause.CORRUPT
        return Record(OffloadKey(key[:key_length]), slot, length, int.from_bytes(sequence, "little"), checksum)

    def record_of(self, header: bytes | bytearray | memoryview, key: OffloadKey, slot: int) -> Record | FailureCause:
        """Return what `parse` does; FOREIGN for a header of another key or slot."""
        record = self.parse(header)
        if isinstance(record, Record) and (record.key != key or record.slot != slot):
            return FailureCause.FOREIGN
        return record


class Seal(BlockHeaders):
    """Makes and checks the headers of payloads that are stored as they are. Threads may share it.

    A key, or a header of another length than 128 bytes, that cannot belong to any block is an error of the
    caller on the way out and a corrupt block on the way in.
    """

    def __init__(self, namespace: Namespace, authenticator: Authenticator | None = None) -> None:
        """Args: authenticator: of a secret; its namespace, made of `namespace`, is the one that counts then."""
        super().__init__((namespace if authenticator is None else authenticator.namespace).fingerprint)
        self._authenticator = authenticator

    @classmethod
    def for_reading(cls, fingerprint: bytes) -> Self:
        """Return a seal that checks the blocks of a namespace of which nothing but the fingerprint is known.

        Payloads that were sealed with a secret can be checked by who knows it only: it would come in here, too.
        """
        seal = cls(Namespace())
        seal.fingerprint = fingerprint
        return seal

    def checksum(self) -> PayloadChecksum:
        """Return the checksum of nothing yet, for payloads that are summed while the processor's cache has them."""
        if self._authenticator is not None:
            keyed: PayloadChecksum = self._authenticator.checksum()
            return keyed
        return xxhash.xxh3_128()

    def checksums(self, payloads: Sequence[bytes | bytearray | memoryview]) -> list[bytes]:
        """Return the checksums of several payloads, with nothing done in between.

        A payload leaves nothing else in the processor's cache: what is done after each one of many starts cold.
        """
        return list(map(xxhash.xxh3_128_digest if self._authenticator is None else self._checksum_of, payloads))

    def seal(self, key: OffloadKey, payload: bytes | bytearray | memoryview, slot: int = 0) -> bytes:
        """Return the 128-byte header of `payload` stored under `key` at `slot`; errors as `seal_summed`."""
        return self.seal_summed(key, len(payload), self._checksum_of(payload), slot)

    def seal_summed(self, key: OffloadKey, payload_bytes: int, checksum: bytes, slot: int = 0) -> bytes:
        """Return the 128-byte header of a payload whose checksum is known, stored under `key` at `slot`.

        Raises:
            KeyFormatError: the key has a length that no key has.
            ValueError: slot or payload length above 2**32 - 1.
        """
        unsigned = self._authenticator is not None
        body = self.body(key, payload_bytes, slot, self.fingerprint, UNSIGNED if unsigned else checksum)
        if self._authenticator is not None:
            body = with_checksum(body, self._authenticator.sign(body, checksum))
        return finished(body)

    def verify(
        self,
        header: bytes | bytearray | memoryview,
        key: OffloadKey,
        payload: bytes | bytearray | memoryview,
        slot: int = 0,
    ) -> FailureCause | None:
        """Return None if `payload` is what was sealed under `key` at `slot` in this namespace, else the cause.

        Returns:
            As `parse`; also FOREIGN for a block of another key or slot, CORRUPT for another payload.
        """
        record = self.record_of(header, key, slot)
        if isinstance(record, FailureCause):
            return record
        if record.payload_bytes != len(payload) or not self._vouches(header, record, self._checksum_of(payload)):
            return FailureCause.CORRUPT
        return None

    def verify_summed(
        self,
        header: bytes | bytearray | memoryview,
        key: OffloadKey,
        payload_bytes: int,
        checksum: bytes,
        slot: int = 0,
    ) -> FailureCause | None:
        """Return what `verify` does, for a payload whose checksum is known."""
        record = self.record_of(header, key, slot)
        if isinstance(record, FailureCause):
            return record
        if record.payload_bytes != payload_bytes or not self._vouches(header, record, checksum):
            return FailureCause.CORRUPT
        return None

    def _vouches(self, header: bytes | bytearray | memoryview, record: Record, checksum: bytes) -> bool:
        """Return whether a header was made for the payload with this checksum."""
        if self._authenticator is None:
            return record.payload_checksum == checksum
        signature = self._authenticator.sign(unsigned_body(header), checksum)
        return hmac.compare_digest(record.payload_checksum, signature)

    def _checksum_of(self, payload: bytes | bytearray | memoryview) -> bytes:
        """Return what `checksum` gives for all of a payload at once."""
        if self._authenticator is not None:
            return self._authenticator.checksum_of(payload)
        return xxhash.xxh3_128_digest(payload)
