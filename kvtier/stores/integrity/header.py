"""The header of a stored block: 128 bytes that identify the block, so that a reader can refuse any other bytes.

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

Headers of encrypted payloads have the same layout, with these differences:

| offset | bytes | field          | meaning                                                                       |
|--------|-------|----------------|-------------------------------------------------------------------------------|
| 4      | 1     | format version | `ENCRYPTED_VERSION`                                                           |
| 20     | 4     | fingerprint    | its beginning only: the whole one is in the key of the cipher                 |
| 24     | 12    | nonce          | random, drawn for this writing                                                |
| 36     | 16    | tag            | of AES-256-GCM over the encrypted payload and, in the clear, the 120 bytes of |
|        |       |                | the header with zeros here                                                    |

Encryption changes no length, so that direct I/O stays possible.

The version of a payload that is shorter than its block, because it is compressed, has `COMPRESSED` added. Readers that
expect whole blocks only take it for another format.

A header of zeros means that there is no block. Magic and version are at the same place in every version. A reader
checks them before the header checksum, which another version may compute in another way.
XXH3: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Sequence, Sized
from typing import NamedTuple, Self

import numpy as np
import xxhash

from kvtier.errors import KeyFormatError
from kvtier.keys import MAX_KEY_BYTES, MIN_KEY_BYTES, OffloadKey
from kvtier.namespace import FINGERPRINT_BYTES, FORMAT_VERSION
from kvtier.types import FailureCause

MAGIC = b"KVTB"
ENCRYPTED_VERSION = FORMAT_VERSION | 0x80
"""Version in headers of encrypted payloads: a reader of plain payloads takes it for another format."""
COMPRESSED = 0x40
"""Added to the version in headers of compressed payloads."""
HEADER_BYTES = 128
CHECKED_BYTES = 120
"""Bytes of the header that its own checksum covers."""
MAX_SLOT = 2**32 - 1
MAX_PAYLOAD_BYTES = 2**32 - 1

_BODY = struct.Struct("<4sBBIHII16s16s68s")
"""The sequence is two integers: the low 32 bits and the high 16."""
_HEADER_CHECKSUM = struct.Struct("<Q")
_HEADER_SUM = xxhash.xxh3_64_intdigest
_NOTHING = bytes(HEADER_BYTES)
_SEQUENCE = struct.Struct("<6xIH")
_CHECKSUM = slice(36, 52)
_NONE = bytes(16)
_NONCE = slice(24, 36)
_ENCRYPTED_MARK_BYTES = 4
_LOW_BITS, _LOW, _HIGH = 32, (1 << 32) - 1, (1 << 16) - 1
_MAX_SEQUENCES = 1 << 48
"""The count starts again there: a forged header may have made it start near the end."""

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
"""The same layout for numpy, to read many headers at once."""


Bytes = bytes | bytearray | memoryview


class Record(NamedTuple):
    """The content of a valid header of this namespace."""

    key: OffloadKey
    slot: int
    payload_bytes: int
    sequence: int
    payload_checksum: bytes


def header_checksum(header: bytes | memoryview) -> int:
    """Return the header checksum of `header`, of which at least the first 120 bytes must be given."""
    return _HEADER_SUM(header[:CHECKED_BYTES])


def _check_lengths(keys: Iterable[OffloadKey]) -> None:
    for length in set(map(len, keys)):
        if not MIN_KEY_BYTES <= length <= MAX_KEY_BYTES:
            raise KeyFormatError(f"key of {length} bytes: {MIN_KEY_BYTES} to {MAX_KEY_BYTES} allowed")


def complete(body: bytes, signature: bytes | None = None) -> bytes:
    """Complete what `BlockHeaders.begin` returned; a signature or tag replaces the payload checksum."""
    if signature is not None:
        body = body[: _CHECKSUM.start] + signature + body[_CHECKSUM.stop : CHECKED_BYTES]
    return body + _HEADER_CHECKSUM.pack(header_checksum(body))


def begun(header: Bytes) -> bytes:
    """Return the bytes that a signature or tag covers: the first 120, with zeros for the payload checksum."""
    header = bytes(header)
    return header[: _CHECKSUM.start] + _NONE + header[_CHECKSUM.stop : CHECKED_BYTES]


def nonce_of(header: Bytes) -> bytes:
    """Return the nonce in the header of an encrypted payload."""
    return bytes(header[_NONCE])


class BlockHeaders:
    """Makes and parses the headers of one namespace's blocks. It verifies no payloads. Threads may share it.

    Attributes:
        fingerprint: of the namespace, 16 bytes.
        version: format version in the headers.
        mark: the part of the fingerprint that each header contains: its first 16 or 4 bytes.
    """

    def __init__(
        self,
        fingerprint: bytes,
        version: int = FORMAT_VERSION,
        mark_bytes: int = FINGERPRINT_BYTES,
        whole_bytes: int | None = None,
    ) -> None:
        """Args: whole_bytes: length of a block, if shorter payloads are compressed ones; None if there are none."""
        self.fingerprint = fingerprint
        self.version = version
        self._whole_bytes = whole_bytes
        self.mark = fingerprint[:mark_bytes]
        self._sequence = itertools.count(1)

    @classmethod
    def encrypted(cls, fingerprint: bytes, whole_bytes: int | None = None) -> Self:
        """Return one for a namespace whose payloads are encrypted."""
        return cls(fingerprint, ENCRYPTED_VERSION, _ENCRYPTED_MARK_BYTES, whole_bytes)

    def continue_after(self, sequence: int) -> None:
        """Give the next headers sequences above `sequence`. A recovering store calls it before the first header."""
        self._sequence = itertools.count(sequence + 1)

    def begin(
        self, key: OffloadKey, payload_bytes: int, slot: int, nonce: bytes = b"", checksum: bytes = _NONE
    ) -> bytes:
        """Return the first 120 bytes of a new header, for `complete`.

        Args:
            nonce: 12 bytes, for an encrypted payload.
            checksum: of the payload, if there is no signature or tag.

        Raises:
            KeyFormatError: the key's length is not allowed.
            ValueError: slot or payload length above 2**32 - 1.
        """
        _check_lengths((key,))
        if not 0 <= slot <= MAX_SLOT or payload_bytes > MAX_PAYLOAD_BYTES:
            raise ValueError(f"slot={slot}, payload of {payload_bytes} bytes: both up to 2**32 - 1 allowed")
        number = next(self._sequence) % _MAX_SEQUENCES
        return _BODY.pack(
            MAGIC,
            self._version_of(payload_bytes),
            len(key),
            number & _LOW,
            number >> _LOW_BITS,
            slot,
            payload_bytes,
            self.mark + nonce,
            checksum,
            key,
        )

    def make(
        self, keys: Sequence[OffloadKey], payloads: Sequence[Sized], slots: Iterable[int], checksums: Iterable[bytes]
    ) -> list[bytes]:
        """Return new headers for payloads of which the checksums are known.

        Raises:
            KeyFormatError, ValueError: as `begin`.
        """
        _check_lengths(keys)
        try:
            numbers = itertools.islice(self._sequence, len(keys))
            sequences = [(number & _LOW, number >> _LOW_BITS & _HIGH) for number in numbers]
            return self._make(keys, payloads, slots, checksums, sequences)
        except struct.error as error:
            raise ValueError(f"slot or payload length: {error}") from error

    def match(
        self,
        headers: Sequence[Bytes],
        keys: Sequence[OffloadKey],
        payloads: Sequence[Sized],
        slots: Iterable[int],
        checksums: Iterable[bytes],
    ) -> bool:
        """Return whether these are exactly the headers that `make` gave to these blocks at some time."""
        try:
            _check_lengths(keys)
            sequences = list(map(_SEQUENCE.unpack_from, headers))
            return self._make(keys, payloads, slots, checksums, sequences) == list(headers)
        except (KeyFormatError, struct.error):
            return False

    def _make(
        self,
        keys: Iterable[OffloadKey],
        payloads: Iterable[Sized],
        slots: Iterable[int],
        checksums: Iterable[bytes],
        sequences: Iterable[tuple[int, int]],
    ) -> list[bytes]:
        """Return whole headers. One loop without calls of Python code: it runs for every block of a busy disk."""
        pack, mark, sum_of, pack_sum = _BODY.pack, self.mark, _HEADER_SUM, _HEADER_CHECKSUM.pack
        lengths = list(map(len, payloads))
        versions = [self.version] * len(lengths) if self._whole_bytes is None else map(self._version_of, lengths)
        headers = []
        for key, length, version, slot, checksum, (low, high) in zip(
            keys, lengths, versions, slots, checksums, sequences, strict=False
        ):
            body = pack(MAGIC, version, len(key), low, high, slot, length, mark, checksum, key)
            headers.append(body + pack_sum(sum_of(body)))
        return headers

    def parse(self, header: Bytes) -> Record | FailureCause:
        """Return the content of a header, without looking at the payload.

        Returns:
            On failure ABSENT (only zeros), OLD_FORMAT (another version), CORRUPT, or FOREIGN (another namespace).
        """
        header = bytes(header)
        if header == _NOTHING:
            return FailureCause.ABSENT
        if len(header) != HEADER_BYTES or header[:4] != MAGIC:
            return FailureCause.CORRUPT
        if header[4] != self.version and (self._whole_bytes is None or header[4] != self.version | COMPRESSED):
            return FailureCause.OLD_FORMAT
        if _HEADER_CHECKSUM.unpack_from(header, CHECKED_BYTES)[0] != header_checksum(header):
            return FailureCause.CORRUPT
        _, _, key_length, low, high, slot, length, fingerprint, checksum, key = _BODY.unpack_from(header)
        if not fingerprint.startswith(self.mark):
            return FailureCause.FOREIGN
        if not MIN_KEY_BYTES <= key_length <= MAX_KEY_BYTES or header[4] != self._version_of(length):
            return FailureCause.CORRUPT
        return Record(OffloadKey(key[:key_length]), slot, length, low | high << _LOW_BITS, checksum)

    def _version_of(self, payload_bytes: int) -> int:
        """Return the version in the header of a payload of this length."""
        is_whole = self._whole_bytes is None or payload_bytes == self._whole_bytes
        return self.version if is_whole else self.version | COMPRESSED

    def expect(self, header: Bytes, key: OffloadKey, slot: int) -> Record | FailureCause:
        """Parse a header; return FOREIGN if it is of another key or slot."""
        record = self.parse(header)
        if isinstance(record, Record) and (record.key != key or record.slot != slot):
            return FailureCause.FOREIGN
        return record
