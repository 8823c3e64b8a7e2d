"""What one request uses of a tier: a block counts once per request, however often an engine says so.

Engines differ. vLLM up to 0.30 touches all blocks of a request whenever it looks them up, at every step of a wait, and
after every store; later ones touch nothing. A policy that counts uses would take a long wait for popularity, and a
trace, in which a request asks once, would foretell other hits than the engine has.
"""

from __future__ import annotations

import math
from collections.abc import Container, Set
from itertools import chain

from kvtier.clock import Clock
from kvtier.hints import NO_HINT, Hint
from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable
from kvtier.types import ReqContext

Keys = list[OffloadKey]


class Arrivals:
    """Gives every request a time of its own: now, or the least time after the request before."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._last = clock, -math.inf

    def next(self) -> float:
        """Return the time of a request that comes now, in seconds of the clock."""
        now = self._clock()
        self._last = now if now > self._last else math.nextafter(self._last, math.inf)
        return self._last


class RequestUses:
    """The blocks that a request has used, whether the primary tier held them then, and which were not ready yet.

    Most requests load once and store, and are never asked again: what they use is only put aside until somebody asks.

    Attributes:
        came: when the request came, in seconds: policies know it by that.
        request: its name; hint: what its caller said of its blocks.
    """

    __slots__ = ("_aside", "_early", "_held", "_named", "came", "hint", "request")

    def __init__(self, came: float, request: str = "", hint: Hint = NO_HINT) -> None:
        self.came, self.request, self.hint = came, request, hint
        self._held: dict[OffloadKey, bool] = {}
        self._aside: list[Keys] = []
        self._early: set[OffloadKey] = set()
        self._named: list[Keys] = []

    def count(self, keys: Keys, primary: Container[OffloadKey] | None) -> tuple[Keys, Keys]:
        """Take note of a use.

        Args:
            keys: each once.
            primary: what the primary tier holds; None: all of `keys`.

        Returns:
            Those of `keys`, in order, whose use counts in the primary tier (none that it held at an earlier use), and
            those that were not used before at all, whose use counts in the other tiers.
        """
        fresh = keys = keys.copy()  # kept, in one or two lists that nobody changes
        if self._held or self._aside:
            known = self._known()
            if not known.keys().isdisjoint(keys):
                fresh = [key for key in keys if key not in known]
                keys = [key for key in keys if not known.get(key, False)]
        if fresh:
            self._named.append(fresh)
        if primary is None or all(map(primary.__contains__, keys)):
            if keys:
                self._aside.append(keys)
        else:
            self._held.update(zip(keys, map(primary.__contains__, keys), strict=True))
        return keys, fresh

    def admissible(self, named: Keys, counted: Keys, table: BlockTable) -> Keys:
        """Return those of `named` whose use may admit them to another tier: at the first time that they can be read.

        Args:
            counted: what `count` said of `named` for the primary tier.
            table: of the primary tier.
        """
        early, is_ready = self._early, table.is_ready
        due = [key for key in named if key in early and is_ready(key)] if early else []
        for key in due:
            early.remove(key)
        early.update(key for key in counted if key in table and not is_ready(key))
        return [*due, *filter(is_ready, counted)]

    def note_stored(self, keys: Keys) -> None:
        """The request brings these blocks itself, which is a use in every tier."""
        if self._early:
            self._early.difference_update(keys)
        if keys:
            self._aside.append(keys.copy())

    def note_offer(self, keys: Keys) -> None:
        """The request offers these blocks, in prefix order: those that are held among those that are not."""
        self._named.append(keys.copy())

    @property
    def own(self) -> Set[OffloadKey]:
        """Every block that the request has used or stored: no victim of what else it stores."""
        return self._known().keys()

    def in_order(self, context: ReqContext) -> Keys:
        """Return the blocks up to the last one that was named, by their position in the prompt, all KV groups together.

        Those that the engine found on its device were never named. They were used as much as the blocks behind them,
        which are worth nothing without them. Where the engine does not say where all blocks end, those that were named
        come in the order of the calls.
        """
        keys = list(dict.fromkeys(chain.from_iterable(self._named)))
        end_of = context.get_offload_key_position
        ends = {key: end for key in keys if (end := end_of(key)) is not None}
        if not keys or len(ends) < len(keys):
            return keys
        last = max(ends.values())
        ends.update((key, end) for key, end in context.offload_key_positions.items() if end <= last)
        return sorted(ends, key=ends.__getitem__)

    def _known(self) -> dict[OffloadKey, bool]:
        for keys in self._aside:
            self._held.update(dict.fromkeys(keys, True))
        self._aside.clear()
        return self._held

    def clear(self) -> None:
        """The cache was reset."""
        self._held.clear()
        self._aside.clear()
        self._early.clear()
        self._named.clear()
