"""How payloads lie in a store: as they are, or encrypted; each with a header that vouches for it.

A store moves what it is given and asks here what that is, so that one code serves both. Payloads are never encrypted
where they are, since others read the arena at the same time, and never decrypted where others look before they have
verified.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.stores.integrity.encrypted_seal import EncryptedSeal
from kvtier.stores.integrity.header import BlockHeaders, Seal
from kvtier.stores.integrity.passing import (
    EncryptedIncoming,
    EncryptedOutgoing,
    Incoming,
    Outgoing,
    PlainIncoming,
    PlainOutgoing,
)
from kvtier.stores.integrity.scratch import Bounce, whole_pages
from kvtier.stores.integrity.secrets import TAG_BYTES, Authenticator, Bytes, Guard, PayloadCipher, SecretPlace
from kvtier.types import FailureCause

BOUNCE_BYTES = 16 << 20
"""Most private memory that a thread keeps, or one block."""
PORTION_BYTES = 1 << 20
"""Of what is read at once into private memory and then copied: less than a processor's own cache has."""
NO_SLOTS: Iterable[int] = itertools.repeat(0)
"""For stores in which the key is the place."""


class Wrapped(NamedTuple):
    """What is to be stored: payloads as long as they were, and a header for each."""

    payloads: Sequence[memoryview]
    headers: list[bytes]


class Envelope(ABC):
    """What one namespace's payloads are put into. Threads may share it; memory that it hands out is the thread's own.

    Attributes:
        namespace: where the blocks are; it decides about names and paths.
        headers: what reads headers.
    """

    def __init__(self, namespace: Namespace, headers: BlockHeaders) -> None:
        self.namespace = namespace
        self.headers = headers

    @staticmethod
    def open(options: Mapping[str, Any], namespace: Namespace) -> tuple[dict[str, Any], Envelope]:
        """Return a store's options without those of `SecretPlace`, and the envelope that these ask for.

        Raises:
            StoreUnavailableError: the secret cannot be read.
        """
        others, guard = SecretPlace.split(options, namespace)
        return others, Envelope.of(guard, namespace)

    @staticmethod
    def of(guard: Guard | None, namespace: Namespace) -> Envelope:
        """Return the envelope of a namespace, or of the one that who guards it makes of it."""
        if isinstance(guard, PayloadCipher):
            return EncryptedEnvelope(guard)
        return PlainEnvelope.under(guard, namespace)

    def most_blocks(self, block_bytes: int) -> int | None:
        """Return how many blocks one call of `wrap` takes; None for any number."""
        return None

    def most_places(self, block_bytes: int) -> int | None:
        """Return how many blocks one call of `places` takes; None for any number."""
        return self.most_blocks(block_bytes)

    def has_portions(self, block_bytes: int) -> bool:
        """Return whether a payload is better read in portions of `PORTION_BYTES`, each into its own `places`.

        Each portion is noted by what `incoming` returned and copied to its buffer before the next one is read.
        """
        return False

    def apart(self) -> Envelope:
        """Return an envelope for the same blocks that receives payloads in private memory, for direct I/O."""
        return self

    @abstractmethod
    def wrap(
        self, keys: Sequence[OffloadKey], payloads: Sequence[memoryview], slots: Iterable[int] = NO_SLOTS
    ) -> Wrapped:
        """Return what is to be stored of payloads; good until this thread's next call."""

    @abstractmethod
    def places(self, buffers: Sequence[memoryview]) -> Sequence[memoryview]:
        """Return where a store should put what it reads for `buffers`; good until this thread's next call."""

    @abstractmethod
    def unwrap(
        self,
        headers: Sequence[Bytes],
        keys: Sequence[OffloadKey],
        places: Sequence[memoryview],
        buffers: Sequence[memoryview],
        slots: Iterable[int] = NO_SLOTS,
    ) -> list[FailureCause | None]:
        """Leave the payloads read into `places` in `buffers`; return, each, None if it verified, else the cause.

        Args:
            places: what `places(buffers)` returned; nothing else was asked for since.

        A buffer whose payload did not verify may hold anything.
        """

    @abstractmethod
    def wrap_into(self, key: OffloadKey, payload: memoryview, target: memoryview) -> bytes:
        """Put what is to be stored of a payload into `target`, of the same length and elsewhere; return the header."""

    @abstractmethod
    def unwrap_apart(
        self, header: Bytes, key: OffloadKey, stored: memoryview, buffer: memoryview
    ) -> FailureCause | None:
        """Do as `unwrap` for one block in memory of its own; a buffer whose payload did not verify is untouched."""

    @abstractmethod
    def outgoing(self, key: OffloadKey, payload_bytes: int) -> Outgoing:
        """Return what takes a payload in pieces of at most `RING_BYTES / 4`, for a header that follows it."""

    @abstractmethod
    def incoming(self, key: OffloadKey, buffer: memoryview, slot: int = 0) -> Incoming:
        """Return what receives a payload for `buffer`, and then its header; one at a time for a thread."""


