"""Where everything is in a slab of a given capacity: arithmetic only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from kvtier.errors import ConfigError
from kvtier.stores.integrity.header import HEADER_BYTES, MAX_PAYLOAD_BYTES, MAX_SLOT

SEGMENT_BYTES = 1 << 30
"""Most bytes of one data file; part of the format, since it decides where a slot is."""
GROWTH_BYTES = 64 << 20
"""Space is taken from the filesystem in steps of this size at most,"""
GROWTHS = 16
"""and in at least so many steps, so that small slabs can share a directory, too."""
FIXED_BYTES = 32 << 10
"""Allowance for directories, the lock, `namespace.json` and the end of the last page of `headers`."""
FILESYSTEM_BYTES_PER_SLOT = 32
"""Allowance for the filesystem's own records: at worst every slot is an extent (12 bytes on ext4, 16 on XFS),
and so is the gap before it."""
FILESYSTEM_BYTES_PER_SEGMENT = 8 << 10
"""Allowance for the roots of those records."""


def slots_of_segment(block_bytes: int) -> int:
    """Return how many blocks a full data file holds."""
    return SEGMENT_BYTES // block_bytes


@dataclass(frozen=True)
class SlabGeometry:
    """Slots, segments and offsets, in bytes.

    A slot's place depends on `block_bytes` only, so that a slab may grow and shrink.

    Attributes:
        num_slots: slots that fit; the last segment may be shorter than the others.
        slots_per_segment: slots of a full segment.
        slots_per_growth: slots for which space is taken at once.
    """

    block_bytes: int
    num_slots: int
    slots_per_segment: int
    slots_per_growth: int

    @classmethod
    def of(cls, capacity: int, block_bytes: int) -> Self:
        """Return the largest slab within `capacity` bytes, headers and the filesystem's records included.

        Raises:
            ConfigError: the capacity does not hold one block, or a block is larger than a segment.
        """
        if not 1 <= block_bytes <= min(SEGMENT_BYTES, MAX_PAYLOAD_BYTES):
            raise ConfigError("block_bytes", block_bytes, f"1 to {SEGMENT_BYTES} bytes")
        slots_per_segment = slots_of_segment(block_bytes)
        slot_cost = block_bytes + HEADER_BYTES + FILESYSTEM_BYTES_PER_SLOT
        segment_cost = slots_per_segment * slot_cost + FILESYSTEM_BYTES_PER_SEGMENT
        full_segments, rest = divmod(max(0, capacity - FIXED_BYTES), segment_cost)
        num_slots = full_segments * slots_per_segment + max(0, rest - FILESYSTEM_BYTES_PER_SEGMENT) // slot_cost
        num_slots = min(num_slots, MAX_SLOT)
        if num_slots < 1:
            least = FIXED_BYTES + FILESYSTEM_BYTES_PER_SEGMENT + slot_cost
            raise ConfigError("capacity", capacity, f"at least {least} bytes, for one block of {block_bytes}")
        slots_per_growth = max(1, min(GROWTH_BYTES // block_bytes, num_slots // GROWTHS))
        return cls(block_bytes, num_slots, slots_per_segment, slots_per_growth)

    @property
    def num_segments(self) -> int:
        """Data files of a full slab."""
        return -(-self.num_slots // self.slots_per_segment)

    @property
    def headers_bytes(self) -> int:
        """Length of the file of header records."""
        return self.num_slots * HEADER_BYTES

    def segment_bytes(self, segment: int) -> int:
        """Return the full length of a data file; 0 beyond the last."""
        slots = self.num_slots - segment * self.slots_per_segment
        return max(0, min(slots, self.slots_per_segment)) * self.block_bytes

    def locate(self, slot: int) -> tuple[int, int]:
        """Return (segment, offset in bytes) of a slot's payload."""
        segment, index = divmod(slot, self.slots_per_segment)
        return segment, index * self.block_bytes

    def cost_bytes(self, lengths: Iterable[int]) -> int:
        """Return the most bytes a slab takes whose data files have these lengths, every allowance included."""
        total = FIXED_BYTES + self.headers_bytes
        for length in lengths:
            if length:
                slots = -(-length // self.block_bytes)
                total += length + slots * FILESYSTEM_BYTES_PER_SLOT + FILESYSTEM_BYTES_PER_SEGMENT
        return total

    def grown_bytes(self, segment: int, end: int) -> int:
        """Return the length to which a data file grows when bytes up to `end` are about to be written."""
        step = self.slots_per_growth * self.block_bytes
        return min(self.segment_bytes(segment), -(-end // step) * step)
