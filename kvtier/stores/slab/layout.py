"""All names and offsets on disk: the files in a slab's directory, and the place of each slot in them.

DIR/lock                        locked (flock) while a process uses the directory; contains its pid and kvtier's sign
DIR/<fingerprint>/              one folder per namespace, 32 hexadecimal digits
    namespace.json              describes the namespace; its modification time is the last use
    headers                     a record of 128 bytes per slot, that of slot *s* at byte 128 * s; zeros: empty
    data-00000 ...              the payloads, in segments of up to 1 GiB
DIR/dp0/ ...                    a slab of its own for each data-parallel rank
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self, TypeVar

from kvtier.errors import ConfigError
from kvtier.stores.integrity.header import HEADER_BYTES, MAX_PAYLOAD_BYTES, MAX_SLOT
from kvtier.stores.vectored import MAX_BUFFERS

V = TypeVar("V")

LOCK_NAME = "lock"
DESCRIPTION_NAME = "namespace.json"
HEADERS_NAME = "headers"
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_SHARE = re.compile(r"dp([0-9]{1,9})")
_DATA_FILE = re.compile(r"data-([0-9]{5}|[1-9][0-9]{5,6})")
SEGMENT_BYTES = 1 << 30
"""Most bytes per data file. It is part of the format, since the place of a slot depends on it."""
GROWTH_BYTES = 64 << 20
"""Most bytes that a slab allocates at once."""
MIN_GROWTHS = 16
"""A slab is allocated in at least this many steps, so that small slabs can share a directory, too."""
FIXED_BYTES = 32 << 10
"""Allowance for directories, the lock, `namespace.json` and the end of the last page of `headers`."""
FILESYSTEM_BYTES_PER_SLOT = 32
"""Allowance for the filesystem's metadata. In the worst case each slot is an extent of its own (12 bytes on ext4, 16 on
XFS), and so is the gap before it."""
FILESYSTEM_BYTES_PER_SEGMENT = 8 << 10
"""Allowance for the filesystem's metadata per data file."""


def data_name(segment: int) -> str:
    """Return the name of a data file."""
    return f"data-{segment:05d}"


def segment_of(name: str) -> int | None:
    """Return the number in a data file's name; None for any other name."""
    match = _DATA_FILE.fullmatch(name)
    return None if match is None else int(match[1])


def rank_of(name: str) -> int | None:
    """Return the rank in the name of a data-parallel rank's directory; None for any other name."""
    match = _SHARE.fullmatch(name)
    return None if match is None else int(match[1])


def is_fingerprint(name: str) -> bool:
    """Return whether a name has the form of a namespace's folder."""
    return _FINGERPRINT.fullmatch(name) is not None


def is_file_of_namespace(name: str) -> bool:
    """Return whether a name is that of one of kvtier's files in a namespace's folder."""
    return name in (DESCRIPTION_NAME, HEADERS_NAME) or segment_of(name) is not None


class Run(NamedTuple):
    """Neighbouring slots in one segment.

    Attributes:
        segment: number of the data file.
        offset: of the first payload in it, in bytes.
        slot: the first slot.
        positions: per slot, its index in the caller's sequence; a range if the run is the whole sequence.
    """

    segment: int
    offset: int
    slot: int
    positions: Sequence[int]

    def of(self, values: Sequence[V]) -> Sequence[V]:
        """Return those of the caller's values that belong to the run, in the order of its slots."""
        return values if isinstance(self.positions, range) else [values[position] for position in self.positions]

    def split(self, block_bytes: int) -> Iterator[Run]:
        """Yield one run per slot."""
        for index, position in enumerate(self.positions):
            yield Run(self.segment, self.offset + index * block_bytes, self.slot + index, [position])


@dataclass(frozen=True)
class SlabGeometry:
    """Slots, segments and offsets in bytes.

    The place of a slot depends only on `block_bytes`, so that the capacity may change.

    Attributes:
        num_slots: slots that fit the capacity; the last segment may be shorter than the others.
        slots_per_segment: slots per full segment.
        slots_per_growth: slots that are allocated at once.
    """

    block_bytes: int
    num_slots: int
    slots_per_segment: int
    slots_per_growth: int

    @classmethod
    def of(
        cls, capacity: int, block_bytes: int, segment_bytes: int = SEGMENT_BYTES, growth_bytes: int = GROWTH_BYTES
    ) -> Self:
        """Return the largest slab within `capacity` bytes, including records and the filesystem's metadata.

        Args:
            segment_bytes: most bytes per data file; must be the same at every start.
            growth_bytes: most bytes to allocate at once.

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
        """Return the geometry of an existing slab, which will not grow."""
        return cls(block_bytes, num_slots, SEGMENT_BYTES // block_bytes, slots_per_growth=1)

    @property
    def num_segments(self) -> int:
        """Number of data files of a full slab."""
        return -(-self.num_slots // self.slots_per_segment)

    @property
    def headers_bytes(self) -> int:
        """Length of the file of header records."""
        return self.num_slots * HEADER_BYTES

    def segment_bytes(self, segment: int) -> int:
        """Return the full length of a data file; 0 if the slab has no such file."""
        slots = self.num_slots - segment * self.slots_per_segment
        return max(0, min(slots, self.slots_per_segment)) * self.block_bytes

    def locate(self, slot: int) -> tuple[int, int]:
        """Return (segment, offset in bytes) of a slot's payload."""
        segment, index = divmod(slot, self.slots_per_segment)
        return segment, index * self.block_bytes

    def cost_bytes(self, lengths: Iterable[int]) -> int:
        """Return the most bytes that a slab with data files of these lengths takes, including all allowances."""
        total = FIXED_BYTES + self.headers_bytes
        for length in lengths:
            if length:
                slots = -(-length // self.block_bytes)
                total += length + slots * FILESYSTEM_BYTES_PER_SLOT + FILESYSTEM_BYTES_PER_SEGMENT
        return total

    def grown_bytes(self, segment: int, end: int) -> int:
        """Return the length that a data file gets when bytes up to `end` are needed."""
        step = self.slots_per_growth * self.block_bytes
        return min(self.segment_bytes(segment), -(-end // step) * step)


def coalesce(
    slots: Sequence[int], positions: Sequence[int], geometry: SlabGeometry, most: int | None = None
) -> list[Run]:
    """Return runs of at most `most` slots that cover `slots[p]` for each p in `positions`, sorted by slot."""
    longest = MAX_BUFFERS if most is None else min(most, MAX_BUFFERS)
    if 0 < len(positions) == len(slots) <= longest:
        # Most calls are one run: their blocks were placed together.
        first = slots[0]
        within = first % geometry.slots_per_segment + len(slots) <= geometry.slots_per_segment
        if within and list(slots) == list(range(first, first + len(slots))):
            return [Run(*geometry.locate(first), first, range(len(slots)))]
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
