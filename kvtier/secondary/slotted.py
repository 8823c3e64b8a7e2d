"""A secondary tier over any `SlotStore`: it has an index in memory, an exact capacity and an eviction policy."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from itertools import compress
from typing import Any

from kvtier.abc import BlockStore, SlotStore
from kvtier.errors import KeyFormatError, ProtocolError, StoreError
from kvtier.events import BlocksEvicted, TierState
from kvtier.eviction.built_in import find_policy
from kvtier.executors.base import Report
from kvtier.executors.protocol import IndexBatch, IndexEnd, PartResult, Prepared, Ready, Slots
from kvtier.keys import OffloadKey
from kvtier.primary.retention import Retention, num_kept
from kvtier.primary.table import BlockTable, Placement
from kvtier.primary.uses import TierUses
from kvtier.secondary.chores import failed, page_of, settled
from kvtier.secondary.jobs import MovingJob
from kvtier.secondary.settings import TierSettings
from kvtier.secondary.store_tier import StoreTierManager
from kvtier.types import (
    Answer,
    FailureCause,
    JobMetadata,
    KeyPage,
    LookupResult,
    OffloadingEvent,
    ReqContext,
    RequestOffloadingContext,
)

_MAX_EVENTS = 10_000
"""Most events that are kept until they are taken. Each names at least one block."""
_MAX_SLOTS = 1 << 26
"""Most slots of a store of unknown size: their index takes some gigabytes."""
_FULL_SECONDS = 5.0
"""After a store has failed for lack of space, no unused slot is tried for this long."""
_HIT, _MISS, _UP = LookupResult.HIT, LookupResult.MISS, TierState.UP


class SlottedTierManager(StoreTierManager):
    """Blocks in the slots of a `SlotStore`. The index is read from the store at every start."""

    verifies_payloads = True
    deletes = True
    lists_keys = True

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        *,
        store: str | type[SlotStore] | type[BlockStore],
        options: Mapping[str, Any],
        eviction_policy: str = "lru",
        settings: TierSettings | None = None,
    ) -> None:
        """Args: as `StoreTierManager`; store: a SlotStore; eviction_policy: a name that `find_policy` knows.

        Raises:
            ConfigError: no such policy, or no namespace.
        """
        super().__init__(offloading_spec, primary_kv_view, tier_type, store=store, options=options, settings=settings)
        self._policy = find_policy(eviction_policy, self.context.policies)
        self._table: BlockTable | None = None
        clock = self.context.clock
        self._uses = TierUses(clock, Retention(clock, self.context.retain_share, self.context.tenant_quotas))
        self._pinned: dict[OffloadKey, list[int]] = {}
        """The slots that `pin` has pinned, one entry per pin. A key may have pins in an old slot and in its new one."""
        self._events: deque[OffloadingEvent] = deque(maxlen=_MAX_EVENTS)
        self._full_until = -math.inf
        self._prepared: Prepared | None = None
        self._most_slots = _MAX_SLOTS
        """Most slots that the I/O process may report: it must not make the engine allocate an index of any size."""

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Return HIT for a block that can be loaded now, else MISS."""
        if self._standing.state is not _UP:
            self.start()
        table = self._table
        if table is None or self._standing.state is not _UP or not table.is_ready(key):
            return _MISS
        return _HIT

    def held(self, keys: Set[OffloadKey]) -> Set[OffloadKey]:
        """Return those of `keys` whose blocks are stored or being stored; none while the tier is not UP."""
        if self._table is None or self._standing.state is not _UP:
            return frozenset()
        return frozenset(self._table.slot_of.held(keys))

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Count a use of the stored ones of `keys`, given in prefix order: at most one per block and request."""
        if self._table is not None:
            self._uses.touch(self._table, keys, req_context)

    def pin(self, keys: Collection[OffloadKey]) -> None:
        """Keep the stored ones of `keys` from eviction, until the tier starts anew at the latest."""
        table = self._table
        if table is None:
            return
        for key in keys:
            if table.is_ready(key):
                slot = table.slot_of[key]
                table.pin((slot,))
                self._pinned.setdefault(key, []).append(slot)

    def unpin(self, keys: Collection[OffloadKey]) -> None:
        for key in keys:
            slots = self._pinned.get(key)
            if slots is None or self._table is None:
                continue
            self._table.unpin((slots.pop(0),))
            if not slots:
                del self._pinned[key]

    def delete(self, keys: Collection[OffloadKey]) -> Answer[Collection[OffloadKey]]:
        """Delete blocks that no job and no `pin` holds. They are misses at once."""
        table = self._table
        if table is None or self._standing.state is not _UP:
            return failed()
        wanted = dict.fromkeys(keys)
        held = [key for key in table.slot_of.held(wanted) if not table.is_pinned(table.slot_of[key])]
        slots = [table.slot_of[key] for key in held]
        absent = table.slot_of.missing(wanted)
        table.pin(slots)  # quarantines them below: nobody stores into a slot that the executor still empties
        self._note(table.remove(held), removed=True)
        return self._delete(held, slots, absent, self._end_delete)

    def _end_delete(self, keys: Sequence[OffloadKey], slots: Sequence[int], success: bool) -> None:
        """Free the slots. If a block may still be there, a later start finds it; in this process it stays a miss."""
        if self._table is not None:
            self._table.unpin(slots)

    def list_keys(self, cursor: bytes, most: int) -> Answer[KeyPage]:
        """Answer from the index at once."""
        if self._table is None or self._standing.state is not _UP:
            return failed()
        try:
            page = page_of(self._table.slot_of, cursor, most)
        except StoreError:
            return failed()
        ready = [key for key in page.keys if self._table.is_ready(key)]
        return settled(page._replace(keys=ready))

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        self._uses.begin(req_context)
        return super().on_new_request(req_context)

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Order the request's blocks by recency, tail first."""
        self._uses.end(self._table, req_context)

    def start_epoch(self, epoch: bytes) -> None:
        """Forget all blocks, with removal events for them."""
        if self._table is not None:
            self._note(list(self._table.ready_keys()), removed=True)
        super().start_epoch(epoch)

    def take_events(self) -> Iterable[OffloadingEvent]:
        """Return the events of stored and removed blocks since the last call; if there are too many, the newest."""
        events = list(self._events)
        self._events.clear()
        return events

    def get_stats(self) -> Mapping[str, float]:
        """Add the prepared share, and used and total capacity in blocks and bytes; 0 before the index is read."""
        blocks, capacity = (0, 0) if self._table is None else (len(self._table), self._table.num_slots)
        prepared = self._prepared
        return {
            **super().get_stats(),
            **({} if prepared is None else {"prepared_share": prepared.done / max(1, prepared.total)}),
            "blocks": blocks,
            "bytes": blocks * self.block_bytes,
            "capacity_blocks": capacity,
            "capacity_bytes": capacity * self.block_bytes,
            "kept_blocks": 0 if self._table is None else num_kept(self._table),
        }

    def check_invariants(self) -> None:
        """Raise InvariantError if the state contradicts itself."""
        super().check_invariants()
        if self._table is not None:
            self._table.check_invariants()

    def _begin_load(self, metadata: JobMetadata) -> MovingJob | None:
        table = self._table
        if table is None:
            self._ledger.refuse(metadata, FailureCause.TIER_DOWN)
            return None
        keys, arena_slots = list(metadata.keys), metadata.block_ids
        slots, absent = table.ready_slots(keys), {}
        if slots is None:
            held = [index for index, key in enumerate(keys) if table.is_ready(key)]
            absent = {FailureCause.ABSENT: len(keys) - len(held)}
            keys, arena_slots = [keys[index] for index in held], arena_slots[held]
            slots = table.slot_of.values_of(keys)
        table.pin(slots)
        self._uses.load(table, keys, metadata.req_context)
        return self._ledger.open(metadata, keys, arena_slots, slots, [], absent)

    def _begin_store(self, metadata: JobMetadata) -> MovingJob | None:
        table = self._table
        if table is None:
            self._ledger.refuse(metadata, FailureCause.TIER_DOWN)
            return None
        moving: list[OffloadKey] = []
        slots: list[int] = []
        here: list[OffloadKey] = []
        num_left_out = 0
        try:
            requests = metadata.by_request() if metadata.shares else ((metadata.req_context, list(metadata.keys)),)
            for context, keys in requests:
                placement = self._plan_store(table, keys, context)
                if len(placement.keys) + placement.num_left_out < len(keys):
                    held = [key for key in keys if table.is_ready(key)]
                    self._uses.touch(table, held, context)
                    here += held
                slots += self._uses.store(table, keys, placement, context)
                moving += placement.keys
                num_left_out += placement.num_left_out
                if placement.victims:
                    self._say_evicted(placement.victims)
        except KeyFormatError:  # keys of another length than those in the index
            table.discard(moving, slots)
            self._ledger.refuse(metadata, FailureCause.CANCELLED)
            return None
        arena_slots: Slots = metadata.block_ids
        if len(moving) < len(arena_slots):
            arena_slot_of = dict(zip(metadata.keys, metadata.block_ids.tolist(), strict=True))
            arena_slots = [arena_slot_of[key] for key in moving]
        left_out = {FailureCause.NO_SPACE: num_left_out} if num_left_out else {}
        return self._ledger.open(metadata, moving, arena_slots, slots, here, left_out)

    def _plan_store(self, table: BlockTable, keys: list[OffloadKey], context: ReqContext) -> Placement:
        placement = self._uses.plan_store(table, keys, context)
        if self.context.clock() < self._full_until:
            self._free_used_slots(table, len(placement.keys), keys)
            placement = self._uses.plan_store(table, keys, context)
        return placement

    def _free_used_slots(self, table: BlockTable, count: int, protected: Collection[OffloadKey]) -> None:
        """Evict `count` blocks, so that the next stores get their slots.

        The filesystem is full before the tier's capacity is reached. So unused slots cannot get space, but used slots
        have theirs. The table gives freed slots away before unused ones.
        """
        victims = table.pick_victims(count, (), (set(protected),))
        if victims:
            table.remove(victims)
            self._say_evicted(victims)

    def _say_evicted(self, keys: Sequence[OffloadKey]) -> None:
        self._note(keys, removed=True)
        self.context.observer.on_event(BlocksEvicted(self.tier_type, keys))

    def _end_load(self, job: MovingJob, result: PartResult) -> None:
        """Unpin the blocks, and remove those that could not be loaded."""
        table = self._table
        if table is None:
            return
        slots, keys = job.slots_and_keys(result)
        if False in result.successes and FailureCause.CANCELLED not in result.failures:
            read = zip(keys, slots, result.successes, strict=True)
            gone = [key for key, slot, success in read if not success and table.slot_of.get(key) == slot]
            self._note(table.remove(gone), removed=True)
        table.unpin(slots)

    def _end_store(self, job: MovingJob, result: PartResult) -> None:
        """Publish the stored blocks, and remove those that could not be stored."""
        table = self._table
        if table is None:
            return
        slots, keys = job.slots_and_keys(result)
        if False not in result.successes:
            table.publish(slots)
            self._note(keys, removed=False)
            return
        table.publish(list(compress(slots, result.successes)))
        self._note(list(compress(keys, result.successes)), removed=False)
        failed = [not success for success in result.successes]
        table.discard(list(compress(keys, failed)), list(compress(slots, failed)))
        if FailureCause.NO_SPACE in result.failures:
            self._full_until = self.context.clock() + _FULL_SECONDS

    def _handle(self, report: Report) -> None:
        table = self._table
        if isinstance(report, Ready):
            if not 0 < report.num_slots <= self._most_slots:
                raise ProtocolError(f"a store of {report.num_slots} slots: 1 to {self._most_slots} allowed")
            policy = self._policy(report.num_slots)
            self._table = BlockTable(report.num_slots, policy)
        elif isinstance(report, IndexBatch) and table is not None:
            try:
                table.adopt(report.slots, report.keys)
            except KeyFormatError as error:
                raise ProtocolError(f"recovered keys: {error}") from error
        elif isinstance(report, IndexEnd) and table is not None:
            table.end_adoption()
        elif isinstance(report, Prepared):
            self._prepared = report
        else:
            raise ProtocolError(f"{type(report).__name__} from a store of slots")

    def _forget(self) -> None:
        self._table = None
        self._pinned.clear()
        self._uses.clear()

    def _note(self, keys: Sequence[OffloadKey], removed: bool) -> None:
        if keys and self.medium is not None:
            self._events.append(OffloadingEvent(list(keys), self.medium, removed, self.locality))
