"""A secondary tier over any `BlockStore`. It asks the store in batches whether keys exist, and caches the answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import compress
from typing import Any, ClassVar

from msgspec import structs

from kvtier.abc import BlockStore, SlotStore
from kvtier.errors import KeyFormatError, ProtocolError
from kvtier.events import TierState
from kvtier.executors.base import Report
from kvtier.executors.protocol import (
    MAX_CURSOR_BYTES,
    ChoreDone,
    IndexEnd,
    Keep,
    ListKeys,
    PartResult,
    ProbeAnswer,
    Ready,
    Usage,
)
from kvtier.keys import OffloadKey, common_key_bytes
from kvtier.options import StoreOptions
from kvtier.secondary.chores import KEYS_PER_CHORE, failed
from kvtier.secondary.jobs import MovingJob
from kvtier.secondary.probes import Probes
from kvtier.secondary.settings import TierSettings
from kvtier.secondary.store_tier import StoreTierManager
from kvtier.types import (
    MOST_LISTED,
    Answer,
    FailureCause,
    JobMetadata,
    KeyPage,
    LookupResult,
    ReqContext,
    ScheduleEndContext,
)

_MISS, _RETRY = LookupResult.MISS, LookupResult.RETRY
_UP = TierState.UP
_UNREADABLE = frozenset({FailureCause.CORRUPT, FailureCause.FOREIGN, FailureCause.OLD_FORMAT})
"""Causes after which a block stays a miss for long: a store that could not delete the block still says that it
exists."""
_SAVINGS = ("compressed_blocks", "unwritten_bytes", "unread_bytes")
PIN_SECONDS = 60.0
"""How long a pinned block is kept. Whoever pins it loads it soon, or crashes; an `unpin` needs no message."""
_LOOK_SECONDS = 0.0002
"""Least time between two polls in `lookup`: a long prefix of unknown keys is thousands of lookups."""


class KeyedTierManager(StoreTierManager):
    """Blocks by key in a `BlockStore`. kvtier seals them unless the store does it itself (`seals_itself`)."""

    verifies_payloads = True
    deletes = True
    keeps: ClassVar[bool] = False
    """Whether the store's `keep` does anything."""

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        *,
        store: str | type[SlotStore] | type[BlockStore],
        options: Mapping[str, Any],
        settings: TierSettings | None = None,
    ) -> None:
        """Args: as `StoreTierManager`; store: a BlockStore."""
        super().__init__(offloading_spec, primary_kv_view, tier_type, store=store, options=options, settings=settings)
        self._look_at = 0.0
        self._usage: Usage | None = None
        self._savings: Counter[str] = Counter()
        """What compression has saved in earlier lives of the executor, by the names of metrics."""
        self._probes = Probes(self.context.clock, self._send_probe)

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Return HIT or MISS if known, RETRY while the store is asked, MISS while the tier is not UP."""
        if self._standing.state is not _UP:
            self.start()
            if self._standing.state is not _UP:
                return _MISS
        answer = self._probes.lookup(key)
        if answer is _RETRY and (now := self.context.clock()) >= self._look_at:
            self._look_at = now + _LOOK_SECONDS
            self._pump()
            if self._standing.state is not _UP:
                return _MISS
            answer = self._probes.lookup(key)
        return answer

    def delete(self, keys: Collection[OffloadKey]) -> Answer[Collection[OffloadKey]]:
        """Delete blocks from the store, except those that a job is moving."""
        if self._standing.state is not _UP:
            return failed()
        moving = self._ledger.moving_keys()
        wanted = [key for key in dict.fromkeys(keys) if key not in moving]
        if not _are_keys(wanted):
            return failed()
        return self._delete(wanted, None, (), self._end_delete)

    def _end_delete(self, keys: Sequence[OffloadKey], slots: Sequence[int], success: bool) -> None:
        if success:
            self._probes.set_absent(keys)

    def pin(self, keys: Collection[OffloadKey]) -> Answer[Collection[OffloadKey]] | None:
        """Ask the store to evict blocks last, for `PIN_SECONDS`, and to say which it still has."""
        if not self.keeps or not keys or self._standing.state is not _UP:
            return None
        return self._ask(keys, PIN_SECONDS)

    def ask_held(self, keys: Collection[OffloadKey]) -> Answer[Collection[OffloadKey]]:
        """Ask the store which blocks it has."""
        return self._ask(keys, 0.0)

    def _ask(self, keys: Collection[OffloadKey], seconds: float) -> Answer[Collection[OffloadKey]]:
        """Ask the store which blocks it has, and to evict them last for some seconds, if these are not 0."""
        executor, wanted = self._supervisor.executor, list(dict.fromkeys(keys))
        if executor is None or self._standing.state is not _UP or not _are_keys(wanted):
            return failed()
        answer: Answer[Collection[OffloadKey]] = Answer()
        batches = [wanted[start : start + KEYS_PER_CHORE] for start in range(0, len(wanted), KEYS_PER_CHORE)]
        kept: set[OffloadKey] = set()
        left = len(batches)

        def end(report: ChoreDone, batch: Sequence[OffloadKey]) -> None:
            nonlocal left
            left -= 1
            if not report.failed:
                found = set(map(OffloadKey, report.keys))
                if seconds:
                    self._probes.set_absent([key for key in batch if key not in found])
                kept.update(found)
            if not left:
                answer.settle(frozenset(kept))

        for batch in batches:
            chore_id = self._chores.begin(answer, partial(end, batch=batch))
            executor.do(Keep.of(chore_id, batch, seconds))
        return answer

    def list_keys(self, cursor: bytes, most: int) -> Answer[KeyPage]:
        """Ask the store for a page of its keys."""
        executor, answer = self._supervisor.executor, Answer[KeyPage]()
        if executor is None or self._standing.state is not _UP:
            return failed()
        if len(cursor) > MAX_CURSOR_BYTES or not 1 <= most <= MOST_LISTED:
            return failed()

        def end(report: ChoreDone) -> None:
            answer.settle(KeyPage([OffloadKey(key) for key in report.keys], report.cursor))

        executor.do(ListKeys(self._chores.begin(answer, end), cursor, most))
        return answer

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Send waiting probes, and give up those that are unanswered for too long."""
        if self._standing.state is _UP:
            self._probes.flush()
        super().on_schedule_end(context)
        if self._probes.expire(self.settings.deadlines.job):
            self._supervisor.question_expired()

    def get_stats(self) -> Mapping[str, float]:
        """Add the store's usage, as far as the store reports it."""
        usage = self._usage
        stats = dict(super().get_stats())
        if usage is not None:
            told = {"blocks": usage.blocks, "bytes": usage.bytes, "capacity_bytes": usage.capacity_bytes}
            stats |= {name: value for name, value in told.items() if value is not None}
        return stats | self._all_savings()

    def check_invariants(self) -> None:
        """Raise InvariantError if the state contradicts itself."""
        super().check_invariants()
        self._probes.check_invariants()

    def _is_sound(self, metadata: JobMetadata) -> bool:
        """Check also that the keys have one length, since no index checks them here."""
        return super()._is_sound(metadata) and _are_keys(metadata.keys)

    def _begin_store(self, metadata: JobMetadata) -> MovingJob | None:
        is_present = self._probes.is_present
        slot_of: dict[OffloadKey, int] = {}
        for key, slot in zip(metadata.keys, metadata.block_ids.tolist(), strict=True):
            slot_of.setdefault(key, slot)
        here = [key for key in slot_of if is_present(key)]
        missing = [key for key in slot_of if not is_present(key)] if here else list(slot_of)
        return self._ledger.open(metadata, missing, [slot_of[key] for key in missing], None, here, {})

    def _begin_load(self, metadata: JobMetadata) -> MovingJob | None:
        return self._ledger.open(metadata, list(metadata.keys), metadata.block_ids, None, [], {})

    def _end_store(self, job: MovingJob, result: PartResult) -> None:
        self._probes.set_present(list(compress(job.moving[result.span], result.successes)))

    def _end_load(self, job: MovingJob, result: PartResult) -> None:
        self._end_store(job, result)
        if False in result.successes and FailureCause.CANCELLED not in result.failures:
            never = not _UNREADABLE.isdisjoint(result.failures)
            read = zip(job.moving[result.span], result.successes, strict=True)
            self._probes.set_absent([key for key, success in read if not success], for_long=never)

    def _handle(self, report: Report) -> None:
        if isinstance(report, ProbeAnswer):
            self._probes.answer(report.probe_id, report.found)
            self._supervisor.job_ended(served=False, broken=report.failed)
        elif isinstance(report, Usage):
            self._usage = _newest(self._usage, report)
        elif isinstance(report, Ready):
            if report.num_slots:
                raise ProtocolError("a store of slots")
        elif not isinstance(report, IndexEnd):
            raise ProtocolError(f"{type(report).__name__} from a store without slots")

    def _forget(self) -> None:
        self._probes.clear()
        self._savings, self._usage = self._all_savings(), None

    def _all_savings(self) -> Counter[str]:
        return self._savings + Counter(_savings_of(self._usage))

    def _send_probe(self, probe_id: int, keys: Sequence[OffloadKey]) -> None:
        executor = self._supervisor.executor
        if executor is not None and self._standing.state is _UP:
            executor.probe(probe_id, keys)


