"""Retention: applies the hints of requests around an eviction policy.

Blocks without a hint belong to the policy. Blocks with a hint are held here, and the policy does not know of them.
Eviction takes first the blocks whose session or time is over, then blocks of low priority, then the policy's, then
blocks of high priority. Within a priority the least recently used block goes first. Blocks that a hint retains for a
time are not evicted; they hold at most a share of the capacity.

Its weakness: a policy that learns does not see the uses of blocks with a hint.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from heapq import heappop, heappush
from itertools import chain, islice

from kvtier.abc import EvictionPolicy
from kvtier.errors import InvariantError
from kvtier.eviction.sessions import SessionBlocks, SessionName
from kvtier.hints import NO_HINT, Hint, Priority
from kvtier.keys import OffloadKey

DEFAULT_RETAIN_SHARE = 0.25
MAX_ENDED = 256
"""Most blocks that one call releases because their time or their session is over; the next calls release the others.
A call that released all of them would hold up the engine's scheduler."""


class Rank(IntEnum):
    """The order of eviction, lowest first. A use may raise a block's rank, and never lowers it."""

    OVER = 0
    """The block's session has ended, or the time for which it was retained."""
    LOW = 1
    NORMAL = 2
    """The policy holds these blocks."""
    HIGH = 3
    KEPT = 4
    """Retained for a time; no victim."""


_RANK_OF = {Priority.LOW: Rank.LOW, Priority.NORMAL: Rank.NORMAL, Priority.HIGH: Rank.HIGH}


@dataclass(slots=True)
class _Held:
    """A block that is held here and not by the policy.

    Attributes:
        came: time of the request that used it last, as told to policies (`now`).
        until: second of the clock at which `rank` ends and `after` takes its place; None for no end.
        after: the rank that the block has from uses without `retain`.
    """

    rank: Rank
    came: float
    until: int | None = None
    after: Rank = Rank.OVER


class ServedPolicy(EvictionPolicy):
    """A policy that is told which request each call is for."""

    @property
    @abstractmethod
    def num_kept(self) -> int:
        """Number of blocks that are retained for a time."""

    @abstractmethod
    def serve(self, hint: Hint, request: str, now: float) -> None:
        """Say which request the following calls are for.

        Args:
            hint: of the request.
            request: name of the request; if the hint names no session, the request is a session of its own.
            now: seconds of a clock that does not go back.
        """


