"""What is known of each live request: its scan, its wait, its lease and its transfers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from enum import Enum
from itertools import groupby
from operator import itemgetter

from kvtier.errors import InvariantError
from kvtier.keys import GROUP_BYTES, OffloadKey
from kvtier.tiering.tiers import SecondaryTiers
from kvtier.tiering.uses import RequestUses
from kvtier.types import ReqContext

_group_of = itemgetter(slice(-GROUP_BYTES, None))


class Wait(Enum):
    """Whether a request may still be deferred."""

    ALLOWED = "allowed"
    GAVE_UP = "gave_up"
    """Its deadline passed: what is not ready answers MISS, until it is preempted."""


@dataclass(slots=True, eq=False)
class RequestState:
    """One request. Decisions read it; only the manager's parts change it.

    Attributes:
        arrival: order of arrival, oldest first.
        scan: keys looked up in this step, in the engine's order.
        found: tier index of keys that a tier answered HIT for, in this step.
        unresolved: keys whose probe is unanswered, in this step.
        stores: keys under another request's device store, in this step.
        awaiting: keys of promotions in flight that this request waits for.
        lease: slots pinned for this request, by key.
        lease_expires: when the lease ends by itself; None while promotions are awaited.
        denied: keys that no plan could place.
        failed: (tier index, key) pairs whose promotion failed.
        tiers: indices of the tiers this request may load from.
        silent: tiers that missed the probe deadline; what they answer counts, and nobody waits for it.
        probing: tiers that left a probe of this scan unanswered; probing_since: since when, seconds;
            num_unresolved: most keys that one scan of this wait left without an answer.
        deferred_since, waited: the running part and the ended parts of this attempt's wait, seconds.
        deadline: longest wait of this attempt, seconds; num_awaited: blocks it has waited for so far.
        planned_for: first key of the scan that the last plan was made of, and how many keys were awaited then; None
            if the scan left a probe unanswered. shortest_group: least keys a KV group had in that scan.
        sources: name of the tier a promoted key came from.
        storing, loading: slots under a device copy, by key, in prepared order.
        loading_again: further loads of keys that are already being loaded.
        stored: keys stored so far, in prefix order; num_stores: in how many calls.
        uses: blocks it has used, which count once.
        request_level_tiers: indices of tiers that want every block of the request, prefix hits included.
    """

    context: ReqContext
    arrival: int
    tiers: tuple[int, ...] = ()
    scan: list[OffloadKey] = field(default_factory=list)
    found: dict[OffloadKey, int] = field(default_factory=dict)
    unresolved: set[OffloadKey] = field(default_factory=set)
    stores: set[OffloadKey] = field(default_factory=set)
    awaiting: set[OffloadKey] = field(default_factory=set)
    lease: dict[OffloadKey, int] = field(default_factory=dict)
    lease_expires: float | None = None
    wait: Wait = Wait.ALLOWED
    denied: set[OffloadKey] = field(default_factory=set)
    failed: set[tuple[int, OffloadKey]] = field(default_factory=set)
    silent: set[int] = field(default_factory=set)
    probing: set[int] = field(default_factory=set)
    probing_since: dict[int, float] = field(default_factory=dict)
    num_unresolved: int = 0
    deferred_since: float | None = None
    waited: float = 0.0
    deadline: float = 0.0
    num_awaited: int = 0
    planned_for: tuple[OffloadKey, int] | None = None
    shortest_group: int = 0
    sources: dict[OffloadKey, str] = field(default_factory=dict)
    storing: dict[OffloadKey, int] = field(default_factory=dict)
    loading: dict[OffloadKey, int] = field(default_factory=dict)
    loading_again: list[tuple[OffloadKey, int]] = field(default_factory=list)
    stored: list[OffloadKey] = field(default_factory=list)
    num_stores: int = 0
    uses: RequestUses = field(default_factory=RequestUses)
    request_level_tiers: tuple[int, ...] = ()
    finished: bool = False

    @property
    def has_transfers(self) -> bool:
        """Whether a device copy of this request is unfinished."""
        return bool(self.storing or self.loading or self.loading_again)

    @property
    def may_wait(self) -> bool:
        """Whether it is live and has not given up."""
        return not self.finished and self.wait is Wait.ALLOWED

    def is_unchanged_for(self, first_key: OffloadKey) -> bool:
        """Whether a scan from `first_key` on is the planned one again, and nothing it waits for arrived or failed."""
        return bool(self.awaiting) and self.may_wait and self.planned_for == (first_key, len(self.awaiting))

    def time_waited(self, now: float) -> float:
        """Seconds this attempt has waited for tiers."""
        running = now - self.deferred_since if self.deferred_since is not None else 0.0
        return self.waited + running

    def stop_waiting(self, now: float) -> None:
        """The clock stops: no tier causes the wait any more."""
        self.waited = self.time_waited(now)
        self.deferred_since = None

    def pause(self, now: float) -> None:
        """The engine did not ask in this step: unless a promotion is awaited, no tier causes the wait."""
        self.probing_since.clear()
        if not self.awaiting and self.deferred_since is not None:
            self.stop_waiting(now)

    def note_plan(self) -> None:
        """A plan was made of this scan."""
        certain = self.scan and not self.unresolved
        self.planned_for = (self.scan[0], len(self.awaiting)) if certain else None
        if certain and self.awaiting:
            groups = groupby(map(_group_of, self.scan))
            self.shortest_group = min(len(list(keys)) for _, keys in groups)

    def forget_scan(self) -> None:
        """The step is over; the next scan replaces this one."""
        self.scan.clear()
        self.found.clear()
        if self.probing_since:
            for index in self.probing_since.keys() - self.probing:
                del self.probing_since[index]
            self.num_unresolved = max(self.num_unresolved, len(self.unresolved)) if self.probing_since else 0
        self.unresolved.clear()
        self.stores.clear()
        self.probing.clear()

    def note_stored(self, keys: list[OffloadKey]) -> None:
        """Remember what was stored, for the order of recency at the request's end."""
        self.stored += keys
        self.num_stores += 1

    def start_over(self, deadline: float) -> None:
        """The cache was reset: nothing that was asked or stored before counts."""
        self.new_attempt(deadline)
        self.forget_scan()
        self.sources.clear()
        self.stored.clear()
        self.uses.clear()
        self.num_stores = 0

    def new_attempt(self, deadline: float) -> None:
        """Start over: the request was preempted, or its blocks were reset."""
        self.wait = Wait.ALLOWED
        self.deferred_since = None
        self.waited = 0.0
        self.num_awaited = 0
        self.planned_for = None
        self.deadline = deadline
        self.denied.clear()
        self.failed.clear()
        self.silent.clear()
        self.probing_since.clear()