def _savings_of(usage: Usage | None) -> dict[str, int]:
    """Return what a store has saved by compression, by the names of metrics."""
    return {} if usage is None else {name: getattr(usage, name) for name in _SAVINGS}


def _newest(former: Usage | None, report: Usage) -> Usage:
    """Return the report. What is saved only rises, although reports of two threads may overtake each other."""
    known = _savings_of(former)
    return structs.replace(report, **{name: max(value, getattr(report, name)) for name, value in known.items()})


class DeclaredTierManager(KeyedTierManager):
    """A keyed tier of kvtier's own. Its class says which store it has; a struct declares the options of both."""

    store: ClassVar[str]
    """The store, as "module:Class"."""
    options_type: ClassVar[type[StoreOptions]]

    def __init__(self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, **options: Any) -> None:
        """Args: options: of `options_type`.

        Raises:
            ConfigError: a value is not allowed; the error names its key.
        """
        read = self.options_type.read(options)
        settings = TierSettings.checked(read.threads, read.job_deadline)
        super().__init__(
            offloading_spec,
            primary_kv_view,
            tier_type,
            store=self.store,
            options=read.for_store().to_json(),
            settings=replace(settings, environment_secrets=read.environment_secrets),
        )
        read.check(self.block_bytes, self.context.policies)


def _are_keys(keys: Sequence[OffloadKey]) -> bool:
    """Return whether a message can name all of `keys`."""
    try:
        return not keys or common_key_bytes(keys, None) > 0
    except KeyFormatError:
        return False
