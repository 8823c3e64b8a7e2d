"""One tier made of several slotted tiers, its stripes. Jobs are spread over the stripes that work.

Each stripe has its own I/O process, index, breaker and back-pressure. So if a device hangs or dies, only its own blocks
are lost. A block may be in any stripe; the stripes' indexes tell in which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from kvtier.abc import EvictionPolicy, SecondaryTierManager, TierContext
from kvtier.errors import InvariantError
from kvtier.events import BlocksEvicted, BlocksFailed, Event, Observer, TierState, TierStateChanged
from kvtier.keys import OffloadKey
from kvtier.secondary.chores import failed, settled
from kvtier.secondary.jobs import Job
from kvtier.secondary.settings import TierSettings
from kvtier.secondary.slotted import SlottedTierManager
from kvtier.secondary.trial import check_or_try
from kvtier.types import (
    Answer,
    AnswerState,
    JobMetadata,
    JobResult,
    KeyPage,
    LookupResult,
    OffloadingEvent,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)

MIN_RUN_BYTES = 2 << 20
"""A job is not split into smaller runs, since neighbouring blocks move in one call."""
_HIT, _MISS, _UP = LookupResult.HIT, LookupResult.MISS, TierState.UP
_BEST_FIRST = (TierState.UP, TierState.STARTING, TierState.DOWN)

Route = tuple[int, Sequence[int]]
"""A stripe's index, and the positions in a job of the blocks that go there."""


@dataclass(frozen=True)
class StripeSpec:
    """The spec for a stripe: the tier's context with a `StripeObserver`."""

    tier_context: TierContext


class StripeObserver:
    """Reports a stripe's events under the name of the whole tier."""

    def __init__(self, observer: Observer, tier_type: str, on_state: Callable[[], None]) -> None:
        """Args: on_state: called when the stripe's state has changed, instead of the event."""
        self._observer = observer
        self._tier_type = tier_type
        self._on_state = on_state

    def on_event(self, event: Event) -> None:
        if isinstance(event, TierStateChanged):
            self._on_state()
        elif isinstance(event, BlocksFailed | BlocksEvicted):
            self._observer.on_event(event._replace(tier=self._tier_type))
        else:
            self._observer.on_event(event)


