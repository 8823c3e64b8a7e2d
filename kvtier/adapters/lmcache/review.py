"""Finds LMCache's objects that a tier has dropped without telling: servers, buckets and shared directories do that."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence

from kvtier.adapters.lmcache.holdings import Holding, Holdings
from kvtier.adapters.staged_tiers import StagedTiers
from kvtier.adapters.staging_slots import PageKeys
from kvtier.log import logger

_LOOKS_PER_STORE = 4
"""Objects to ask for after each stored one. In a full medium each new object replaces one, which is noticed before a
quarter of what is held was stored anew."""
_MOST_AT_ONCE = 256
_MOST_WAITING = 1 << 14


class Review:
    """Asks the tiers for objects that may be gone, on a thread of its own. Several threads may call it at once.

    These are objects that a lookup or a load has not found, and after each store those of which nothing was heard for
    the longest time.
    """

    def __init__(self, tiers: StagedTiers, holdings: Holdings, forget: Callable[[Sequence[Holding]], None]) -> None:
        """Args: forget: called with objects that are certainly gone."""
        self._tiers, self._holdings, self._forget = tiers, holdings, forget
        self._lock = threading.Lock()
        self._woken = threading.Event()
        self._doubted: dict[int, Holding] = {}
        self._num_looks = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="kvtier-lmcache-review", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def doubt(self, missed: Iterable[PageKeys]) -> None:
        """Learn of objects that were not found. Those that are not noted, or are too many, are left out."""
        known = [one for blocks in missed if (one := self._holdings.of(blocks)) is not None]
        if not known:
            return
        with self._lock:
            self._doubted.update((id(one), one) for one in known[: _MOST_WAITING - len(self._doubted)])
        self._woken.set()

    def note_stored(self, count: int) -> None:
        """Learn that so many objects were stored."""
        with self._lock:
            self._num_looks = min(self._num_looks + _LOOKS_PER_STORE * count, _MOST_WAITING)
        self._woken.set()

    def check(self, suspects: Sequence[Holding]) -> None:
        """Forget those of some objects that are certainly gone."""
        gone = self._tiers.gone([one.blocks for one in suspects])
        self._forget(list(itertools.compress(suspects, gone)))

    def stop(self) -> None:
        """Ask for nothing more."""
        self._is_closed = True
        self._woken.set()

    def join(self) -> None:
        """Wait until the thread has ended. `stop` was called before, and the tiers are closed."""
        self._thread.join()

    def leave_to_parent(self) -> None:
        """In a forked child, which has no such thread, do nothing."""
        self._is_closed = True
        self._lock, self._woken = threading.Lock(), threading.Event()

    def _run(self) -> None:
        while self._woken.wait() and not self._is_closed:
            self._woken.clear()
            try:
                while not self._is_closed and self._look():
                    pass
            except Exception:  # whatever a listener of LMCache's raises must not end the thread
                logger.exception("kvtier: objects that are gone were not told")

    def _look(self) -> bool:
        """Ask for some objects; return whether there were any."""
        with self._lock:
            doubted = [self._doubted.pop(one) for one in list(self._doubted)[:_MOST_AT_ONCE]]
            num_looks = min(self._num_looks, _MOST_AT_ONCE)
            self._num_looks -= num_looks
        looked_at = self._holdings.next(num_looks)
        # Of each only the last block, which goes first where tails of prompts do.
        held = self._tiers.contains([one.blocks[-1:] for one in looked_at])
        doubted += [one for one, is_held in zip(looked_at, held, strict=True) if not is_held]
        if doubted:
            self.check(doubted)
        return bool(doubted or num_looks)
