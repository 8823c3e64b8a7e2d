"""Adjacent slots as runs: one run is one vectored call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvtier.stores.slab.geometry import SlabGeometry
from kvtier.stores.slab.vectored import MAX_BUFFERS


class Run(NamedTuple):
    """Neighbours in one segment.

    Attributes:
        segment: number of the data file.
        offset: where the first payload starts in it, bytes.
        slot: the first slot.
        positions: where the slots stand in the caller's sequence, in the order of the slots.
        aligned: whether all their buffers are page aligned.
    """

    segment: int
    offset: int
    slot: int
    positions: list[int]
    aligned: bool

    def split(self, block_bytes: int) -> Iterator[Run]:
        """Yield a run for each slot alone."""
        for index, position in enumerate(self.positions):
            yield Run(self.segment, self.offset + index * block_bytes, self.slot + index, [position], self.aligned)


def coalesce(
    slots: Sequence[int], positions: Sequence[int], aligned: Sequence[bool], geometry: SlabGeometry
) -> list[Run]:
    """Return runs over `slots[p]` for p in `positions`, in the order of the slots.

    Args:
        aligned: per slot of the caller's sequence, whether its buffer is page aligned.
    """
    runs: list[Run] = []
    for position in sorted(positions, key=slots.__getitem__):
        slot = slots[position]
        last = runs[-1] if runs else None
        if (
            last is not None
            and slot == last.slot + len(last.positions)
            and slot % geometry.slots_per_segment
            and aligned[position] == last.aligned
            and len(last.positions) < MAX_BUFFERS
        ):
            last.positions.append(position)
        else:
            runs.append(Run(*geometry.locate(slot), slot, [position], aligned[position]))
    return runs