def share_settings(settings: TierSettings, count: int) -> TierSettings:
    """Return the settings for one of `count` stripes.

    Stripes are drained and killed one after the other, so each has a part of the deadlines; limits are shared, too.
    """
    deadlines = settings.deadlines
    deadlines = replace(deadlines, drain=deadlines.drain / count, kill=deadlines.kill / count)
    return replace(settings, deadlines=deadlines, most_store_bytes=max(1, settings.most_store_bytes // count))


class StripedTierManager(SecondaryTierManager):
    """One tier over several stripes. It is UP while any stripe is."""

    verifies_payloads = True
    joins_stores = True
    deletes = True
    lists_keys = True

    @classmethod
    def check_options(
        cls, options: Mapping[str, Any], block_bytes: int, policies: Mapping[str, type[EvictionPolicy]]
    ) -> None:
        """Check the options with their struct or, without one, by calling the constructor, which has no side
        effects.
        """
        check_or_try(cls, options, block_bytes, policies)

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        *,
        names: Sequence[str],
        make_stripe: Callable[[StripeSpec, str, int], SlottedTierManager],
    ) -> None:
        """Args:
        names: of the stripes, for messages; at least one.
        make_stripe: makes a stripe from its spec, full name and index, without starting it.

        Raises:
            ConfigError: a stripe refuses its configuration.
        """
        super().__init__(offloading_spec, primary_kv_view, tier_type)
        context = getattr(offloading_spec, "tier_context", None)
        context = context if isinstance(context, TierContext) else TierContext()
        self._observer = context.observer
        spec = StripeSpec(replace(context, observer=StripeObserver(context.observer, tier_type, self._say_state)))
        self._said = (TierState.STARTING, "")
        self._closed = False
        self._names = tuple(names)
        self._stripes: list[SlottedTierManager] = []
        for index, name in enumerate(names):
            self._stripes.append(make_stripe(spec, f"{tier_type} ({name})", index))
        self._least_run = max(1, MIN_RUN_BYTES // self._stripes[0].block_bytes)
        self._next_stripe = 0
        self._next_part = 1
        self._clock = context.clock
        self._parts: dict[int, tuple[Job, Sequence[OffloadKey]]] = {}
        self._deletions: list[tuple[Answer[Collection[OffloadKey]], list[Answer[Collection[OffloadKey]]]]] = []
        """Open answers, each with those of the stripes."""
        self._listings: list[tuple[Answer[KeyPage], bytes, int]] = []
        """Open answers with their cursors and sizes, which wait for stripes that are starting."""

    # -- health -------------------------------------------------------------------------------------------

    @property
    def state(self) -> TierState:
        """CLOSED after `shutdown`, else the best state of a stripe."""
        if self._closed:
            return TierState.CLOSED
        states = {stripe.state for stripe in self._stripes}
        return next((state for state in _BEST_FIRST if state in states), TierState.DOWN)

    @property
    def state_reason(self) -> str:
        """Per stripe that is not UP, or has a reason: its name and reason."""
        if self._closed:
            return ""
        return "; ".join(
            f"{name}: {stripe.state_reason or stripe.state.value}"
            for name, stripe in zip(self._names, self._stripes, strict=True)
            if stripe.state is not _UP or stripe.state_reason
        )

    @property
    def progress(self) -> int:
        """Number of blocks that the stripes' executors have answered so far."""
        return sum(stripe.progress for stripe in self._stripes)

    @property
    def io_pids(self) -> list[int | None]:
        """Pid of the I/O process of each stripe; None where there is none at the moment."""
        return [stripe.io_pid for stripe in self._stripes]

    def start(self) -> None:
        for stripe in self._stripes:
            stripe.start()

    def _say_state(self) -> None:
        """Emit an event if the whole tier's state or reason has changed. Each stripe logs its own changes."""
        if len(self._stripes) < len(self._names):
            return
        now = (self.state, self.state_reason)
        if now != self._said:
            self._said = now
            self._observer.on_event(TierStateChanged(self.tier_type, *now))

    # -- lookups and jobs ---------------------------------------------------------------------------------

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Return HIT if a stripe can load the block now."""
        for stripe in self._stripes:
            if stripe.lookup(key, req_context) is _HIT:
                return _HIT
        return _MISS

    def can_store(self, num_blocks: int) -> bool:
        """Return whether the stripes together accept a job of this size."""
        return bool(self._choose(num_blocks))

    def submit_store(self, job_metadata: JobMetadata) -> None:
        """Start a store job. Blocks that a stripe has stay there; the others go to stripes in turn, in contiguous
        runs.
        """
        self._submit(job_metadata, SlottedTierManager.submit_store, self._route_store)

    def submit_load(self, job_metadata: JobMetadata) -> None:
        """Start loading each block from the stripe that has it."""
        self._submit(job_metadata, SlottedTierManager.submit_load, self._route_load)

    def cancel_loads(self, job_ids: Collection[int]) -> None:
        """Cancel the parts of these jobs, whichever stripes have them."""
        wanted = frozenset(job_ids)
        parts = [part_id for part_id, (job, _) in self._parts.items() if job.job_id in wanted]
        for stripe in self._stripes:
            stripe.cancel_loads(parts)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Return the results of jobs whose parts have all ended."""
        finished = []
        for stripe in self._stripes:
            for result in stripe.get_finished_jobs():
                job, keys = self._parts.pop(result.job_id)
                job.num_left -= len(keys)
                job.num_bytes += result.transfer_bytes or 0
                job.successful = [*job.successful, *(keys if result.success else result.successful_keys or ())]
                if not job.num_left:
                    finished.append(job.result(self._clock()))
        if self._deletions:
            self._settle_deletions()
        if self._listings:
            self._settle_listings()
        return finished

    def _submit(
        self,
        metadata: JobMetadata,
        submit: Callable[[SlottedTierManager, JobMetadata], None],
        route: Callable[[Sequence[OffloadKey]], list[Route]],
    ) -> None:
        keys, slots = metadata.keys, metadata.block_ids
        routes = route(keys) if len(keys) == len(slots) else []
        if len(routes) <= 1:  # without a route, the first stripe gets the job, refuses it and counts that
            index = routes[0][0] if routes else 0
            parts = [(index, metadata)]
        else:
            parts = [(index, _part_of(metadata, positions)) for index, positions in routes]
        num_blocks = sum(len(part.keys) for _, part in parts)
        job = Job(metadata.job_id, keys, (), metadata.is_promotion, metadata.req_context, self._clock(), num_blocks)
        for index, part in parts:
            part_id, self._next_part = self._next_part, self._next_part + 1
            self._parts[part_id] = (job, part.keys)
            submit(self._stripes[index], replace(part, job_id=part_id))

    def _route_load(self, keys: Sequence[OffloadKey]) -> list[Route]:
        """Return the stripes to load `keys` from. Keys that no stripe has are added to one route, and fail there."""
        routes, rest = self._route_held(keys)
        if not rest:
            return routes
        if not routes:
            index = next((index for index, stripe in enumerate(self._stripes) if stripe.state is _UP), 0)
            return [(index, rest)]
        index, positions = routes[0]
        return [(index, [*positions, *rest]), *routes[1:]]

    def _route_store(self, keys: Sequence[OffloadKey]) -> list[Route]:
        """Return the stripes to store `keys` in; a repeated key is stored once."""
        routes, rest = self._route_held(keys)
        first_of: dict[OffloadKey, int] = {}
        for position in rest:
            first_of.setdefault(keys[position], position)
        fresh = list(first_of.values())
        if not fresh:
            return routes
        chosen = self._choose(len(fresh))
        if not chosen:
            return [*routes, (self._next_stripe, fresh)]
        self._next_stripe = (chosen[-1] + 1) % len(self._stripes)
        size = -(-len(fresh) // len(chosen))
        runs = [(index, fresh[turn * size : (turn + 1) * size]) for turn, index in enumerate(chosen)]
        return _merge([*routes, *((index, run) for index, run in runs if run)])

    def _route_held(self, keys: Sequence[OffloadKey]) -> tuple[list[Route], list[int]]:
        """Return routes for the blocks that stripes have or are storing, and the positions of the others."""
        wanted = set(keys)
        owner: dict[OffloadKey, int] = {}
        for index, stripe in enumerate(self._stripes):
            owner.update(dict.fromkeys(stripe.held(wanted - owner.keys() if owner else wanted), index))
        if not owner:
            return [], list(range(len(keys)))
        positions: dict[int, list[int]] = {}
        rest: list[int] = []
        for position, key in enumerate(keys):
            index = owner.get(key, -1)
            (rest if index < 0 else positions.setdefault(index, [])).append(position)
        return list(positions.items()), rest

    def _choose(self, num_blocks: int) -> list[int]:
        """Return the stripes for a job, beginning with the one whose turn it is.

        They get equal runs, so there are only as many as have runs of at least `MIN_RUN_BYTES` and accept them.
        """
        turn, total = self._next_stripe, len(self._stripes)
        count = min(total, max(1, num_blocks // self._least_run))
        while count:
            run = -(-num_blocks // count)
            order = [(turn + step) % total for step in range(total)]
            takers = [index for index in order if self._stripes[index].can_store(run)][:count]
            if len(takers) == count:
                return takers
            count = len(takers)
        return []

    # -- calls for every stripe ---------------------------------------------------------------------------

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Count a use of the stored ones of `keys`, given in prefix order."""
        for stripe in self._stripes:
            stripe.touch(keys, req_context)

    def pin(self, keys: Collection[OffloadKey]) -> None:
        """Pin the stored ones of `keys`, each in its stripe."""
        for stripe in self._stripes:
            stripe.pin(keys)

    def unpin(self, keys: Collection[OffloadKey]) -> None:
        for stripe in self._stripes:
            stripe.unpin(keys)

    def ask_held(self, keys: Collection[OffloadKey]) -> Answer[Collection[OffloadKey]] | None:
        """Fail while a stripe is not up: it may have blocks, and its index is not known."""
        return None if all(stripe.state is _UP for stripe in self._stripes) else failed()

    def delete(self, keys: Collection[OffloadKey]) -> Answer[Collection[OffloadKey]]:
        """Delete blocks from every stripe. A stripe that is down may have blocks: then the answer fails."""
        answers = [stripe.delete(keys) for stripe in self._stripes]
        joined: Answer[Collection[OffloadKey]] = Answer()
        self._deletions.append((joined, answers))
        self._settle_deletions()
        return joined

    def list_keys(self, cursor: bytes, most: int) -> Answer[KeyPage]:
        """List one stripe after the other. All must be up: another listing would miss the blocks of the others."""
        if self._is_starting():
            answer: Answer[KeyPage] = Answer()
            self._listings.append((answer, cursor, most))
            return answer
        return self._list(cursor, most)

    def _is_starting(self) -> bool:
        return not self._closed and any(stripe.state is TierState.STARTING for stripe in self._stripes)

    def _list(self, cursor: bytes, most: int) -> Answer[KeyPage]:
        index = cursor[0] if cursor else 0
        if index >= len(self._stripes) or any(stripe.state is not _UP for stripe in self._stripes):
            return failed()
        answer = self._stripes[index].list_keys(cursor[1:], most)
        page = answer.value
        if page is None:
            return answer
        if page.cursor is not None:
            return settled(page._replace(cursor=bytes([index]) + page.cursor))
        return settled(page._replace(cursor=bytes([index + 1]) if index + 1 < len(self._stripes) else None))

    def _settle_listings(self) -> None:
        if self._is_starting():
            return
        for waiting, cursor, most in self._listings:
            page = self._list(cursor, most).value  # a slotted tier answers at once
            waiting.fail() if page is None else waiting.settle(page)
        self._listings.clear()

    def _settle_deletions(self) -> None:
        still_open = []
        for joined, answers in self._deletions:
            states = {answer.state for answer in answers}
            if AnswerState.FAILED in states:
                joined.fail()
            elif AnswerState.OPEN in states:
                still_open.append((joined, answers))
            else:
                joined.settle(frozenset.intersection(*(frozenset(answer.value or ()) for answer in answers)))
        self._deletions = still_open

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        for stripe in self._stripes:
            stripe.on_new_request(req_context)
        return super().on_new_request(req_context)

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Order the request's blocks by recency, tail first, in every stripe."""
        for stripe in self._stripes:
            stripe.on_request_finished(req_context)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        for stripe in self._stripes:
            stripe.on_schedule_end(context)

    def has_pending_work(self) -> bool:
        return any(stripe.has_pending_work() for stripe in self._stripes)

    def drain_jobs(self) -> None:
        """Drain every stripe within its share of the deadline; the others work meanwhile."""
        for stripe in self._stripes:
            stripe.drain_jobs()

    def start_epoch(self, epoch: bytes) -> None:
        for stripe in self._stripes:
            stripe.start_epoch(epoch)

    def take_events(self) -> Iterable[OffloadingEvent]:
        return [event for stripe in self._stripes for event in stripe.take_events()]

    def get_stats(self) -> Mapping[str, float]:
        """Return sums over the stripes, the mean of `prepared_share`, and the numbers of stripes and of those UP."""
        stats: dict[str, float] = {}
        num_preparing = 0
        for stripe in self._stripes:
            of_stripe = stripe.get_stats()
            num_preparing += "prepared_share" in of_stripe
            for name, value in of_stripe.items():
                stats[name] = stats.get(name, 0) + value
        if num_preparing:
            stats["prepared_share"] /= num_preparing
        stripes_up = sum(stripe.state is _UP for stripe in self._stripes)
        return {**stats, "stripes": len(self._stripes), "stripes_up": stripes_up}

    def shutdown(self) -> None:
        """Shut down every stripe within its share of the deadline."""
        self._closed = True
        self._say_state()
        for stripe in self._stripes:
            stripe.shutdown()
        self._settle_listings()

    def check_invariants(self) -> None:
        """Raise InvariantError if a stripe contradicts itself, or parts and jobs each other."""
        for stripe in self._stripes:
            stripe.check_invariants()
        left: Counter[Job] = Counter()
        for job, keys in self._parts.values():
            left[job] += len(keys)
        if any(job.num_left != count for job, count in left.items()):
            raise InvariantError("a job waits for blocks that are in no part")


def _merge(routes: Sequence[Route]) -> list[Route]:
    """Return one route per stripe."""
    merged: dict[int, list[int]] = {}
    for index, positions in routes:
        merged.setdefault(index, []).extend(positions)
    return [(index, sorted(positions)) for index, positions in merged.items()]


def _part_of(metadata: JobMetadata, positions: Sequence[int]) -> JobMetadata:
    """Return the job of the blocks at these positions of a job, with the requests that they come from."""
    keys, slots = (
        [metadata.keys[position] for position in positions],
        metadata.block_ids[np.asarray(positions, np.intp)],
    )
    if not metadata.shares:
        return replace(metadata, keys=keys, block_ids=slots)
    requests = [request for request, its_keys in metadata.by_request() for _ in its_keys]
    runs = [list(run) for _, run in groupby([requests[position] for position in positions], key=id)]
    shares = tuple((run[0], len(run)) for run in runs)
    return replace(metadata, keys=keys, block_ids=slots, req_context=shares[0][0], shares=shares)
