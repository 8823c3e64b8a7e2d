"""The leaves of the prefix trees, which are the only parts that may be evicted, in order of rank."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Container, Iterator
from heapq import heappop, heappush
from itertools import count

from kvtier.errors import InvariantError
from kvtier.eviction.chains import Part
from kvtier.eviction.reuse import ReuseTable

Cell = tuple[float, int, int]
"""One class and bin of age, as (rank, -bin, class). Cells sort in the order of eviction: lowest rank first, and of
equal ranks the older bin first."""


class Leaves:
    """One queue of leaves per cell, in the order in which the leaves entered it."""

    def __init__(self, table: ReuseTable) -> None:
        self._table = table
        self._parts: dict[tuple[int, int], OrderedDict[Part, None]] = {}
        self._cells: list[Cell] = []
        """The cells that hold a leaf, sorted."""

    def enter(self, part: Part) -> None:
        """Add a leaf to the cell of its class and bin."""
        place = part.kind, part.bin
        parts = self._parts.get(place)
        if parts is None:
            parts = self._parts[place] = OrderedDict()
            insort(self._cells, self._cell(place))
        parts[part] = None

    def leave(self, part: Part) -> bool:
        """Remove a part that is no leaf any more, or whose class or bin is about to change.

        Returns:
            Whether the part was here.
        """
        place = part.kind, part.bin
        parts = self._parts.get(place)
        if parts is None or part not in parts:
            return False
        del parts[part]
        if not parts:
            del self._parts[place]
            del self._cells[bisect_left(self._cells, self._cell(place))]
        return True

    def learn(self) -> None:
        """Compute the ranks from the counts so far, and sort the cells by them."""
        self._table.learn()
        self._cells = sorted(map(self._cell, self._parts))

    def _cell(self, place: tuple[int, int]) -> Cell:
        kind, index = place
        return self._table.ranks[kind][index], -index, kind

    def victims(self, stuck: Container[Part] = ()) -> Iterator[tuple[float, Part]]:
        """Yield every part that holds blocks, with its rank.

        Lower ranks come first, but every part comes after all of its children.

        Args:
            stuck: parts of which some blocks stay. The caller adds to it while it iterates, and no part comes that one
                of them continues.
        """
        bared: list[tuple[Cell, int, Part]] = []
        num_left: dict[Part, int] = {}
        numbers = count()  # a heap compares entries of equal cells by the next item, and parts have no order
        for cell in self._cells:
            for part in self._parts[cell[2], -cell[1]]:
                while bared and bared[0][0] <= cell:
                    (rank, _, _), _, parent = heappop(bared)
                    yield rank, parent
                    if parent not in stuck:
                        self._bare(parent, bared, num_left, numbers)
                yield cell[0], part
                if part not in stuck:
                    self._bare(part, bared, num_left, numbers)
        while bared:
            (rank, _, _), _, parent = heappop(bared)
            yield rank, parent
            if parent not in stuck:
                self._bare(parent, bared, num_left, numbers)

    def _bare(
        self, part: Part, bared: list[tuple[Cell, int, Part]], num_left: dict[Part, int], numbers: Iterator[int]
    ) -> None:
        """Count `part` as evicted. Its parent enters the heap `bared` with its last child, as it is a leaf then."""
        parent = part.parent
        if parent is None:
            return
        num_left[parent] = left = num_left.get(parent, len(parent.children)) - 1
        if not left:
            heappush(bared, (self._cell((parent.kind, parent.bin)), next(numbers), parent))

    def clear(self) -> None:
        """Forget all parts."""
        self._parts.clear()
        self._cells.clear()

    def check_invariants(self, parts: set[Part]) -> None:
        """Raise InvariantError unless exactly the leaves of `parts` are here and the cells are sorted."""
        here = {part: place for place, row in self._parts.items() for part in row}
        if here != {part: (part.kind, part.bin) for part in parts if part.is_leaf}:
            raise InvariantError("leaves: some are missing, or no leaves, or in a wrong place")
        if self._cells != sorted(map(self._cell, self._parts)):
            raise InvariantError("leaves: cells are out of order")