class RetentionPolicy(ServedPolicy):
    """An eviction policy around another one, which follows the hints of requests.

    Call `serve` before the calls for a request.

    Attributes:
        inner: the policy that holds the blocks of rank NORMAL.
        most_kept: no further blocks are retained while this many are.
    """

    def __init__(self, inner: EvictionPolicy, share: float = DEFAULT_RETAIN_SHARE) -> None:
        """Args:
        inner: may hold keys already.
        share: the most of the capacity that retained blocks may hold, 0 to 1.
        """
        super().__init__(inner.capacity)
        self.inner = inner
        self.most_kept = int(inner.capacity * share)
        self._orders: dict[Rank, OrderedDict[OffloadKey, None]] = {
            rank: OrderedDict() for rank in Rank if rank is not Rank.NORMAL
        }
        self._held: dict[OffloadKey, _Held] = {}
        self._ending: dict[int, dict[OffloadKey, None]] = {}
        """Keys by the second in which their time ends. A later use moves a key, so no outdated entries pile up."""
        self._seconds: list[int] = []
        """A heap of the keys of `_ending`."""
        self._sessions = SessionBlocks(inner.capacity)
        self._owner: SessionName = ()
        self._hint, self._now = NO_HINT, 0.0

    @property
    def num_kept(self) -> int:
        return len(self._orders[Rank.KEPT])

    def serve(self, hint: Hint, request: str, now: float) -> None:
        self.begin(hint, request, now)
        self.release(now, MAX_ENDED)

    def begin(self, hint: Hint, request: str, now: float) -> None:
        """Say which request the following calls are for, and release nothing."""
        self._hint, self._now = hint, now
        self._owner = ("session", hint.tenant, hint.session) if hint.session is not None else ("request", request)

    def release(self, now: float, most: int) -> int:
        """Release up to `most` blocks whose time or session is over, and return how many."""
        num_ended = self._end_times(now, most)
        if self._sessions.has_ended and num_ended < most:
            freed = self._sessions.take(most - num_ended)
            self._free(freed)
            num_ended += len(freed)
        return num_ended

    # -- uses ---------------------------------------------------------------------------------------------

    def insert(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Hold `keys` with the rank that the request's hint gives them."""
        if self._hint.session is not None or self._hint.ended:
            self._sessions.bring(keys, self._owner)
        self._place([(key, None) for key in keys], now)

    def touch(self, keys: Sequence[OffloadKey], now: float = 0.0) -> bool | None:
        """Count one use of the held ones of `keys`. The hint may raise their rank.

        The policy counts the uses of its own blocks; a block held here moves to the recent end of its rank.
        """
        if self._sessions:
            self._sessions.share(keys, self._owner)
        if not keys or (not self._held and self._asks_for(Rank.OVER) <= Rank.NORMAL and self._hint.retain is None):
            return self.inner.touch(keys, now)
        ranks = [(key, held.rank if (held := self._held.get(key)) is not None else Rank.NORMAL) for key in keys]
        self._place([(key, rank) for key, rank in ranks if rank is not Rank.NORMAL or key in self.inner], now)
        return None

    def _asks_for(self, rank: Rank) -> Rank:
        return max(rank, _RANK_OF[self._hint.priority])

    def _place(self, keys: Sequence[tuple[OffloadKey, Rank | None]], now: float) -> None:
        """Count a use of `keys` and move them to the rank that follows from the hint.

        Args:
            keys: each with its rank so far; None for a new key.
        """
        hint, room = self._hint, self.most_kept - self.num_kept
        until = None if hint.retain is None else int(self._now + hint.retain) + 1
        inserted: list[OffloadKey] = []
        touched: list[OffloadKey] = []
        taken: list[OffloadKey] = []
        placed: list[tuple[OffloadKey, Rank]] = []
        for key, rank in keys:
            new = self._asks_for(Rank.OVER if rank is None else rank)
            if until is not None and rank is not Rank.KEPT and room > 0:
                new, room = Rank.KEPT, room - 1
            if new is not Rank.NORMAL:
                placed.append((key, new))
                if rank is Rank.NORMAL:
                    taken.append(key)
            else:
                (touched if rank is Rank.NORMAL else inserted).append(key)
        formerly = frozenset(taken)
        if taken:
            self.inner.remove(taken)
        for key, new in reversed(placed):
            self._hold(key, new, until, now, key in formerly)
        if inserted:
            self._drop(inserted)
            self.inner.insert(inserted, now)
        if touched:
            self.inner.touch(touched, now)

    def _hold(self, key: OffloadKey, rank: Rank, until: int | None, now: float, was_the_policys: bool) -> None:
        held = self._held.get(key)
        if held is None:
            held = self._held[key] = _Held(rank, now, after=Rank.NORMAL if was_the_policys else Rank.OVER)
        else:
            del self._orders[held.rank][key]
            held.rank, held.came = rank, now
        self._orders[rank][key] = None
        if until is None:
            held.after = self._asks_for(held.after)
        elif held.until is not None or rank is Rank.KEPT or held.after is not Rank.HIGH:
            self._set_end(key, held, max(until, held.until or 0))

    def _set_end(self, key: OffloadKey, held: _Held, until: int | None) -> None:
        if held.until is not None:
            del self._ending[held.until][key]
        held.until = until
        if until is not None:
            if until not in self._ending:
                self._ending[until] = {}
                heappush(self._seconds, until)
            self._ending[until][key] = None

    def _end_times(self, now: float, most: int) -> int:
        """Release up to `most` blocks whose time is over, and return how many.

        A block gets the rank `after`: OVER, if no request without `retain` has used it. If it is NORMAL, the block
        goes back to the policy.
        """
        if not self._seconds or self._seconds[0] > now:
            return 0
        normal: dict[float, list[OffloadKey]] = {}
        num_left = most
        while num_left and self._seconds and self._seconds[0] <= now:
            ending = self._ending[self._seconds[0]]
            over = list(islice(ending, num_left))
            num_left -= len(over)
            for key in over:
                del ending[key]
                held = self._held[key]
                held.until = None
                if held.after is Rank.NORMAL:
                    normal.setdefault(held.came, []).append(key)
                else:
                    del self._orders[held.rank][key]
                    held.rank = held.after
                    self._orders[held.rank][key] = None
            if not ending:
                del self._ending[heappop(self._seconds)]
        for came, keys in normal.items():
            self._drop(keys)
            self.inner.insert(keys[::-1], came)  # `_ending` has them tail first; a policy wants prefix order
        return most - num_left

    def _free(self, keys: Sequence[OffloadKey]) -> None:
        """Give `keys` the rank OVER: their session has ended."""
        theirs = [key for key in keys if key not in self._held]
        if theirs:
            self.inner.remove(theirs)
        for key in keys:
            held = self._held.setdefault(key, _Held(Rank.OVER, 0.0))
            self._set_end(key, held, None)
            self._orders[held.rank].pop(key, None)
            held.rank = held.after = Rank.OVER
            self._orders[Rank.OVER][key] = None

    # -- victims ------------------------------------------------------------------------------------------

    def candidates(self, incoming: Sequence[OffloadKey] = ()) -> Iterator[OffloadKey]:
        """Yield victims, lowest rank first. Retained blocks are no victims: they come last, and only without
        `incoming`, where the caller asks for all keys.
        """
        orders = self._orders
        self.inner.may_decline, self.inner.num_evictable = self.may_decline, self.num_evictable
        if not self._held:
            return self.inner.candidates(incoming)
        return chain(orders[Rank.OVER], orders[Rank.LOW], self._others(incoming))

    def _others(self, incoming: Sequence[OffloadKey]) -> Iterator[OffloadKey]:
        num_given = 0
        # A policy may decline incoming blocks in favour of its own. It does not know hints, so it is not told of
        # incoming blocks of high priority.
        told = incoming if self._hint.priority is not Priority.HIGH else ()
        for key in self.inner.candidates(told):
            num_given += 1
            yield key
        if told and self._has_declined(num_given):
            return
        yield from self._orders[Rank.HIGH]
        if not incoming:
            yield from self._orders[Rank.KEPT]

    def _has_declined(self, num_given: int) -> bool:
        """Return whether the policy, which has given so many victims for incoming blocks, would give more for blocks
        that it may not decline. It also ends early if the others may not be evicted (`num_evictable`).
        """
        if not self.may_decline or num_given >= len(self.inner) or not self._orders[Rank.HIGH]:
            return False
        return next(islice(self.inner.candidates(), num_given, None), None) is not None

    def settle(self, keys: Sequence[OffloadKey]) -> None:
        """Order `keys` by recency, each within its rank.

        If the hint retains, the time of retained ones starts again. If the hint says so, the session ends here.
        """
        if not self._held:
            self.inner.settle(keys)
        else:
            self.inner.settle([key for key in keys if key not in self._held])
            retain = self._hint.retain
            for key in reversed(keys):
                held = self._held.get(key)
                if held is not None:
                    self._orders[held.rank].move_to_end(key)
                    if retain is not None and held.until is not None:
                        self._set_end(key, held, max(held.until, int(self._now + retain) + 1))
        if self._hint.ended:
            self._sessions.end(self._owner)
            self._free(self._sessions.take(MAX_ENDED))

    def line_up(self, keys: Sequence[OffloadKey]) -> None:
        """Order those of `keys` that the policy holds; the others stay where they are."""
        self.inner.line_up([key for key in keys if key not in self._held] if self._held else keys)

    def evict(self, keys: Sequence[OffloadKey]) -> None:
        """Stop holding `keys`; the policy may remember those that it held."""
        self.inner.evict(self._theirs(keys))

    def remove(self, keys: Sequence[OffloadKey]) -> None:
        """Stop holding `keys` and forget them."""
        self.inner.remove(self._theirs(keys))

    def _theirs(self, keys: Sequence[OffloadKey]) -> Sequence[OffloadKey]:
        """Drop those of `keys` that are held here, and return the others, which the policy holds."""
        if self._sessions:
            self._sessions.forget(keys)
        if not self._held or self._held.keys().isdisjoint(keys):
            return keys
        theirs = [key for key in keys if key not in self._held]
        self._drop([key for key in keys if key in self._held])
        return theirs

    def _drop(self, keys: Iterable[OffloadKey]) -> None:
        for key in keys:
            held = self._held.pop(key, None)
            if held is not None:
                self._set_end(key, held, None)
                del self._orders[held.rank][key]

    def clear(self) -> None:
        """Forget everything."""
        self.inner.clear()
        for order in self._orders.values():
            order.clear()
        for part in (self._held, self._ending, self._sessions):
            part.clear()
        self._seconds.clear()

    def __len__(self) -> int:
        return len(self.inner) + len(self._held)

    def __contains__(self, key: object) -> bool:
        return key in self._held or key in self.inner

    def check_invariants(self) -> None:
        """Raise InvariantError if a block has two ranks, or more blocks are retained than the share allows."""
        self.inner.check_invariants()
        wrong: list[str] = []
        if sum(map(len, self._orders.values())) != len(self._held):
            wrong.append("orders and blocks differ in number")
        if any(key not in self._orders[held.rank] or key in self.inner for key, held in self._held.items()):
            wrong.append("a block stands in another place than its rank's")
        if self.num_kept > self.most_kept:
            wrong.append(f"{self.num_kept} blocks are kept, {self.most_kept} may be")
        ending = {key: second for second, keys in self._ending.items() for key in keys}
        if ending != {key: held.until for key, held in self._held.items() if held.until is not None}:
            wrong.append("times and blocks differ")
        if set(self._ending) != set(self._seconds) or len(self._ending) != len(self._seconds):
            wrong.append("times and their order differ")
        if any(key not in self for key in self._sessions):
            wrong.append("a session owns a block that is not held")
        if wrong:
            raise InvariantError("; ".join(wrong))
