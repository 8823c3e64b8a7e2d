"""Keys of blocks: the block hash, followed by the index of the KV cache group (4 bytes, big-endian)."""

from __future__ import annotations

from collections.abc import Collection
from typing import NewType

from kvtier.errors import KeyFormatError

OffloadKey = NewType("OffloadKey", bytes)
"""The key of one block; made by `make_offload_key` only."""

GROUP_BYTES = 4
MIN_KEY_BYTES = 1 + GROUP_BYTES
MAX_KEY_BYTES = 64 + GROUP_BYTES
"""The longest key that every tier can store: a 512-bit block hash and the group index."""


def make_offload_key(block_hash: bytes, group_idx: int) -> OffloadKey:
    """Make the key of one block.

    Args:
        block_hash: 1 to 64 bytes, equal for equal prefixes.
        group_idx: index of the KV cache group, 0 to 2**32 - 1.

    Raises:
        KeyFormatError: the hash is empty or too long, or the index does not fit.
    """
    if not 0 < len(block_hash) <= MAX_KEY_BYTES - GROUP_BYTES:
        raise KeyFormatError(f"block hash of {len(block_hash)} bytes: 1 to {MAX_KEY_BYTES - GROUP_BYTES} allowed")
    try:
        return OffloadKey(bytes(block_hash) + group_idx.to_bytes(GROUP_BYTES, "big"))
    except OverflowError:
        raise KeyFormatError(f"group index {group_idx}: 0 to 2**32 - 1 allowed") from None


def get_offload_block_hash(key: OffloadKey) -> bytes:
    """Return the block hash part of a key."""
    return key[:-GROUP_BYTES]


def get_offload_group_idx(key: OffloadKey) -> int:
    """Return the index of the KV cache group in a key."""
    return int.from_bytes(key[-GROUP_BYTES:], "big")


def common_key_bytes(keys: Collection[OffloadKey], expected: int | None) -> int:
    """Check that all keys have the same length, and return it in bytes.

    Args:
        keys: at least one key.
        expected: the length of earlier keys; None if there are none.

    Raises:
        KeyFormatError: a key is not bytes, is too short or too long, or differs in length.
    """
    try:
        b"".join(keys)  # raises TypeError unless all are bytes; quicker than a loop in Python over thousands of keys
    except TypeError:
        raise KeyFormatError("a key must be bytes made by make_offload_key") from None
    lengths = set(map(len, keys))
    if len(lengths) == 1:
        (length,) = lengths
        if length == expected:
            return length
        if expected is None and MIN_KEY_BYTES <= length <= MAX_KEY_BYTES:
            return length
    allowed = f"{expected}" if expected is not None else f"{MIN_KEY_BYTES} to {MAX_KEY_BYTES}, all equal"
    raise KeyFormatError(f"key lengths {sorted(lengths)} bytes: {allowed} allowed")
