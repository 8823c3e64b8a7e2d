"""A part is cut into pieces, of one call into a store each. A piece is a range of the part's blocks, and no copy."""

from __future__ import annotations

from collections.abc import Sequence

from kvtier.executors.protocol import Part
from kvtier.keys import OffloadKey


class Piece:
    """Consecutive blocks of a part.

    The part's keys and slots are unpacked once, for all of its pieces.

    Attributes:
        serial, is_load: as in `Part`.
        first: index in the job of the first block.
        num_blocks: how many blocks move.
        has_store_slots: whether the blocks have slots of the store.
    """

    __slots__ = ("_keys", "_slots", "_start", "_stop", "_store_slots", "first", "has_store_slots", "is_load",
                 "num_blocks", "serial")  # fmt: skip

    def __init__(
        self,
        part: Part,
        keys: Sequence[OffloadKey],
        slots: Sequence[int],
        store_slots: Sequence[int] | None,
        start: int,
        stop: int,
    ) -> None:
        """Args:
        keys, slots, store_slots: of the whole part.
        start, stop: the range of this piece, in indices of the part.
        """
        self.serial, self.is_load, self.first, self.num_blocks = (
            part.serial,
            part.is_load,
            part.first + start,
            stop - start,
        )
        self.has_store_slots = store_slots is not None
        self._keys, self._slots, self._store_slots = keys, slots, store_slots
        self._start, self._stop = start, stop

    @property
    def keys(self) -> Sequence[OffloadKey]:
        """The keys of its blocks."""
        return self._keys[self._start : self._stop]

    @property
    def arena_slots(self) -> Sequence[int]:
        """Their slots of the primary arena."""
        return self._slots[self._start : self._stop]

    @property
    def store_slots(self) -> Sequence[int] | None:
        """Their slots of the store; None if keys are the location."""
        return None if self._store_slots is None else self._store_slots[self._start : self._stop]


def cut(part: Part, most: int) -> list[Piece]:
    """Return the blocks of a part in pieces of at most `most` blocks."""
    keys, slots, store_slots, count = part.keys, part.arena_slots, part.store_slots, part.num_blocks
    return [Piece(part, keys, slots, store_slots, start, min(start + most, count)) for start in range(0, count, most)]


def arena_slots(pieces: Sequence[Piece]) -> Sequence[int]:
    """Return the slots of all pieces in the primary arena, piece after piece."""
    if len(pieces) == 1:
        return pieces[0].arena_slots
    return [slot for piece in pieces for slot in piece.arena_slots]
