"""One policy takes over from another, a few keys at a time: no call waits for all of a large cache to be moved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice

from kvtier.abc import EvictionPolicy
from kvtier.errors import InvariantError
from kvtier.keys import OffloadKey

MOVED_AT_ONCE = 32
"""Keys that an insert moves, beside as many as it brings."""


class Succession(EvictionPolicy):
    """Two policies that hold the keys of one between them.

    Keys move from the old policy's worst victim on, so that the new one meets them in the order in which the old one
    would have given them up, the best last. What arrives meanwhile goes to the old one, and follows. Victims are first
    those that have moved, in the new policy's order. How often a key was used is forgotten on the way.

    Attributes:
        old, new: the policies.
    """

    def __init__(self, old: EvictionPolicy, new: EvictionPolicy) -> None:
        """Args: old: holds the keys; new: empty, of the same capacity."""
        super().__init__(old.capacity)
        self.old, self.new = old, new

    @property
    def is_over(self) -> bool:
        """Whether the new policy holds everything."""
        return not len(self.old)

    def insert(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Hold `keys`, and move some."""
        self.old.insert(keys)
        moved = list(islice(self.old.candidates(), MOVED_AT_ONCE + len(keys)))
        self.old.evict(moved)
        moved.reverse()
        self.new.insert(moved)

    def touch(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Count a use of the held ones of `keys`, wherever they are."""
        self.old.touch(keys)
        self.new.touch(keys)

    def settle(self, keys: Sequence[OffloadKey]) -> None:
        """Put the held ones of `keys` in order, wherever they are."""
        self.old.settle(keys)
        self.new.settle(keys)

    def evict(self, keys: Sequence[OffloadKey]) -> None:
        """Stop holding `keys`; each policy remembers its own."""
        new = self.new
        moved = [key for key in keys if key in new]
        new.evict(moved)
        if len(moved) < len(keys):
            self.old.evict([key for key in keys if key in self.old])

    def remove(self, keys: Sequence[OffloadKey]) -> None:
        """Stop holding `keys` and forget them."""
        new = self.new
        moved = [key for key in keys if key in new]
        new.remove(moved)
        self.old.remove([key for key in keys if key in self.old])

    def candidates(self, incoming: Sequence[OffloadKey] = ()) -> Iterator[OffloadKey]:
        """Yield every held key: those that have moved before the others."""
        return chain(self.new.candidates(incoming), self.old.candidates(incoming))

    def clear(self) -> None:
        """Forget everything."""
        self.old.clear()
        self.new.clear()

    def __len__(self) -> int:
        return len(self.old) + len(self.new)

    def __contains__(self, key: object) -> bool:
        return key in self.new or key in self.old

    def check_invariants(self) -> None:
        """Raise InvariantError if a key is held twice, or a policy contradicts itself."""
        self.old.check_invariants()
        self.new.check_invariants()
        if any(key in self.new for key in self.old.candidates()) or len(self) > self.capacity:
            raise InvariantError(f"succession: {len(self.old)} and {len(self.new)} keys, capacity {self.capacity}")
