"""The state of each live request, in parts. One file writes each part; all files may read it."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import repeat
from operator import attrgetter

from kvtier.clock import Clock
from kvtier.errors import InvariantError
from kvtier.keys import OffloadKey
from kvtier.metrics.rows import PRIMARY as PRIMARY
from kvtier.primary.uses import Arrivals, RequestUses
from kvtier.tiering.outline import Outline
from kvtier.tiering.running_copies import Copies
from kvtier.tiering.tiers import SecondaryTiers
from kvtier.types import ReqContext, TierFilter

_ALL_TIERS = TierFilter.ALL


@dataclass(slots=True, eq=False)
class Scan:
    """What a request looked up in this step. Written by `lookups.py`; the manager's lookup appends keys.

    Attributes:
        keys: in the engine's order.
        found: index of the tier that answered HIT, by key.
        unresolved: keys for which a tier has not answered yet.
        device_stores: keys that another request is storing from the device.
    """

    keys: list[OffloadKey] = field(default_factory=list)
    found: dict[OffloadKey, int] = field(default_factory=dict)
    unresolved: set[OffloadKey] = field(default_factory=set)
    device_stores: set[OffloadKey] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Wait:
    """How long one attempt of a request has waited for tiers, and may wait. Written by `waiting.py`; times in seconds.

    Attributes:
        gave_up: whether its deadline has passed. Blocks that are not ready are misses until the next attempt.
        since: when the current part of the wait began; None if the request does not wait.
        waited: length of the parts of the wait that have ended; reported: how much of it an event has told.
        deadline: longest wait of this attempt; counts while `since` is not None.
        computing: time to compute all blocks that this attempt has awaited so far.
        silent: tiers that missed the probe deadline. Their answers count, but the request does not wait for them.
        probing: tiers that have left a lookup of this scan unanswered.
        probing_since: per such tier, when the request began to wait for its answer.
        num_unresolved: most keys that one scan of this wait left without an answer.
    """

    gave_up: bool = False
    since: float | None = None
    waited: float = 0.0
    reported: float = 0.0
    deadline: float = 0.0
    computing: float = 0.0
    silent: set[int] = field(default_factory=set)
    probing: set[int] = field(default_factory=set)
    probing_since: dict[int, float] = field(default_factory=dict)
    num_unresolved: int = 0

    def is_over(self, now: float) -> bool:
        """Return whether the request waits, and has waited for longer than the deadline."""
        return self.since is not None and self.waited + (now - self.since) > self.deadline


@dataclass(slots=True, eq=False)
class Lease:
    """Slots that are pinned for a request until it loads them. Written by `leases.py`.

    Blocks are leased in parts, a few hundred at once. What a load of all of them needs is put together then, so that
    the load of a long prompt takes little time.

    Attributes:
        slots: by key.
        places: the same slots in the same order; None before the first part, since most requests lease nothing.
        by_source: how many of the blocks came from which tier; None likewise.
        expires: when the lease ends by itself, seconds of the clock; None while promotions are awaited.
    """

    slots: dict[OffloadKey, int] = field(default_factory=dict)
    places: array[int] | None = None
    by_source: dict[str, int] | None = None
    expires: float | None = None


@dataclass(slots=True, eq=False)
class Plans:
    """What became of a request's plans. Written by `promotion.py`.

    Attributes:
        denied: keys that did not fit, or that are computed sooner than loaded.
        failed: (tier index, key) pairs whose promotion failed.
        sources: per promoted key, name of the tier that it came from.
        scan: the latest scan, if no plan has begun with it.
        outline: the scan that plans have begun with, and how far they have come; None if it no longer holds.
        postponed_until: when the request is planned at the latest, even if its turn seems far, in seconds of the clock.
        num_held: number of keys that were leased or awaited after the last plan.
        asked: indices of the tiers that plans load from.
        block_seconds: average time to compute one awaited block of the last plan.
    """

    denied: set[OffloadKey] = field(default_factory=set)
    failed: set[tuple[int, OffloadKey]] = field(default_factory=set)
    sources: dict[OffloadKey, str] = field(default_factory=dict)
    scan: Scan | None = None
    outline: Outline | None = None
    postponed_until: float | None = None
    num_held: int = 0
    asked: set[int] = field(default_factory=set)
    block_seconds: float = 0.0

    def count_sources(self, keys: Sequence[OffloadKey]) -> Mapping[str, int]:
        """Return how many of `keys` came from which tier."""
        sources = self.sources
        if not sources:
            return {PRIMARY: len(keys)}
        if len(sources) == len(keys) and list(sources) == keys:  # blocks mostly arrive in order
            names = list(sources.values())
            return {names[0]: len(names)} if names.count(names[0]) == len(names) else Counter(names)
        return Counter(map(sources.get, keys, repeat(PRIMARY)))


@dataclass(slots=True, eq=False)
class Progress:
    """What one attempt of a request has computed. Written by `pace.py`; counts are blocks of the first KV group.

    Attributes:
        first_key: the first key that the engine looked up. The blocks before it were on the device.
        start: tokens before that key's block.
        is_past_first: whether the engine has offered to store blocks from that key on.
        num_loaded: blocks from that key on that were loaded; num_computed: those that were offered to be stored.
        left: tokens of the prompt that are still to be computed or loaded, as far as known.
        before, rank: tokens and number of requests that the engine computes before this one.
    """

    first_key: OffloadKey | None = None
    start: int = 0
    is_past_first: bool = False
    num_loaded: int = 0
    num_computed: int = 0
    left: float = 0.0
    before: float = 0.0
    rank: int = 0


@dataclass(slots=True, eq=False)
class RequestState:
    """A request that has looked up, loaded, stored or used a block.

    Attributes:
        came: when it came, in seconds of the clock. No other request came at the same time, so it is the order of
            arrival, too.
        tiers: indices of the tiers that this request may load from.
        request_level_tiers: indices of tiers that want every block of the request, prefix hits included. Written by
            the manager.
        finished: whether the engine has ended it. Its copies may still run. Written by the manager.
        awaiting: keys of promotions, queued or in flight, that this request waits for. Written by `flights.py`.
        uses: the blocks that it has used and stored. Written by `uses.py` and the manager.
    """

    context: ReqContext
    came: float
    tiers: tuple[int, ...] = ()
    request_level_tiers: tuple[int, ...] = field(default=(), init=False)
    finished: bool = field(default=False, init=False)
    awaiting: set[OffloadKey] = field(default_factory=set, init=False, repr=False)
    uses: RequestUses = field(init=False, repr=False)
    scan: Scan = field(default_factory=Scan, init=False, repr=False)
    wait: Wait = field(default_factory=Wait, init=False, repr=False)
    lease: Lease = field(default_factory=Lease, init=False, repr=False)
    plans: Plans = field(default_factory=Plans, init=False, repr=False)
    progress: Progress = field(default_factory=Progress, init=False, repr=False)
    copies: Copies = field(default_factory=Copies, repr=False)

    def __post_init__(self) -> None:
        self.uses = RequestUses(self.came, self.context.req_id)

    @property
    def may_wait(self) -> bool:
        """Whether it is live and has not given up."""
        return not self.finished and not self.wait.gave_up

    @property
    def is_pending(self) -> bool:
        """Whether it waits, holds a lease or has a plan to go on with, so that each step has to look at it."""
        wait, lease, plans = self.wait, self.lease, self.plans
        return bool(
            wait.since is not None
            or wait.probing_since
            or self.awaiting
            or lease.slots
            or lease.expires is not None
            or plans.scan is not None
            or (plans.outline is not None and not plans.outline.is_done)
        )


class ScannedRequests:
    """The requests that looked something up in this step.

    Attributes:
        states: in the order of their scans.
    """

    def __init__(self) -> None:
        self.states: list[RequestState] = []
        self._found: set[OffloadKey] = set()
        self._num_counted = 0

    def add(self, state: RequestState) -> None:
        """Add a request whose scan begins."""
        self.states.append(state)

    def found_by_waiting(self) -> Set[OffloadKey]:
        """Return the keys that waiting requests looked up in this step.

        They are leased at the end of the step. A store before that must not evict them.
        """
        if self._num_counted < len(self.states):
            # This runs about once per step: engines look up all waiting requests before they store for running ones.
            for state in self.states[self._num_counted :]:
                if state.wait.since is not None:
                    self._found.update(state.scan.keys)
            self._num_counted = len(self.states)
        return self._found

    def take(self) -> list[RequestState]:
        """Return the requests, oldest first, and begin a new step."""
        states = sorted(self.states, key=arrival)
        self.states.clear()
        self._found.clear()
        self._num_counted = 0
        return states


arrival = attrgetter("came")
"""Returns when a request came, to order requests by."""


class Requests:
    """The requests that are live, or that have unfinished copies between device and arena.

    A request gets its state when it first looks up, loads, stores or uses a block. Until then it is idle, and holds
    nothing: engines announce thousands of requests that they have not come to, and some never use the cache. No step
    visits the idle ones.

    Attributes:
        active: the live ones that a step has to look at. The others only decode: their blocks are loaded or computed,
            and they wait for nothing.
    """

    def __init__(self, tiers: SecondaryTiers, clock: Clock) -> None:
        """Args: tiers: told when a request is over."""
        self._tiers, self._times = tiers, Arrivals(clock)
        self._by_id: dict[str, RequestState] = {}
        self._idle: dict[str, tuple[ReqContext, float]] = {}
        """Requests without a state, with the time when they came."""
        self._new: set[str] = set()
        """Live requests that the engine has neither looked up nor begun to compute."""
        self.active: dict[RequestState, None] = {}  # not a set: mostly in the order of arrival, so soon sorted
        self.get: Callable[[str], RequestState | None] = self._by_id.get
        """Return the state of a request, or None. The dict's own method: it is called many times per request."""

    def __len__(self) -> int:
        return len(self._by_id) + len(self._idle)

    def __iter__(self) -> Iterator[RequestState]:
        """Yield the states; the caller may close them meanwhile."""
        return iter(list(self._by_id.values()))

    @property
    def num_new(self) -> int:
        """Number of live requests that the engine has neither looked up nor begun to compute."""
        return len(self._new)

    def announce(self, context: ReqContext) -> RequestState | None:
        """Learn of a new request; return its state if it has one already."""
        req_id = context.req_id
        if req_id in self._by_id:
            return self.open(context)
        if req_id not in self._idle:
            self._idle[req_id] = context, self._times.next()
            self._new.add(req_id)
        return None

    def note_begun(self, req_id: str) -> None:
        """Note that the engine computes this request. It never looks up some, for example prompts below one block."""
        self._new.discard(req_id)

    def activate(self, states: Iterable[RequestState]) -> None:
        """Look at these requests at each step from now on: the engine has looked them up, or begins them anew."""
        for state in states:
            if not state.finished:
                self.active[state] = None
                self._new.discard(state.context.req_id)

    def retire(self, states: Iterable[RequestState]) -> None:
        """Look no more at these requests until they are active again: they wait for nothing, and only decode."""
        for state in states:
            self.active.pop(state, None)

    def open(self, context: ReqContext) -> RequestState:
        """Return the state of a request; create it if the request has none, or comes again after its end.

        A request with the name of one that has ended starts afresh, except for the unfinished copies of that one.
        """
        req_id = context.req_id
        former = self._by_id.get(req_id)
        if former is not None and not former.finished:
            return former
        copies = Copies()
        if former is not None:
            self._tiers.forget(former.context)  # its last copies go on under another request of that name
            copies = former.copies
        if req_id in self._idle:
            context, came = self._idle.pop(req_id)
        else:
            came = self._times.next()
            self._new.add(req_id)
        wanted = context.load_tier_filter
        tiers = self._tiers.all_indices if wanted is _ALL_TIERS else self._tiers.allowed(wanted)
        state = self._by_id[req_id] = RequestState(context, came, tiers, copies)
        return state

    def find(self, context: ReqContext) -> RequestState | None:
        """Return the state of a request as `open` does, but None for one that was not announced."""
        return self.open(context) if context.req_id in self._idle else self._by_id.get(context.req_id)

    def close(self, state: RequestState) -> None:
        """Drop the request if it is finished and has no unfinished copies."""
        if not state.finished:
            return
        self._new.discard(state.context.req_id)
        self.active.pop(state, None)
        if state.copies.are_unfinished:
            return
        self._by_id.pop(state.context.req_id, None)
        if self._tiers.guards:
            self._tiers.forget(state.context)

    def drop_idle(self, context: ReqContext) -> None:
        """Drop a request that has ended, if it is idle."""
        if self._idle.pop(context.req_id, None) is not None:
            self._new.discard(context.req_id)
            if self._tiers.guards:
                self._tiers.forget(context)

    def check_invariants(self) -> None:
        """Raise InvariantError if a request's parts contradict each other."""
        live = {req_id for req_id, state in self._by_id.items() if not state.finished} | self._idle.keys()
        if not self._new <= live or not self._idle.keys().isdisjoint(self._by_id):
            raise InvariantError("a request counts as new after its end, or is idle and has a state")
        for state in self:
            if state.finished and (state.lease.slots or state.awaiting):
                raise InvariantError(f"request {state.context.req_id} is over and holds a lease or waits")
            if state.finished and not state.copies.are_unfinished:
                raise InvariantError(f"request {state.context.req_id} is over and was not dropped")
            if state in self.active and (state.finished or state.context.req_id in self._new):
                raise InvariantError(f"request {state.context.req_id} is over or new, and steps look at it")
            if state.is_pending and not state.finished and state not in self.active and not state.scan.keys:
                raise InvariantError(f"request {state.context.req_id} waits, and no step looks at it")
