"""The tiering manager: it connects the parts of this package, which make the decisions.

It runs on one thread at a time, usually the engine's scheduler thread. A call that would change something while another
thread is in one raises OverlappingCallError. No call does I/O or waits, except `reset_cache` and `shutdown`, which wait
for tiers at most `drain_timeout`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtier import forks
from kvtier.abc import OffloadingManager, SecondaryTierManager
from kvtier.clock import Clock, monotonic_clock
from kvtier.errors import BlockNotReadyError
from kvtier.events import (
    BlocksEvicted,
    BlocksLoaded,
    BlocksStored,
    CacheReset,
    HintIgnored,
    LoadFailed,
    Observer,
    Observers,
    TierState,
    WaitOutcome,
)
from kvtier.hints import NO_HINT, Hint, read_hint
from kvtier.key_tables import NOT_A_KEY, SHARD_BYTE
from kvtier.keys import OffloadKey
from kvtier.log import logger
from kvtier.metrics.counters import EventCounters, tier_readings
from kvtier.primary.manager import CPUPrimaryTierOffloadingManager
from kvtier.primary.retention import Retention, num_kept
from kvtier.primary.uses import RequestUses
from kvtier.tiering.audit import check_slots
from kvtier.tiering.cascades import Cascades
from kvtier.tiering.device_copies import DeviceTransfers
from kvtier.tiering.evicted_keys import EvictedKeys
from kvtier.tiering.flights import Flights
from kvtier.tiering.kv_events import KVEventLog
from kvtier.tiering.leases import Leases
from kvtier.tiering.lookups import Lookups
from kvtier.tiering.pace import Pace
from kvtier.tiering.promotion import Promoter
from kvtier.tiering.requests import PRIMARY, Requests, RequestState, ScannedRequests, arrival
from kvtier.tiering.running import RunningRequests
from kvtier.tiering.settings import ResetPolicy, TieringSettings
from kvtier.tiering.tiers import SecondaryTiers
from kvtier.tiering.turns import in_turn
from kvtier.tiering.uses import Usage
from kvtier.tiering.waiting import Waiting
from kvtier.tiering.watchers import Watcher
from kvtier.types import (
    Admission,
    CPULoadStoreSpec,
    LookupResult,
    OffloadingEvent,
    OffloadPolicy,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)

EPOCH_BYTES = 16

_HIT, _MISS = LookupResult.HIT, LookupResult.MISS
_BLOCK_LEVEL = RequestOffloadingContext(OffloadPolicy.BLOCK_LEVEL)
_REQUEST_LEVEL = RequestOffloadingContext(OffloadPolicy.REQUEST_LEVEL)
_DEFAULT_SETTINGS = TieringSettings()


class TieringOffloadingManager(forks.ProcessBound, OffloadingManager):
    """A primary tier and any number of secondary tiers, as one cache."""

    # The attributes that `lookup` reads. CPython reads a slot directly. It keeps the other attributes of an instance in
    # a dict once there are more than 29, and with these among them each lookup was measured to take 15% longer.
    __slots__ = ("_current", "_filling", "_find", "_resolve", "_scan", "_shards", "_state")

    def __init__(
        self,
        primary_tier: CPUPrimaryTierOffloadingManager,
        secondary_tiers: Sequence[SecondaryTierManager] | None = None,
        *,
        names: Sequence[str] | None = None,
        admissions: Sequence[Admission] | None = None,
        probe_deadlines: Sequence[float | None] | None = None,
        settings: TieringSettings = _DEFAULT_SETTINGS,
        clock: Clock = monotonic_clock,
        observer: Observer | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        """Wire the tiers, which the caller has started.

        Args:
            secondary_tiers: in the order in which they are asked.
            names: one per tier, for events and `get_load_source`; default the tier types, made distinct.
            admissions: one per tier; default ALWAYS.
            probe_deadlines: one per tier, seconds; None for that of `settings`, or else the tier's own.
            observer: receives events, as the manager's own counters do. If it is an `Observers`, the counters also
                count what tiers report to it.
            watcher: told of lookups and of tiers' answers.
        """
        self._counters = EventCounters()
        self._kv_events = KVEventLog()
        self._observer = Observers() if observer is None else Observers.over(observer)
        self._observer.add(self._counters)
        self._observer.add(EvictedKeys(self._observer), BlocksEvicted, BlocksStored, CacheReset)
        if settings.kv_events:
            self._observer.add(self._kv_events, BlocksStored, BlocksEvicted, LoadFailed)
        self._settings, self._clock, self._watcher = settings, clock, watcher
        self._primary = primary_tier
        self._closed = False
        self._left: SecondaryTiers | None = None
        self.thread_inside: int | None = None
        self._wire(self._guarded(list(secondary_tiers or ()), names, admissions, probe_deadlines))
        forks.register(self)

    def _guarded(
        self,
        tiers: Sequence[SecondaryTierManager],
        names: Sequence[str] | None = None,
        admissions: Sequence[Admission] | None = None,
        probe_deadlines: Sequence[float | None] | None = None,
    ) -> SecondaryTiers:
        return SecondaryTiers(
            tiers,
            names,
            admissions,
            probe_deadlines,
            self._settings,
            self._clock,
            self._observer,
            self._primary.num_blocks,
            self._primary.block_bytes,
        )

    def _wire(self, tiers: SecondaryTiers) -> None:
        """Create and connect the parts, over the primary tier and `tiers`."""
        settings, clock = self._settings, self._clock
        self._table, self._tiers = self._primary.table, tiers
        if tiers.guards:
            self._table.transit.open(self._table.num_slots)
        table, guards, observer = self._table, self._tiers.guards, self._observer
        self._requests = Requests(tiers, clock)
        self._transfers = DeviceTransfers(table, observer, self._primary.finished_sequence)
        self._flights = Flights()
        leases = Leases(table, settings.most_promoted(table.num_slots), settings.lease_timeout)
        self._pace = Pace(settings)
        self._waiting = Waiting(table, guards, self._flights, leases, self._pace, settings, clock, observer)
        self._lookups = Lookups(table, guards, self._flights, self._waiting)
        self._retention = Retention(clock, settings.retain_share, settings.tenant_quotas)
        self._running = RunningRequests(table)
        self._promoter = Promoter(
            table,
            guards,
            self._flights,
            leases,
            self._waiting,
            self._pace,
            self._retention,
            self._running,
            self._primary.block_bytes,
            clock,
            observer,
        )
        self._cascades = self._make_cascades(table, guards, self._pace, self._primary.block_bytes, clock, observer)
        self._note_use = Usage(self._table, self._tiers, self._cascades, self._retention).note
        self._scanned = ScannedRequests()
        self._has_to_poll = bool(guards) or self._watcher is not None or self._left is not None
        self._polled = False
        self._current: ReqContext | None = None
        self._state: RequestState
        self._scan: list[OffloadKey] = []
        self._num_before_scan = 0
        self._find: Callable[[OffloadKey], int | None] = self._table.slot_of.get
        self._shards: list[dict[OffloadKey, int]] | None = self._table.slot_of.shards
        self._filling = self._table.filling
        self._resolve = self._lookups.resolve

    def _make_cascades(self, *parts: Any) -> Cascades:
        """Return what sends blocks to the tiers. Recordings and their replays have their own."""
        return Cascades(*parts)

    def leave_to_parent(self) -> None:
        """In a forked child, go on with no slot and no tier: every lookup misses, and nothing is stored."""
        self._left = self._tiers  # kept, because a plug-in's destructor might end what the parent uses
        self.thread_inside = None
        self._primary.give_up_slots()
        self._wire(self._guarded(()))
        self._kv_events.take(())

    # -- lookups ------------------------------------------------------------------------------------------

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Return whether one block can be loaded now, soon, maybe or not; see `OffloadingManager.lookup`.

        The keys looked up within a step are the request's scan, in the engine's order. `on_schedule_end` plans from it.
        """
        if req_context is not self._current:
            self._enter(req_context)
        self._scan.append(key)
        shards = self._shards
        if shards is None:
            find = self._find  # a call of `self._find(key)` would look for a method of the class first
            slot = find(key)
        else:  # repeats `ShardedDict.get` to save a call
            try:
                slot = shards[key[SHARD_BYTE]].get(key)
            except NOT_A_KEY:
                return _MISS
        if slot is None:
            if not self._state.tiers:
                return _MISS
        elif slot not in self._filling:
            return _HIT
        return self._resolve(self._state, key, slot is not None)

    @property
    def num_lookups(self) -> int:
        """Number of keys looked up so far, counted by the lengths of scans: a count per lookup takes 50 ns."""
        return self._num_before_scan + len(self._scan)

    def lookup_prefix(self, keys: Sequence[OffloadKey], req_context: ReqContext) -> tuple[int, int]:
        """Look up `keys` one after the other up to the first `MISS`, as `lookup` does, in one call.

        Returns:
            Blocks that are ready, and blocks that are not yet (`HIT_PENDING` or `RETRY`).
        """
        if req_context is not self._current:
            self._enter(req_context)
        return self._lookups.find_prefix(self._state, keys)

    def is_still_deferred(self, first_key: OffloadKey, req_context: ReqContext, shortest: int = 1) -> bool:
        """Return whether a scan of this request from `first_key` on would be deferred, as its last one was.

        Args:
            shortest: the answer is False if the last scan had fewer keys than this in any KV group.

        True while the request awaits blocks or has some left to plan, none has failed, and no deadline has passed. The
        engine may then skip the scan in this step. The cost of this call does not depend on the scan's length.
        """
        if not self._polled:
            self._poll_once()
        state = self._requests.get(req_context.req_id)
        return state is not None and self._promoter.is_as_planned(state, first_key, shortest)

    @in_turn
    def _enter(self, req_context: ReqContext) -> None:
        if not self._polled:
            self._poll()
        # A lookup by a thread that takes no turns may meet the state from now on.
        self._state = state = self._requests.open(req_context)
        scan = state.scan.keys
        self._num_before_scan = self.num_lookups - len(scan)
        self._current, self._scan = req_context, scan
        if not scan:
            self._scanned.add(state)
        if self._watcher is not None:
            self._watcher.on_scan(state)

    def get_load_source(self, key: OffloadKey, req_context: ReqContext) -> str:
        """Return the tier that a hit of this request came from: "primary", or the name of a secondary tier."""
        state = self._requests.get(req_context.req_id)
        return state.plans.sources.get(key, PRIMARY) if state is not None else PRIMARY

    # -- transfers between device and primary -------------------------------------------------------------

    @in_turn
    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> CPULoadStoreSpec:
        """Pin `keys`, return their slots in order, and end the request's lease.

        Raises:
            BlockNotReadyError: a key is not ready; nothing was pinned.
        """
        state = self._requests.open(req_context)
        ordered = keys if isinstance(keys, list) else list(keys)
        leased = None if state.copies.loading else self._promoter.hand_over(state, ordered)
        if leased is None:
            slots, once = self._transfers.begin_load(state, ordered)
            places, by_source = np.fromiter(slots, np.int32, len(slots)), None
        else:
            (slots_by_key, places, by_source), once = leased, ordered
            self._transfers.begin_leased_load(state, slots_by_key)
        if self._tiers.guards:
            self._running.note_load(state, places)
        num_tokens, seconds = self._pace.note_load(state, ordered)
        if state.lease.slots or state.awaiting:
            self._promoter.let_go(state)
        if state.wait.since is not None or state.wait.waited:
            self._waiting.settle(state, WaitOutcome.LOADED)
        self._note_use(once, req_context, state.uses, all_held=True)
        if ordered:
            if by_source is None:
                by_source = state.plans.count_sources(ordered)
            if self._tiers.guards:
                self._promoter.note_hits(by_source.get(PRIMARY, 0))
            self._transfers.announce(state, BlocksLoaded(req_context.req_id, by_source, num_tokens, seconds))
        if self._left is not None and len(places):  # an observer has forked during this call, and this is the child
            raise BlockNotReadyError("this process was forked during the call")
        return self._make_spec(places)

    @in_turn
    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        """Unpin `keys`, and forget them if the copy failed; see `OffloadingManager.complete_load`.

        With `success=False` the load need not have been prepared: `prepare_load` may have raised.
        """
        state = self._requests.get(req_context.req_id)
        dropped = self._transfers.end_load(req_context.req_id, state, keys, success)
        if not success:
            self._promoter.lose(self._requests, frozenset(dropped))
            self._observer.on_event(LoadFailed(req_context.req_id, dropped))
        if state is None:
            return
        if state.finished:
            self._requests.close(state)
        elif not success:
            self._begin_attempt(state)

    @in_turn
    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Count a use of `keys`, given in prefix order, in every tier. Each block counts once per request."""
        ordered = keys if isinstance(keys, list) else list(keys)
        once = ordered if len(set(ordered)) == len(ordered) else list(dict.fromkeys(ordered))
        state = self._requests.find(req_context)
        uses = RequestUses(self._clock()) if state is None else state.uses
        self._note_use(once, req_context, uses)

    @in_turn
    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput | None:
        """Choose slots for blocks that the primary tier lacks; see `OffloadingManager.prepare_store`.

        Blocks that it holds count as used. A block that is in flight from a tier, and that no request waits for or
        may wait for, is stored in another slot.
        """
        if not self._polled:
            self._poll()
        state = self._requests.open(req_context)
        ordered = keys if isinstance(keys, list) else list(keys)
        self._note_begun(req_context.req_id, state)
        self._pace.note_store(state, ordered)
        if self._flights.by_key:
            self._promoter.take_over_abandoned(ordered)
        slot_of = self._table.slot_of
        all_new = slot_of.isdisjoint(ordered)
        state.uses.note_offer(ordered)
        if not all_new:
            self._note_use(slot_of.held(dict.fromkeys(ordered)), req_context, state.uses, all_held=True)
        own: Set[OffloadKey] = frozenset()
        found: Set[OffloadKey] = frozenset()
        self._retention.serve(self._table, state.uses)
        if len(ordered) > self._table.num_free:
            own, found = state.uses.own, self._scanned.found_by_waiting()
            self._table.touch((), state.uses.came)  # tells the policy which request the victims make room for
        placement = self._table.plan(
            ordered,
            own,
            found,
            all_new=all_new,
            declining=self._promoter.declining,
            num_wanted=self._cascades.room,
        )
        if placement.num_left_out and not placement.keys:
            return None
        slots = self._transfers.begin_store(state, placement)
        state.uses.note_stored(placement.keys)
        if placement.victims:
            self._observer.on_event(BlocksEvicted(PRIMARY, placement.victims))
        for index in state.request_level_tiers:
            held = [key for key in dict.fromkeys(ordered) if self._table.is_ready(key)]
            if held and self._tiers[index].can_store(len(held)):
                self._cascades.start(self._tiers[index], held, req_context)
        places = np.fromiter(slots, np.int32, len(slots))
        if self._tiers.guards:
            self._running.note_store(state, places)
        return PrepareStoreOutput(placement.keys, self._make_spec(places), placement.victims)

    def _make_spec(self, places: NDArray[np.int32]) -> CPULoadStoreSpec:
        """Return the spec of a transfer. A spec without slots reaches no worker, so it gets no sequence number."""
        return CPULoadStoreSpec(places, self._primary.next_sequence() if len(places) else 0)

    @in_turn
    def complete_store(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        """Make stored blocks loadable and offer them to every tier; see `OffloadingManager.complete_store`."""
        state = self._requests.get(req_context.req_id)
        ready = self._transfers.end_store(req_context.req_id, state, keys, success)
        if self._flights.late:
            self._flights.end_stores(keys)
        if not success and self._settings.kv_events:
            self._kv_events.failed(list(keys))
        if state is None:
            return
        if ready:
            if self._tiers.guards:
                for guard, admitted in self._cascades.on_store(ready, state.context):
                    self._cascades.start(guard, admitted, state.context)
            self._observer.on_event(BlocksStored(ready))
        if state.finished:
            self._requests.close(state)

    # -- requests and steps -------------------------------------------------------------------------------

    @in_turn
    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Register a request. Return REQUEST_LEVEL if any tier wants all of its blocks."""
        state = self._requests.announce(req_context)
        if req_context.kv_transfer_params is not None or state is not None:
            hint = self._read_hint(req_context)
            if hint is not NO_HINT or state is not None:
                self._requests.open(req_context).uses.hint = hint
        if not self._tiers.guards:
            return _BLOCK_LEVEL
        request_level = self._tiers.announce(req_context)
        if request_level or state is not None:
            self._requests.open(req_context).request_level_tiers = request_level
        return _REQUEST_LEVEL if request_level else _BLOCK_LEVEL

    def _read_hint(self, req_context: ReqContext) -> Hint:
        """Return the request's hint. Malformed hints are counted, and the first one is logged."""
        hint, fault = read_hint(req_context.kv_transfer_params)
        if fault:
            if not self._counters.snapshot().get("ignored_hints"):
                logger.warning("kvtier: the hint of a request is ignored, as all are that are malformed: %s", fault)
            self._observer.on_event(HintIgnored(req_context.req_id, fault))
        return hint

    @in_turn
    def on_request_finished(self, req_context: ReqContext) -> None:
        """End the request's waits and its lease; its blocks take their places in the order of recency."""
        state = self._requests.get(req_context.req_id)
        if state is None:
            self._requests.drop_idle(req_context)
            return
        state.finished = True
        self._current = None
        self._pace.note_end(state)
        self._promoter.let_go(state)
        self._waiting.settle(state, WaitOutcome.CANCELLED)
        self._lookups.end_scan(state)
        self._running.end(state)
        self._retention.serve(self._table, state.uses)
        self._table.settle(state.uses.in_order(req_context))
        self._requests.close(state)

    @in_turn
    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Collect results, end waits and leases that are over, and plan promotions, oldest request first."""
        if self._has_to_poll or self._transfers.stale.pending:
            self._poll()
        now = self._clock()
        self._pace.end_step(now)
        if not len(self._requests):
            self._pace.note_idle()
        for req_id in context.new_req_ids:
            self._note_begun(req_id, self._requests.get(req_id))
        for req_id in context.preempted_req_ids:
            state = self._requests.get(req_id)
            if state is not None:
                self._begin_attempt(state)
        if self._scanned.states or self._requests.active:
            self._plan(now)
        if self._tiers.guards:
            self._promoter.send()
            self._cascades.send()
            self._tiers.end_step(context)
        self._polled, self._current = False, None
        if self._observer.held:
            self._observer.raise_held()

    def _plan(self, now: float) -> None:
        """End the waits whose deadline has passed or that have become longer than computing takes, and plan anew."""
        scanned = self._scanned.take()
        for state in scanned:
            self._pace.note_scan(state)
        self._requests.activate(scanned)
        active = sorted(self._requests.active, key=arrival)
        self._waiting.check(active, now)
        self._pace.note_backlog(active, self._requests.num_new)
        self._promoter.reconsider([state for state in active if state.awaiting], now)
        self._promoter.plan(scanned)
        for state in scanned:
            self._lookups.end_scan(state)
        self._requests.retire([state for state in self._pace.done(active) if not state.is_pending])

    def _note_begun(self, req_id: str, state: RequestState | None) -> None:
        """Note that the engine computes this request, whatever it has waited for."""
        self._requests.note_begun(req_id)
        if state is not None and (state.wait.since is not None or state.wait.waited):
            self._waiting.settle(state, WaitOutcome.COMPUTED)

    def _begin_attempt(self, state: RequestState) -> None:
        """Let a request look up and wait anew: it was preempted, its load failed, or the cache was reset."""
        if state.progress.first_key is not None:
            self._requests.activate([state])
        self._waiting.begin_attempt(state)
        self._promoter.begin_attempt(state)
        self._pace.begin_attempt(state)

    @in_turn
    def _poll_once(self) -> None:
        if not self._polled:
            self._poll()

    def _poll(self) -> None:
        """Take in what tiers have finished. The caller is a method under `in_turn`."""
        self._polled = True
        if self._left is not None:
            forks.advise()
        if self._tiers.guards:
            self._poll_tiers()
        if self._transfers.stale.pending:
            self._transfers.stale.sweep()
        if self._watcher is not None:
            self._watcher.on_poll(self._tiers.guards)

    def _poll_tiers(self) -> None:
        for guard in self._tiers.guards:
            for job in guard.poll():
                if self._watcher is not None:
                    self._watcher.on_job_ended(guard, job)
                if job.is_promotion:
                    self._promoter.land(guard, job)
                else:
                    self._cascades.end(guard, job)
        now = self._clock()
        self._promoter.note_polled(now)
        self._cascades.note_polled(now)

    def has_pending_work(self) -> bool:
        """Return whether a request awaits a promotion, stores make progress, or a step has an exception to raise."""
        return bool(self._observer.held) or self._flights.has_live or self._tiers.has_live_cascade(self._clock())

    # -- reports ------------------------------------------------------------------------------------------

    @in_turn
    def take_events(self) -> Iterable[OffloadingEvent]:
        """Return KV events of the primary and secondary tiers since the last call. Engines ask after each step."""
        self._pace.note_output(self._clock())
        return self._kv_events.take(self._table.slot_of) + self._tiers.take_events()

    def get_stats(self) -> Mapping[str, float]:
        """Return counters since the start and current gauges, by the names that `kvtier.metrics` declares."""
        table, block_bytes = self._table, self._primary.block_bytes
        num_slots = max(1, table.num_slots)  # a forked child has none
        held = {
            "blocks": len(table),
            "bytes": len(table) * block_bytes,
            "capacity_blocks": table.num_slots,
            "capacity_bytes": table.num_slots * block_bytes,
            "kept_blocks": num_kept(table),
            "quarantined_blocks": table.num_quarantined,
            "pinned_share": (len(table.pins) + len(table.filling)) / num_slots,
            "filling_share": len(table.filling) / num_slots,
            "reading_share": len(table.pins) / num_slots,
        }
        counted = self._counters.snapshot()
        return counted | tier_readings(PRIMARY, held) | self._tiers.stats()

    def get_histograms(self) -> Mapping[str, Sequence[int]]:
        """Return per histogram, as `name.label.label`, the number of values in each bucket of its row in `METRICS`; the
        last bucket has no upper end.
        """
        return self._counters.histograms()

    @property
    def prefill_rate(self) -> float:
        """Tokens per second that the engine computes in an empty context: as set or guessed, until it is measured."""
        return self._pace.speed.rate

    @in_turn
    def tier_states(self) -> dict[str, tuple[TierState, str]]:
        """Return state and reason of every secondary tier, by name."""
        self._poll()
        return self._tiers.states()

    # -- ends ---------------------------------------------------------------------------------------------

    @in_turn
    def reset_cache(self, late_completions: bool = True) -> None:
        """Forget every block in the primary tier; waits for tiers at most `drain_timeout`.

        With `ResetPolicy.NEW_EPOCH`, the tiers' blocks miss from now on, too. Slots that a tier or a device copy may
        still touch stay quarantined until it has ended.

        Args:
            late_completions: whether the engine completes the copies that are running now. If not, a completion that
                follows is always that of a newer copy.
        """
        self._cascades.forget_late()
        self._cascades.send()
        self._tiers.drain()
        self._poll()
        for state in self._requests:
            self._promoter.let_go(state)
            self._transfers.stale.take_over(state, self._primary.sequence, late_completions)
            self._begin_attempt(state)
            self._promoter.forget_sources(state)
            self._lookups.end_scan(state)
            state.uses.clear()
        self._flights.clear()
        if self._settings.kv_events:
            self._kv_events.cleared(list(self._table.ready_keys()))
        self._table.clear()
        epoch = os.urandom(EPOCH_BYTES) if self._settings.on_reset is ResetPolicy.NEW_EPOCH else b""
        if epoch:
            self._tiers.start_epoch(epoch)
        self._observer.on_event(CacheReset(self._table.num_quarantined, epoch))
        for state in self._requests:
            self._requests.close(state)
        self._scanned.take()
        self._polled, self._current = False, None

    @in_turn
    def on_reset_flushed(self) -> None:
        """Free the slots of copies that were running at the last reset; see `OffloadingManager.on_reset_flushed`."""
        self._transfers.stale.end()

    @in_turn
    def shutdown(self) -> None:
        """End all tiers, within `drain_timeout`; idempotent."""
        if not self._closed:
            self._closed = True
            self._cascades.forget_late()
            self._cascades.send()
            self._tiers.shutdown()
            self._observer.raise_held()

    def check_invariants(self) -> None:
        """Raise InvariantError if any part contradicts itself or another."""
        self._table.check_invariants()
        check_slots(self._table, self._requests, self._transfers.stale.slots(), self._tiers)
        self._requests.check_invariants()
        self._promoter.check_invariants(self._requests)
        self._running.check_invariants()
        self._tiers.check_invariants()