class PlainEnvelope(Envelope):
    """Payloads as they are; nothing is copied."""

    def __init__(self, namespace: Namespace, seal: Seal) -> None:
        """Args: namespace: the one that the seal seals for."""
        self.seal = seal
        super().__init__(namespace, seal)

    @classmethod
    def under(cls, authenticator: Authenticator | None, namespace: Namespace) -> Self:
        """Return the envelope of a namespace, or of the one that an authenticator makes of it."""
        own = namespace if authenticator is None else authenticator.namespace
        return cls(own, Seal(namespace, authenticator))

    def wrap(
        self, keys: Sequence[OffloadKey], payloads: Sequence[memoryview], slots: Iterable[int] = NO_SLOTS
    ) -> Wrapped:
        """Return the payloads themselves."""
        summed = zip(keys, payloads, self.seal.checksums(payloads), slots, strict=False)
        seal = self.seal.seal_summed
        return Wrapped(payloads, [seal(key, payload.nbytes, sum_, slot) for key, payload, sum_, slot in summed])

    def apart(self) -> Envelope:
        """Return one that copies what it receives."""
        return ApartEnvelope(self.namespace, self.seal)

    def places(self, buffers: Sequence[memoryview]) -> Sequence[memoryview]:
        """Return the buffers themselves."""
        return buffers

    def unwrap(
        self,
        headers: Sequence[Bytes],
        keys: Sequence[OffloadKey],
        places: Sequence[memoryview],
        buffers: Sequence[memoryview],
        slots: Iterable[int] = NO_SLOTS,
    ) -> list[FailureCause | None]:
        """Verify the payloads where they are."""
        summed = zip(headers, keys, places, self.seal.checksums(places), slots, strict=False)
        verify = self.seal.verify_summed
        return [verify(header, key, place.nbytes, sum_, slot) for header, key, place, sum_, slot in summed]

    def wrap_into(self, key: OffloadKey, payload: memoryview, target: memoryview) -> bytes:
        """Copy the payload, and seal the copy."""
        target[:] = payload
        return self.seal.seal(key, target)

    def unwrap_apart(
        self, header: Bytes, key: OffloadKey, stored: memoryview, buffer: memoryview
    ) -> FailureCause | None:
        """Verify, and copy."""
        cause = self.seal.verify(header, key, stored)
        if cause is None:
            buffer[:] = stored
        return cause

    def outgoing(self, key: OffloadKey, payload_bytes: int) -> Outgoing:
        """Return what sums the pieces."""
        return PlainOutgoing(self.seal, key, payload_bytes)

    def incoming(self, key: OffloadKey, buffer: memoryview, slot: int = 0) -> Incoming:
        """Return what sums the pieces."""
        return PlainIncoming(self.seal, key, buffer, slot)


