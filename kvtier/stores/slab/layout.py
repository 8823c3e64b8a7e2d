"""Every name and every offset on disk: what a slab's directory holds, and where a slot is in it.

DIR/lock                        held (flock) as long as a process uses the directory; holds its pid and our sign
DIR/<fingerprint>/              one folder a namespace, 32 hexadecimal digits
    namespace.json              what the fingerprint stands for; its time of change is the last use
    headers                     a record of 128 bytes per slot, that of slot *s* at byte 128 * s; zeros: empty
    data-00000 ...              the payloads, in segments of up to 1 GiB
DIR/dp0/ ...                    a slab of its own for each data-parallel rank
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from kvtier.errors import ConfigError
from kvtier.stores.integrity.header import HEADER_BYTES, MAX_PAYLOAD_BYTES, MAX_SLOT
from kvtier.stores.vectored import MAX_BUFFERS

LOCK_NAME = "lock"
DESCRIPTION_NAME = "namespace.json"
HEADERS_NAME = "headers"
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_SHARE = re.compile(r"dp([0-9]{1,9})")
_DATA_FILE = re.compile(r"data-([0-9]{5}|[1-9][0-9]{5,6})")
SEGMENT_BYTES = 1 << 30
"""Most bytes of one data file; part of the format, since it decides where a slot is."""
GROWTH_BYTES = 64 << 20
"""Most space that a slab takes from the filesystem at once."""
MIN_GROWTHS = 16
"""A slab takes its space in at least so many steps, so that small slabs can share a directory, too."""
FIXED_BYTES = 32 << 10
"""Allowance for directories, the lock, `namespace.json` and the end of the last page of `headers`."""
FILESYSTEM_BYTES_PER_SLOT = 32
"""Allowance for the filesystem's own records: at worst every slot is an extent (12 bytes on ext4, 16 on XFS),
and so is the gap before it."""
FILESYSTEM_BYTES_PER_SEGMENT = 8 << 10
"""Allowance for the roots of those records."""


def data_name(segment: int) -> str:
    """Return the name of a data file."""
    return f"data-{segment:05d}"


def segment_of(name: str) -> int | None:
    """Return which data file has this name; None for any other name."""
    match = _DATA_FILE.fullmatch(name)
    return None if match is None else int(match[1])


def rank_of(name: str) -> int | None:
    """Return which rank's directory has this name; None for any other name."""
    match = _SHARE.fullmatch(name)
    return None if match is None else int(match[1])


def is_fingerprint(name: str) -> bool:
    """Return whether a namespace's folder may have this name."""
    return _FINGERPRINT.fullmatch(name) is not None


def is_file_of_namespace(name: str) -> bool:
    """Return whether a file in a namespace's folder has a name that we give."""
    return name in (DESCRIPTION_NAME, HEADERS_NAME) or segment_of(name) is not None


class Run(NamedTuple):
    """Neighbours in one segment.

    Attributes:
        segment: number of the data file.
        offset: where the first payload starts in it, bytes.
        slot: the first slot.
        positions: where the slots stand in the caller's sequence, in the order of the slots.
    """

    segment: int
    offset: int
    slot: int
    positions: list[int]

    def split(self, block_bytes: int) -> Iterator[Run]:
        """Yield a run for each slot alone."""
        for index, position in enumerate(self.positions):
            yield Run(self.segment, self.offset + index * block_bytes, self.slot + index, [position])


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
    def of(
        cls, capacity: int, block_bytes: int, segment_bytes: int = SEGMENT_BYTES, growth_bytes: int = GROWTH_BYTES
    ) -> Self:
        """Return the largest slab within `capacity` bytes, headers and the filesystem's records included.

        Args:
            segment_bytes: most bytes of one data file; the same at every start.
            growth_bytes: most bytes that are taken from the filesystem at once.

        Raises:
            ConfigError: the capacity does not hold one block, or a block is larger than a segment.
        """
        if not 1 <= block_bytes <= min(segment_bytes, MAX_PAYLOAD_BYTES):
            raise ConfigError("block_bytes", block_bytes, f"1 to {segment_bytes} bytes")
        slots_per_segment = segment_bytes // block_bytes
        slot_cost = block_bytes + HEADER_BYTES + FILESYSTEM_BYTES_PER_SLOT
        segment_cost = slots_per_segment * slot_cost + FILESYSTEM_BYTES_PER_SEGMENT
        full_segments, rest = divmod(max(0, capacity - FIXED_BYTES), segment_cost)
        num_slots = full_segments * slots_per_segment + max(0, rest - FILESYSTEM_BYTES_PER_SEGMENT) // slot_cost
        num_slots = min(num_slots, MAX_SLOT)
        if num_slots < 1:
            least = FIXED_BYTES + FILESYSTEM_BYTES_PER_SEGMENT + slot_cost
            raise ConfigError("capacity", capacity, f"at least {least} bytes, for one block of {block_bytes}")
        slots_per_growth = max(1, min(growth_bytes // block_bytes, num_slots // MIN_GROWTHS))
        return cls(block_bytes, num_slots, slots_per_segment, slots_per_growth)

    @classmethod
    def found(cls, block_bytes: int, num_slots: int) -> Self:
        """Return the geometry of a slab that exists and does not grow, from what its records say."""
        return cls(block_bytes, num_slots, SEGMENT_BYTES // block_bytes, slots_per_growth=1)

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


def coalesce(
    slots: Sequence[int], positions: Sequence[int], geometry: SlabGeometry, most: int | None = None
) -> list[Run]:
    """Return runs over `slots[p]` for p in `positions`, in the order of the slots; none longer than `most`."""
    longest = MAX_BUFFERS if most is None else min(most, MAX_BUFFERS)
    runs: list[Run] = []
    run: list[int] = []
    end = -1
    for position in sorted(positions, key=slots.__getitem__):
        slot = slots[position]
        if slot == end and slot % geometry.slots_per_segment and len(run) < longest:
            run.append(position)
        else:
            run = [position]
            runs.append(Run(*geometry.locate(slot), slot, run))
        end = slot + 1
    return runs
