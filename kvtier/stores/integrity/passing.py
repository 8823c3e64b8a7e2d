"""One payload on its way to a store or back, piece by piece, while the processor's cache has the pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kvtier.keys import OffloadKey
from kvtier.stores.integrity.encrypted_seal import EncryptedSeal
from kvtier.stores.integrity.header import Seal
from kvtier.stores.integrity.secrets import Bytes
from kvtier.types import FailureCause


class Outgoing(Protocol):
    """A payload that leaves."""

    def take(self, piece: memoryview) -> memoryview:
        """Return what is to be stored of the next piece, of the same length; good until half a MiB more is taken."""
        ...

    def note(self, piece: memoryview) -> None:
        """Learn that the next piece has left, or is about to; each is noted once, in order, as it was given."""
        ...

    def header(self) -> bytes:
        """Return the header; called once, after the last piece."""
        ...


class Incoming(Protocol):
    """A payload that arrives before its header.

    Attributes:
        place: where it is to be put, in order.
    """

    place: memoryview

    def note(self, piece: memoryview, /) -> None:
        """Learn that the next piece is in its place."""
        ...

    def verify(self, header: Bytes) -> FailureCause | None:
        """Leave the payload in its buffer and return None, or return why not; called once, after the last piece."""
        ...


class PlainOutgoing:
    """Summed on its way."""

    def __init__(self, seal: Seal, key: OffloadKey, payload_bytes: int) -> None:
        self._seal, self._key, self._payload_bytes = seal, key, payload_bytes
        self._checksum = seal.checksum()
        self.note = self._checksum.update

    def take(self, piece: memoryview) -> memoryview:
        """Return the piece itself."""
        return piece

    def header(self) -> bytes:
        """Return the header."""
        return self._seal.seal_summed(self._key, self._payload_bytes, self._checksum.digest())


class PlainIncoming:
    """Summed on its way, and put where it belongs."""

    def __init__(self, seal: Seal, key: OffloadKey, buffer: memoryview, slot: int) -> None:
        self._seal, self._key, self._slot = seal, key, slot
        self._checksum = seal.checksum()
        self.place = buffer
        self.note = self._checksum.update

    def verify(self, header: Bytes) -> FailureCause | None:
        """Return whether the payload in its buffer is what was sealed."""
        return self._seal.verify_summed(header, self._key, self.place.nbytes, self._checksum.digest(), self._slot)


class EncryptedOutgoing:
    """Encrypted on its way, into private memory."""

    def __init__(
        self, seal: EncryptedSeal, key: OffloadKey, payload_bytes: int, memory: Callable[[int], memoryview]
    ) -> None:
        """Args: memory: gives private memory for a piece of so many bytes."""
        self._encryption = seal.begin(key, payload_bytes)
        self._memory = memory
        self.header = self._encryption.header

    def take(self, piece: memoryview) -> memoryview:
        """Return the encrypted piece."""
        encrypted = self._memory(piece.nbytes)
        self._encryption.update_into(piece, encrypted)
        return encrypted

    def note(self, piece: memoryview) -> None:
        """Nothing is left to do: the tag grew with the pieces."""


class EncryptedIncoming:
    """Collected in private memory; what it is decrypted with stands in the header."""

    def __init__(self, seal: EncryptedSeal, key: OffloadKey, buffer: memoryview, slot: int, place: memoryview) -> None:
        """Args: place: private memory as long as the buffer."""
        self._seal, self._key, self._buffer, self._slot = seal, key, buffer, slot
        self.place = place

    def note(self, piece: memoryview, /) -> None:
        """Nothing can be done with a piece yet."""

    def verify(self, header: Bytes) -> FailureCause | None:
        """Decrypt the payload into its buffer, if it is what was encrypted."""
        return self._seal.decrypt(header, self._key, self.place, self._buffer, self._slot)
