"""The header: 128 bytes that say what a stored block is, so that a reader can refuse anything else.

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

So an encrypted block is as long as a plain one, and its payload as long as the block's: direct I/O stays possible.

A header of zeros only means "nothing here". Magic and version keep their place in every version; the header
checksum is looked at after them, since another version may compute it otherwise.
XXH3: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
"""

from __future__ import annotations

import itertools
import struct
from typing import NamedTuple, Self

import numpy as np
import xxhash

from kvtier.errors import KeyFormatError
from kvtier.keys import MAX_KEY_BYTES, MIN_KEY_BYTES, OffloadKey
from kvtier.namespace import FINGERPRINT_BYTES, FORMAT_VERSION
from kvtier.types import FailureCause

MAGIC = b"KVTB"
ENCRYPTED_VERSION = FORMAT_VERSION | 0x80
"""Stands for the version in headers of encrypted payloads: who expects plain ones sees another format."""
HEADER_BYTES = 128
CHECKED_BYTES = 120
"""Bytes of the header that its own checksum covers."""
MAX_SLOT = 2**32 - 1
MAX_PAYLOAD_BYTES = 2**32 - 1

_BODY = struct.Struct("<4sBB6sII16s16s68s")
_HEADER_CHECKSUM = struct.Struct("<Q")
_NOTHING = bytes(HEADER_BYTES)
_CHECKSUM = slice(36, 52)
_NONE = bytes(16)
_NONCE = slice(24, 36)
_ENCRYPTED_MARK_BYTES = 4
_MAX_SEQUENCES = 1 << 48

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


Bytes = bytes | bytearray | memoryview


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


def complete(body: bytes, signature: bytes | None = None) -> bytes:
    """Return the header that `BlockHeaders.begin` began; a signature or tag takes the place of the payload checksum."""
    if signature is not None:
        body = body[: _CHECKSUM.start] + signature + body[_CHECKSUM.stop : CHECKED_BYTES]
    return body + _HEADER_CHECKSUM.pack(header_checksum(body))


def begun(header: Bytes) -> bytes:
    """Return what a signature or tag vouches for: the first 120 bytes, with zeros for the payload checksum."""
    header = bytes(header)
    return header[: _CHECKSUM.start] + _NONE + header[_CHECKSUM.stop : CHECKED_BYTES]


def nonce_of(header: Bytes) -> bytes:
    """Return the nonce in the header of an encrypted payload."""
    return bytes(header[_NONCE])


class BlockHeaders:
    """Makes and reads the headers of one namespace's blocks; vouches for no payload. Threads may share it.

    Attributes:
        fingerprint: of the namespace, 16 bytes.
        version: what the headers carry as the version of the format.
        mark: the beginning of the fingerprint that every header carries.
    """

    def __init__(self, fingerprint: bytes, version: int = FORMAT_VERSION, mark_bytes: int = FINGERPRINT_BYTES) -> None:
        self.fingerprint = fingerprint
        self.version = version
        self.mark = fingerprint[:mark_bytes]
        self._sequence = itertools.count(1)

    @classmethod
    def encrypted(cls, fingerprint: bytes) -> Self:
        """Return the headers of a namespace whose payloads are encrypted."""
        return cls(fingerprint, ENCRYPTED_VERSION, _ENCRYPTED_MARK_BYTES)

    def continue_after(self, sequence: int) -> None:
        """Number the next headers above `sequence`; called before the first one, by who recovers."""
        self._sequence = itertools.count(sequence + 1)

    def begin(
        self, key: OffloadKey, payload_bytes: int, slot: int, nonce: bytes = b"", checksum: bytes = _NONE
    ) -> bytes:
        """Return the first 120 bytes of a new header, for `complete`.

        Args:
            nonce: 12 bytes, for an encrypted payload.
            checksum: of the payload, where nothing vouches for the header.

        Raises:
            KeyFormatError: the key has a length that no key has.
            ValueError: slot or payload length above 2**32 - 1.
        """
        if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
            raise KeyFormatError(f"key of {len(key)} bytes: {MIN_KEY_BYTES} to {MAX_KEY_BYTES} allowed")
        if not 0 <= slot <= MAX_SLOT or payload_bytes > MAX_PAYLOAD_BYTES:
            raise ValueError(f"slot={slot}, payload of {payload_bytes} bytes: both up to 2**32 - 1 allowed")
        sequence = next(self._sequence) % _MAX_SEQUENCES  # a forged header may have been the last one
        return _BODY.pack(
            MAGIC,
            self.version,
            len(key),
            sequence.to_bytes(6, "little"),
            slot,
            payload_bytes,
            self.mark + nonce,
            checksum,
            key,
        )

    def parse(self, header: Bytes) -> Record | FailureCause:
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
        if not fingerprint.startswith(self.mark):
            return FailureCause.FOREIGN
        if not MIN_KEY_BYTES <= key_length <= MAX_KEY_BYTES:
            return FailureCause.CORRUPT
        return Record(OffloadKey(key[:key_length]), slot, length, int.from_bytes(sequence, "little"), checksum)

    def expect(self, header: Bytes, key: OffloadKey, slot: int) -> Record | FailureCause:
        """Return what `parse` does; FOREIGN for a header of another key or slot."""
        record = self.parse(header)
        if isinstance(record, Record) and (record.key != key or record.slot != slot):
            return FailureCause.FOREIGN
        return record