class ApartEnvelope(PlainEnvelope):
    """Payloads received in private memory, and copied from there.

    A device moves its bytes into few large pages much faster than into many small ones, and an arena that several
    processes share has small ones on most systems. The copy costs processor time (docs/performance.md has both), least
    in portions that stay in the processor's cache: several small blocks, or a piece of a large one.
    """

    def __init__(self, namespace: Namespace, seal: Seal) -> None:
        super().__init__(namespace, seal)
        self._bounce = Bounce()

    def most_places(self, block_bytes: int) -> int | None:
        """Return how many blocks stay in the cache until they are copied."""
        return max(1, PORTION_BYTES // whole_pages(block_bytes))

    def has_portions(self, block_bytes: int) -> bool:
        """Return whether a block would not stay in the cache."""
        return block_bytes > PORTION_BYTES

    def places(self, buffers: Sequence[memoryview]) -> Sequence[memoryview]:
        """Return private memory, on a page boundary for each buffer."""
        return self._bounce.like(buffers)

    def unwrap(
        self,
        headers: Sequence[Bytes],
        keys: Sequence[OffloadKey],
        places: Sequence[memoryview],
        buffers: Sequence[memoryview],
        slots: Iterable[int] = NO_SLOTS,
    ) -> list[FailureCause | None]:
        """Verify the payloads where they are, and copy those that did."""
        causes = super().unwrap(headers, keys, places, buffers, slots)
        for cause, place, buffer in zip(causes, places, buffers, strict=True):
            if cause is None:
                buffer[:] = place
        return causes


class EncryptedEnvelope(Envelope):
    """Payloads encrypted on their way through private memory."""

    def __init__(self, cipher: PayloadCipher) -> None:
        self.seal = EncryptedSeal.of(cipher)
        super().__init__(cipher.namespace, self.seal)
        self._bounce = Bounce(TAG_BYTES)

    def most_blocks(self, block_bytes: int) -> int | None:
        """Return how many blocks the private memory of a thread holds."""
        return max(1, BOUNCE_BYTES // whole_pages(block_bytes + TAG_BYTES))

    def most_places(self, block_bytes: int) -> int | None:
        """Return how many blocks stay in the cache until they are decrypted."""
        return max(1, PORTION_BYTES // whole_pages(block_bytes + TAG_BYTES))

    def wrap(
        self, keys: Sequence[OffloadKey], payloads: Sequence[memoryview], slots: Iterable[int] = NO_SLOTS
    ) -> Wrapped:
        """Encrypt the payloads into private memory, on a page boundary each."""
        targets = self._bounce.like(payloads)
        blocks = zip(keys, payloads, self._bounce.rooms, slots, strict=False)
        return Wrapped(targets, [self.seal.encrypt_whole(key, load, room, slot) for key, load, room, slot in blocks])

    def places(self, buffers: Sequence[memoryview]) -> Sequence[memoryview]:
        """Return private memory, on a page boundary for each buffer."""
        return self._bounce.like(buffers)

    def unwrap(
        self,
        headers: Sequence[Bytes],
        keys: Sequence[OffloadKey],
        places: Sequence[memoryview],
        buffers: Sequence[memoryview],
        slots: Iterable[int] = NO_SLOTS,
    ) -> list[FailureCause | None]:
        """Decrypt from the places, those that this thread was given last, into the buffers."""
        decrypt = self.seal.decrypt_whole
        blocks = zip(headers, keys, self._bounce.rooms, buffers, slots, strict=False)
        return [decrypt(header, key, room, buffer, slot) for header, key, room, buffer, slot in blocks]

    def wrap_into(self, key: OffloadKey, payload: memoryview, target: memoryview) -> bytes:
        """Encrypt the payload."""
        return self.seal.encrypt(key, payload, target)

    def unwrap_apart(
        self, header: Bytes, key: OffloadKey, stored: memoryview, buffer: memoryview
    ) -> FailureCause | None:
        """Decrypt into private memory, and copy if it verified."""
        (decrypted,) = self._bounce.like([buffer])
        cause = self.seal.decrypt(header, key, stored, decrypted)
        if cause is None:
            buffer[:] = decrypted
        return cause

    def outgoing(self, key: OffloadKey, payload_bytes: int) -> Outgoing:
        """Return what encrypts the pieces."""
        return EncryptedOutgoing(self.seal, key, payload_bytes, self._bounce.next_piece)

    def incoming(self, key: OffloadKey, buffer: memoryview, slot: int = 0) -> Incoming:
        """Return what collects the pieces."""
        return EncryptedIncoming(self.seal, key, buffer, slot, *self._bounce.like([buffer]))
