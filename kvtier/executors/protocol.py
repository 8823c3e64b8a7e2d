"""The messages between a tier and its executor, and their bytes on the socket of an I/O process.

A packet is a msgpack array of messages, at most `MAX_PACKET_BYTES` long. Requests go to the process, reports come back.
Nothing is pickled, and every field has a type and a range. A peer can send wrong values, but it cannot run code here,
and it can take only a small multiple of the packet's length in memory. A packet that does not decode exactly is a
ProtocolError, and its receiver then treats the sender as dead. Both sides run the same kvtier on the same machine. So
the format has no version, and packed slots have the machine's byte order.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from kvtier.errors import ProtocolError
from kvtier.keys import MAX_KEY_BYTES, MIN_KEY_BYTES, OffloadKey
from kvtier.types import MOST_LISTED, FailureCause

T = TypeVar("T")

MAX_PACKET_BYTES = 64 * 1024
"""A Unix socket refuses packets over its send buffer, about 200 KiB by default. Small packets keep both sides busy."""

MAX_MESSAGES = 256
"""Most messages per packet."""

MAX_CANCELLED = 4096
"""Most jobs that one message cancels. Each takes at most 9 bytes of the packet."""

MAX_REASON_CHARACTERS = 400
MAX_CURSOR_BYTES = 1024
_MAX_PART_HEAD_BYTES = 64
"""Most bytes of a packet with one part, without the part's keys and slots."""
_MAX_ARRAY_HEAD_BYTES = 3
_MIN_ARRAY_KEYS = 64
"""Number of keys from which numpy splits them faster than `struct` does."""
_SLOT_BYTES = 4

