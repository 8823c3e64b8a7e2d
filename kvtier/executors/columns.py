"""Columns of a packet: keys of one length, slots, bitmaps. What does not fit exactly is a ValueError."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from kvtier.keys import MAX_KEY_BYTES, MIN_KEY_BYTES, OffloadKey

_MANY = 16
"""Keys from which on an array is quicker than a loop."""


def join_keys(keys: Sequence[OffloadKey]) -> tuple[int, bytes]:
    """Return the one length of the keys, and the keys side by side."""
    joined = b"".join(keys)
    key_bytes = len(keys[0]) if keys else MIN_KEY_BYTES
    if len(set(map(len, keys))) > 1:
        raise ValueError("keys of different lengths")
    return key_bytes, joined


def split_keys(packet: bytes, offset: int, count: int, key_bytes: int) -> list[OffloadKey]:
    """Return `count` keys that end the packet."""
    if not MIN_KEY_BYTES <= key_bytes <= MAX_KEY_BYTES:
        raise ValueError(f"keys of {key_bytes} bytes")
    if not count or len(packet) != offset + count * key_bytes:
        raise ValueError(f"{len(packet)} bytes do not hold {count} keys of {key_bytes} bytes")
    if count < _MANY:
        return [OffloadKey(packet[at : at + key_bytes]) for at in range(offset, len(packet), key_bytes)]
    keys: list[OffloadKey] = np.frombuffer(packet, f"V{key_bytes}", count, offset).tolist()
    return keys


def pack_slots(slots: Sequence[int]) -> bytes:
    """Return slots as 4 bytes each."""
    return struct.pack(f"<{len(slots)}I", *slots)


def unpack_slots(packet: bytes, offset: int, count: int) -> list[int]:
    """Return `count` slots that begin at `offset`."""
    return list(struct.unpack_from(f"<{count}I", packet, offset))


def pack_bits(bits: Sequence[bool]) -> bytes:
    """Return a bitmap, the first bit lowest."""
    if False not in bits:
        return ((1 << len(bits)) - 1).to_bytes((len(bits) + 7) // 8, "little")
    return np.packbits(np.asarray(bits, dtype=np.bool_), bitorder="little").tobytes()


def unpack_bits(packet: bytes, offset: int, count: int) -> list[bool]:
    """Return `count` bits that begin at `offset`."""
    length = (count + 7) // 8
    if not count or len(packet) < offset + length:
        raise ValueError(f"no room for {count} bits")
    value = int.from_bytes(packet[offset : offset + length], "little")
    if value >> count:
        raise ValueError("stray bits")
    if value == (1 << count) - 1:
        return [True] * count
    return [bool(value >> index & 1) for index in range(count)]
