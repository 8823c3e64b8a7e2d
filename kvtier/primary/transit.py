"""Transit: blocks that the policy declines pass through a few slots of memory, on their way to the tiers below.

Bytes reach a tier below only through a slot of memory. A block in transit is pinned, like every other, until the tiers
that want it have read it. Then it is the next victim, whoever needs a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from enum import Enum, auto
from itertools import islice

from kvtier.keys import OffloadKey

MAX_TRANSIT_SHARE = 0.05
"""Most blocks in transit, as a share of the slots."""

_MAX_BUSY = 256
"""Blocks that `idle` looks at in vain. Tiers read blocks in about the order in which they came, so if the oldest ones
are still being read, the others are, too."""


class Declining(Enum):
    """What becomes of the tail of a request that the policy ranks below everything held."""

    NEVER = auto()
    """It takes the slots of held blocks, as the rest of the request does."""
    IN_TRANSIT = auto()
    """The same, but as much of it as transit has room for is the next to give way."""
    REFUSED = auto()
    """It passes as far as transit has room. The rest is not stored."""


class Transit:
    """Which blocks are in transit.

    Attributes:
        limit: most blocks in transit; 0 if no tier is below, so that declined blocks have no use for a slot.
        keys: the blocks in transit, next victim first. Others may read it.
    """

    def __init__(self) -> None:
        self.limit = 0
        self.keys: dict[OffloadKey, None] = {}

    def open(self, num_slots: int) -> None:
        """Let blocks pass through a tier of `num_slots`."""
        self.limit = max(1, int(num_slots * MAX_TRANSIT_SHARE))

    def idle(
        self, most: int, is_idle: Callable[[OffloadKey], bool], protected: Sequence[Set[OffloadKey]]
    ) -> list[OffloadKey]:
        """Return up to `most` blocks that no job uses and that are not `protected`, next victim first."""
        idle = filter(is_idle, islice(self.keys, most + _MAX_BUSY))
        return list(islice((key for key in idle if not any(key in kept for kept in protected)), most))

    def room(self, victims: Iterable[OffloadKey]) -> int:
        """Return how many blocks may enter once `victims` are gone."""
        return self.limit - len(self.keys) + sum(map(self.keys.__contains__, victims))

    def add(self, keys: Sequence[OffloadKey]) -> None:
        """Let `keys`, in prefix order, enter; their tail goes first."""
        self.keys.update(dict.fromkeys(reversed(keys)))

    def remove(self, keys: Iterable[OffloadKey]) -> None:
        """Stop counting `keys` as in transit: they are gone, or wanted again."""
        if self.keys:
            for key in keys:
                self.keys.pop(key, None)
