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
    """

    segment: int
    offset: int
    slot: int
    positions: list[int]

    def split(self, block_bytes: int) -> Iterator[Run]:
        """Yield a run for each slot alone."""
        for index, position in enumerate(self.positions):
            yield Run(self.segment, self.offset + index * block_bytes, self.slot + index, [position])


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