Slots = Sequence[int] | npt.NDArray[np.int32]
"""Indices of slots; an array travels without a Python object per slot."""
U32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
U64 = Annotated[int, msgspec.Meta(ge=0)]
"""It needs no maximum, because msgpack has no larger integer."""
KeyBytes = Annotated[int, msgspec.Meta(ge=MIN_KEY_BYTES, le=MAX_KEY_BYTES)]
_KEY = msgspec.Meta(min_length=MIN_KEY_BYTES, max_length=MAX_KEY_BYTES)
Flags = Annotated[list[bool], msgspec.Meta(min_length=1, max_length=MAX_PACKET_BYTES)]
"""One per block. The maximum is checked before memory is taken for them."""


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Encoded as an array: its tag, then its fields in order."""


class _Keyed(_Message, frozen=True):
    """A message with the keys of many blocks in one field. Decoding a field per key would take longer than all else.

    Attributes:
        key_bytes: length of each key.
        joined_keys: the keys side by side.
    """

    key_bytes: KeyBytes
    joined_keys: bytes

    @property
    def keys(self) -> list[OffloadKey]:
        """The keys, split at every access."""
        return _split_keys(self.joined_keys, self.key_bytes)

    def _count(self) -> int:
        """Return the number of keys.

        Raises:
            ProtocolError: there are none, or a piece of one.
        """
        count, rest = divmod(len(self.joined_keys), self.key_bytes)
        if not count or rest:
            raise ProtocolError("no keys, or a piece of one")
        return count


class Open(_Message, frozen=True, tag=1):
    """The first request: which store to open, and how. It may hold secrets, so it is not on the command line.

    Attributes:
        description: of the store, as `StoreDescription.to_json` made it.
    """

    description: bytes


class Part(_Keyed, frozen=True, tag=2):
    """Asks to move consecutive blocks of one job.

    Attributes:
        serial: number of the job in its tier.
        first: index in the job of the first block.
        is_load: True to read from the store into the arena, False to write to the store.
        packed_arena_slots: slots of the primary arena, 4 bytes each.
        packed_store_slots: slots of the store, or None if keys are the location.
    """

    serial: U64
    first: U32
    is_load: bool
    packed_arena_slots: bytes
    packed_store_slots: bytes | None

    @classmethod
    def of(
        cls,
        serial: int,
        first: int,
        is_load: bool,
        keys: Sequence[OffloadKey],
        arena_slots: Slots,
        store_slots: Slots | None = None,
    ) -> Part:
        """Return the part of these blocks.

        Args:
            arena_slots, store_slots: an array is of int32, and the caller has made sure that none is negative.

        Raises:
            ProtocolError: there are not as many slots as keys, keys differ in length, or a slot does not fit 4 bytes.
        """
        packed = None if store_slots is None else _pack_slots(store_slots)
        return cls(*_join_keys(keys), serial, first, is_load, _pack_slots(arena_slots), packed)

    def __post_init__(self) -> None:
        length, store_slots = self._count() * _SLOT_BYTES, self.packed_store_slots
        if len(self.packed_arena_slots) != length or (store_slots is not None and len(store_slots) != length):
            raise ProtocolError("keys and slots differ in number")

    @property
    def num_blocks(self) -> int:
        """How many blocks move."""
        return len(self.packed_arena_slots) // _SLOT_BYTES

    @property
    def arena_slots(self) -> list[int]:
        """Slots of the primary arena, unpacked at every access."""
        return _unpack_slots(self.packed_arena_slots)

    @property
    def store_slots(self) -> list[int] | None:
        """Slots of the store, unpacked at every access; None if keys are the location."""
        return None if self.packed_store_slots is None else _unpack_slots(self.packed_store_slots)

    @property
    def has_store_slots(self) -> bool:
        """Whether the blocks have slots of the store."""
        return self.packed_store_slots is not None


class Probe(_Keyed, frozen=True, tag=3):
    """Asks which keys the store holds."""

    probe_id: U64

    @classmethod
    def of(cls, probe_id: int, keys: Sequence[OffloadKey]) -> Probe:
        """Return the question for `keys`.

        Raises:
            ProtocolError: there are none, or they differ in length.
        """
        return cls(*_join_keys(keys), probe_id)

    def __post_init__(self) -> None:
        self._count()


class Cancel(_Message, frozen=True, tag=4):
    """Asks to cancel the blocks of these jobs that no thread has begun.

    Attributes:
        serials: as in `Part`. Jobs that have ended are ignored.
    """

    serials: Annotated[list[U64], msgspec.Meta(min_length=1, max_length=MAX_CANCELLED)]

    @classmethod
    def of(cls, serials: Sequence[int]) -> list[Cancel]:
        """Return the fewest messages that these jobs fit into."""
        return [cls(list(serials[start : start + MAX_CANCELLED])) for start in range(0, len(serials), MAX_CANCELLED)]


class Delete(_Keyed, frozen=True, tag=13):
    """Asks to delete blocks.

    Attributes:
        packed_slots: of the store, 4 bytes each, or None if keys are the location.
    """

    chore_id: U64
    packed_slots: bytes | None

    @classmethod
    def of(cls, chore_id: int, keys: Sequence[OffloadKey], slots: Sequence[int] | None = None) -> Delete:
        """Return the question for `keys`.

        Raises:
            ProtocolError: as `Part.of`.
        """
        return cls(*_join_keys(keys), chore_id, None if slots is None else _pack_slots(slots))

    def __post_init__(self) -> None:
        length = self._count() * _SLOT_BYTES
        if self.packed_slots is not None and len(self.packed_slots) != length:
            raise ProtocolError("keys and slots differ in number")

    @property
    def slots(self) -> list[int] | None:
        """Slots of the store, unpacked at every access; None if keys are the location."""
        return None if self.packed_slots is None else _unpack_slots(self.packed_slots)


class Keep(_Keyed, frozen=True, tag=16):
    """Asks a store addressed by key which blocks it has, and to evict these after all others, for some seconds.

    If these are 0, the store is only asked.
    """

    chore_id: U64
    seconds: Annotated[float, msgspec.Meta(ge=0)]

    @classmethod
    def of(cls, chore_id: int, keys: Sequence[OffloadKey], seconds: float) -> Keep:
        """Return the question for `keys`.

        Raises:
            ProtocolError: as `Part.of`.
        """
        return cls(*_join_keys(keys), chore_id, seconds)

    def __post_init__(self) -> None:
        self._count()


class ListKeys(_Message, frozen=True, tag=14):
    """Asks for a page of the keys that a store addressed by key holds."""

    chore_id: U64
    cursor: Annotated[bytes, msgspec.Meta(max_length=MAX_CURSOR_BYTES)]
    most: Annotated[int, msgspec.Meta(ge=1, le=MOST_LISTED)]


class Ready(_Message, frozen=True, tag=5):
    """The store is open; `num_slots` is 0 for stores addressed by key. The index follows."""

    num_slots: U32


class Unavailable(_Message, frozen=True, tag=6):
    """The store cannot be opened, or must be opened anew; the tier ends this executor."""

    reason: Annotated[str, msgspec.Meta(max_length=MAX_REASON_CHARACTERS)]

    @classmethod
    def because(cls, reason: object) -> Unavailable:
        """Return the report with `reason` cut to `MAX_REASON_CHARACTERS`. Characters without UTF-8 are replaced."""
        return cls(str(reason)[:MAX_REASON_CHARACTERS].encode(errors="replace").decode())


class IndexBatch(_Keyed, frozen=True, tag=7):
    """Blocks that an earlier process left in the store, oldest first."""

    packed_slots: bytes

    @classmethod
    def of(cls, slots: Sequence[int], keys: Sequence[OffloadKey]) -> IndexBatch:
        """Return the batch of `keys`, each in its slot of the store.

        Raises:
            ProtocolError: as `Part.of`.
        """
        return cls(*_join_keys(keys), _pack_slots(slots))

    def __post_init__(self) -> None:
        if len(self.packed_slots) != self._count() * _SLOT_BYTES:
            raise ProtocolError("keys and slots differ in number")

    @property
    def slots(self) -> list[int]:
        """Slots of the store, unpacked at every access."""
        return _unpack_slots(self.packed_slots)


class IndexEnd(_Message, frozen=True, tag=8):
    """The index is complete, and the store accepts jobs."""


class PartResult(_Message, frozen=True, tag=9):
    """The result of a part, or of a piece of one: success per block, bytes moved, failed blocks by cause."""

    serial: U64
    first: U32
    successes: Flags
    num_bytes: U64 = 0
    failures: dict[FailureCause, U32] = {}

    @property
    def span(self) -> slice:
        """The blocks of the job that this is the result of."""
        return slice(self.first, self.first + len(self.successes))


class ProbeAnswer(_Message, frozen=True, tag=10):
    """Whether each key of a probe is held; `failed` means the store could not say."""

    probe_id: U64
    found: Flags
    failed: bool = False


class Prepared(_Message, frozen=True, tag=11):
    """How many bytes of its medium a store has prepared by writing them ahead, and how many there are."""

    done: U64
    total: U64


class Usage(_Message, frozen=True, tag=12):
    """How full a store addressed by key is, and what it has saved, as `StoreUsage`."""

    blocks: U64 | None
    bytes: U64 | None
    capacity_bytes: U64 | None
    compressed_blocks: U64 = 0
    unwritten_bytes: U64 = 0
    unread_bytes: U64 = 0


class ChoreDone(_Message, frozen=True, tag=15):
    """The end of a chore.

    Attributes:
        failed: whether the store could not do it.
        keys: of the page, or those that a `Keep` has found; empty for a `Delete`.
        cursor: of the page.
    """

    chore_id: U64
    failed: bool
    keys: Annotated[list[Annotated[bytes, _KEY]], msgspec.Meta(max_length=2 * MOST_LISTED)] = []
    cursor: Annotated[bytes, msgspec.Meta(max_length=MAX_CURSOR_BYTES)] | None = None


Chore = Delete | Keep | ListKeys
"""Work for a store besides moving blocks and telling which it has."""
Request = Open | Part | Probe | Cancel | Chore
StoreReport = Ready | Unavailable | IndexBatch | IndexEnd | PartResult | ProbeAnswer | Prepared | Usage | ChoreDone

_Packet = msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)
_ENCODER = msgspec.msgpack.Encoder()
REQUESTS: msgspec.msgpack.Decoder[list[Request]] = msgspec.msgpack.Decoder(Annotated[list[Request], _Packet])
REPORTS: msgspec.msgpack.Decoder[list[StoreReport]] = msgspec.msgpack.Decoder(Annotated[list[StoreReport], _Packet])


def blocks_per_packet(key_bytes: int) -> int:
    """Return the most blocks, with two slots each, that fit one packet."""
    return (MAX_PACKET_BYTES - _MAX_PART_HEAD_BYTES) // (key_bytes + 2 * _SLOT_BYTES)


def encode(messages: Sequence[Request | StoreReport]) -> tuple[bytes, int]:
    """Return one packet with the first of `messages`, as many as fit, and how many these are.

    Raises:
        ProtocolError: there are none, the first one alone does not fit a packet, or a value has no encoding.
    """
    first = messages[:MAX_MESSAGES]
    try:
        packet = _ENCODER.encode(first)
        if len(packet) <= MAX_PACKET_BYTES and first:
            return packet, len(first)
        encoded = list(map(_ENCODER.encode, first))
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"a message that cannot be encoded: {error}") from error
    lengths = accumulate(map(len, encoded), initial=_MAX_ARRAY_HEAD_BYTES)
    count = sum(length <= MAX_PACKET_BYTES for length in lengths) - 1
    if count < 1:
        raise ProtocolError(f"no message, or one of more than {MAX_PACKET_BYTES} bytes")
    return _ENCODER.encode(list(map(msgspec.Raw, encoded[:count]))), count


def decode(packet: bytes | memoryview, direction: msgspec.msgpack.Decoder[T]) -> T:
    """Return the messages of a packet.

    Args:
        direction: `REQUESTS` or `REPORTS`.

    Raises:
        ProtocolError: the packet is too long, malformed, or has a message that this direction does not allow.
    """
    if len(packet) > MAX_PACKET_BYTES:
        raise ProtocolError(f"a packet of {len(packet)} bytes")
    try:
        return direction.decode(packet)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"malformed packet: {error}") from error


def _join_keys(keys: Sequence[OffloadKey]) -> tuple[int, bytes]:
    """Return the common length of the keys, and the keys side by side."""
    key_bytes = len(keys[0]) if keys else 0
    if set(map(len, keys)) != {key_bytes} or not MIN_KEY_BYTES <= key_bytes <= MAX_KEY_BYTES:
        raise ProtocolError(f"no keys, keys of different lengths, or not of {MIN_KEY_BYTES} to {MAX_KEY_BYTES} bytes")
    return key_bytes, b"".join(keys)


def _split_keys(joined: bytes, key_bytes: int) -> list[OffloadKey]:
    count = len(joined) // key_bytes
    if count < _MIN_ARRAY_KEYS:
        return list(struct.unpack(f"{key_bytes}s" * count, joined))  # `struct` keeps the formats it has compiled
    keys: list[OffloadKey] = np.frombuffer(joined, f"V{key_bytes}", count).tolist()
    return keys


def _pack_slots(slots: Slots) -> bytes:
    if isinstance(slots, np.ndarray):
        return slots.tobytes()
    try:
        return array("I", slots).tobytes()
    except (OverflowError, TypeError) as error:
        raise ProtocolError(f"a slot that does not fit 4 bytes: {error}") from error


def _unpack_slots(packed: bytes) -> list[int]:
    return memoryview(packed).cast("I").tolist()
