"""The free slots of a table, in the order in which they are taken."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOVED = 4096
"""Slots that become integers of Python at once: a list of a million of them takes tens of milliseconds."""


class FreeSlots:
    """A stack of slots. Those at its bottom, which nobody has taken since the start or a reset, are an array."""

    __slots__ = ("_bottom", "_top")

    def __init__(self, slots: NDArray[Any]) -> None:
        """Args: slots: integers, no two equal; the last one is the top."""
        self._bottom: NDArray[Any] = slots
        self._top: list[int] = []

    @classmethod
    def up_to(cls, num_slots: int) -> FreeSlots:
        """Return the slots from 0 to below `num_slots`, with slot 0 on top."""
        return cls(np.arange(num_slots - 1, -1, -1, dtype=np.int32))

    def __len__(self) -> int:
        return len(self._bottom) + len(self._top)

    def __iter__(self) -> Iterator[int]:
        return chain(self._bottom.tolist(), self._top)

    def push(self, slots: Collection[int]) -> None:
        """Put `slots` on top, one after the other."""
        self._top += slots

    def take(self, count: int) -> list[int]:
        """Remove and return up to `count` slots; the last one was on top."""
        top = self._top
        if len(top) < count and len(self._bottom):
            moved = max(count - len(top), _MOVED)
            top[:0] = self._bottom[-moved:].tolist()
            self._bottom = self._bottom[:-moved]
        taken = top[len(top) - count :] if count < len(top) else top.copy()
        del top[len(top) - len(taken) :]
        return taken