class Requests:
    """The requests that are live, or whose transfers are not over."""

    def __init__(self, tiers: SecondaryTiers, load_deadline: float) -> None:
        """Args: tiers: they are told who is gone; load_deadline: longest wait of an attempt, seconds."""
        self._tiers, self._load_deadline = tiers, load_deadline
        self._by_id: dict[str, RequestState] = {}
        self.get: Callable[[str], RequestState | None] = self._by_id.get
        """Return the state of a request, or None. The dict's own method: it is called many times a request."""
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[RequestState]:
        return iter(list(self._by_id.values()))

    def open(self, context: ReqContext) -> RequestState:
        """Return the state of a request, made if it is new or comes again after its end.

        Another request of an ended one's name starts afresh, but for copies of the ended one that are unfinished.
        """
        former = self._by_id.get(context.req_id)
        if former is not None:
            if not former.finished:
                return former
            self._tiers.forget(former.context)  # its last copies go on under another request of that name
        self._arrivals += 1
        tiers = self._tiers.allowed(context.load_tier_filter)
        state = RequestState(context, self._arrivals, tiers, deadline=self._load_deadline)
        if former is not None:
            state.storing, state.loading, state.loading_again = former.storing, former.loading, former.loading_again
        self._by_id[context.req_id] = state
        return state

    def close(self, state: RequestState) -> None:
        """Drop the request if it is finished and without transfers."""
        if state.finished and not state.has_transfers:
            self._by_id.pop(state.context.req_id, None)
            self._tiers.forget(state.context)

    def check_invariants(self) -> None:
        """Raise InvariantError if a request's parts contradict each other."""
        for state in self._by_id.values():
            if state.finished and (state.lease or state.awaiting):
                raise InvariantError(f"request {state.context.req_id} is over and holds a lease or waits")
            if state.finished and not state.has_transfers:
                raise InvariantError(f"request {state.context.req_id} is over and was not dropped")


def split_scan(scan: Collection[OffloadKey]) -> list[list[OffloadKey]]:
    """Return what was looked up, by KV group, in the engine's order.

    A group whose scan comes to a key again has started over: the later scan replaces the earlier.
    """
    if len(set(map(_group_of, scan))) == 1 and len(set(scan)) == len(scan):
        return [list(scan)]
    groups: dict[bytes, dict[OffloadKey, None]] = {}
    group: dict[OffloadKey, None] = {}
    last = b""
    for key in scan:
        suffix = key[-GROUP_BYTES:]
        if suffix != last:
            group, last = groups.setdefault(suffix, {}), suffix
        if key in group:
            group.clear()
        group[key] = None
    return [list(group) for group in groups.values()]
