"""Replays a recording call by call: tiers give the recorded answers at the recorded times.

The primary tier, its policy and every decision of the manager are made anew. The recording only fixes the answers of
secondary tiers: which blocks they had, when their jobs ended and which blocks of a job succeeded. So the replay has the
same hits as the engine had.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtier.abc import SecondaryTierManager
from kvtier.errors import BlockNotReadyError, KVTierError, TraceError
from kvtier.events import BlocksLoaded, Event, Observers, TierState
from kvtier.hints import HINT_KEY
from kvtier.keys import OffloadKey
from kvtier.primary.manager import CPUPrimaryTierOffloadingManager
from kvtier.recording.format import JOB, LATE, NOT_SURE, ROOM, TAKEN, TIER, Header, NewRequest, Record
from kvtier.recording.reader import read_recording
from kvtier.registry import POLICIES
from kvtier.simulator.devices import SimulatedClock
from kvtier.simulator.live_run import LiveRun
from kvtier.simulator.trace_files import check_regular
from kvtier.tiering.cascades import Cascades
from kvtier.tiering.guarded_tier import TierGuard
from kvtier.tiering.manager import TieringOffloadingManager
from kvtier.tiering.settings import TieringSettings
from kvtier.types import (
    Admission,
    JobMetadata,
    JobResult,
    Locality,
    LookupResult,
    Medium,
    ReqContext,
    ScheduleEndContext,
)


@dataclass
class Repeated:
    """The result of a replayed recording.

    Attributes:
        loads: per load, in order: the request, and its number of blocks by source tier.
        num_records: replayed calls and answers.
        num_diverged: calls that failed since a block was not ready in the replayed manager.
    """

    loads: list[tuple[str, dict[str, int]]] = field(default_factory=list)
    num_records: int = 0
    num_diverged: int = 0

    @property
    def hits(self) -> dict[str, int]:
        """Number of loaded blocks, by source tier."""
        total: Counter[str] = Counter()
        for _, by_source in self.loads:
            total.update(by_source)
        return dict(total)


class RecordedTierManager(SecondaryTierManager):
    """A tier that gives the answers of a recorded tier.

    The repeater sets the attributes before each call of the manager.

    Attributes:
        used: whether the recorded engine used the tier.
        has: keys of the next scan for which the tier answers HIT.
        unsure: keys of the next scan for which the tier answers RETRY.
    """

    medium = Medium.STORAGE
    locality = Locality.LOCAL
    verifies_payloads = True

    def __init__(self, name: str, view: memoryview, joins_stores: bool = False) -> None:
        """Args:
        view: only its shape counts; no byte of it is read.
        joins_stores: as the recorded tier did: jobs are known by their numbers.
        """
        super().__init__(None, view, name)
        self.joins_stores = joins_stores  # type: ignore[misc]
        self.used = False
        self.has: set[OffloadKey] = set()
        self.unsure: set[OffloadKey] = set()
        self._jobs: set[int] = set()
        self._ended: list[JobResult] = []

    @property
    def state(self) -> TierState:
        """UP while the recorded engine used the tier, else DOWN."""
        return TierState.UP if self.used else TierState.DOWN

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        if key in self.has:
            return LookupResult.HIT
        return LookupResult.RETRY if key in self.unsure else LookupResult.MISS

    def can_store(self, num_blocks: int) -> bool:
        return True

    def submit_store(self, job_metadata: JobMetadata) -> None:
        """Remember the job; `end` ends it when the recording does."""
        self._jobs.add(job_metadata.job_id)

    def submit_load(self, job_metadata: JobMetadata) -> None:
        """Remember the job; `end` ends it when the recording does."""
        self._jobs.add(job_metadata.job_id)

    def end(self, job_id: int, successful: Sequence[OffloadKey] | None) -> None:
        """Report a job at the next poll with the keys that succeeded; None: all succeeded."""
        self._ended.append(JobResult(job_id, successful is None, successful, 0.0, 0))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Return the results that the recording has given so far; jobs that the replay did not submit are dropped."""
        ended, self._ended = self._ended, []
        known = [result for result in ended if result.job_id in self._jobs]
        self._jobs.difference_update(result.job_id for result in known)
        return known

    def drain_jobs(self) -> None:
        """Do nothing: the recording ends the jobs."""


@dataclass
class Rooms:
    """How many blocks tiers take in the next call, as recorded.

    Attributes:
        taken: per tier that does not take all blocks of a store: how many, for each store of the call.
        late: per tier that is offered late blocks: for how many there is room, and how many times to look.
        wanted: how many blocks of a store the tiers would take; None if the engine did not ask.
    """

    taken: dict[int, list[int]] = field(default_factory=dict)
    late: dict[int, tuple[int, int]] = field(default_factory=dict)
    wanted: int | None = None

    def clear(self) -> None:
        """Forget what was recorded for a call that was made."""
        self.taken.clear()
        self.late.clear()
        self.wanted = None


class RepeatedCascades(Cascades):
    """Gives tiers as many blocks as the recorded engine did."""

    def __init__(self, rooms: Rooms, *parts: Any) -> None:
        super().__init__(*parts)
        self._rooms = rooms

    def _num_taken(self, guard: TierGuard, count: int) -> int:
        recorded = self._rooms.taken.get(guard.index)
        return min(count, recorded.pop(0)) if recorded else count

    def _offer_late(self, guard: TierGuard) -> tuple[int, int]:
        self._looks_left = self._rooms.late.get(guard.index, (0, 0))[1]
        return super()._offer_late(guard)

    def _late_room(self, guard: TierGuard) -> int:
        return self._rooms.late.get(guard.index, (0, 0))[0]

    def _takes_late(self, guard: TierGuard, count: int) -> bool:
        self._looks_left -= 1
        return self._looks_left >= 0

    def room(self) -> int:
        return super().room() if self._rooms.wanted is None else self._rooms.wanted


class RepeatedManager(TieringOffloadingManager):
    """A manager whose tiers take as many blocks as the recorded ones did."""

    def __init__(self, rooms: Rooms, *args: Any, **keywords: Any) -> None:
        self._rooms = rooms
        super().__init__(*args, **keywords)

    def _make_cascades(self, *parts: Any) -> Cascades:
        return RepeatedCascades(self._rooms, *parts)


class Repeater:
    """Makes the recorded calls to a manager.

    Attributes:
        header: of the recording.
        watcher: as in `__init__`.
        found: what was loaded so far.
    """

    def __init__(self, header: Header, watcher: LiveRun | None = None) -> None:
        """Make the manager.

        Args:
            watcher: learns of every record before it is repeated, and of every event.

        Raises:
            ConfigError: the recorded policy is not registered.
        """
        self.found = Repeated()
        self.header = header
        self._block_bytes = header.block_bytes
        self._clock = SimulatedClock()
        self.watcher = watcher
        observers = Observers([self] if watcher is None else [self, watcher])
        view = memoryview(bytearray(header.primary_blocks)).cast("B", (header.primary_blocks, 1))
        self._tiers = [RecordedTierManager(tier.name, view, tier.joins_stores) for tier in header.tiers]
        policy = POLICIES.load(header.policy)(header.primary_blocks)
        primary = CPUPrimaryTierOffloadingManager(header.primary_blocks, view, policy)
        primary.block_bytes = header.block_bytes  # the view has 1 byte per block, since no byte is read
        self._rooms = Rooms()
        self._manager = RepeatedManager(
            self._rooms,
            primary,
            self._tiers,
            names=[tier.name for tier in header.tiers],
            admissions=[Admission(tier.admission) for tier in header.tiers],
            probe_deadlines=[None if header.probe_deadline else tier.probe_deadline for tier in header.tiers],
            settings=TieringSettings(
                load_deadline=header.load_deadline,
                probe_deadline=header.probe_deadline,
                lease_timeout=header.lease_timeout,
                promotion_budget=header.promotion_budget,
                prefill_rate=header.prefill_rate,
                retain_share=header.retain_share,
                tenant_quotas=header.tenant_quotas,
                tokens_per_block=header.tokens_per_block,
            ),
            clock=self._clock,
            observer=observers,
        )
        self._contexts: dict[int, ReqContext] = {}
        self._scans: dict[int, list[OffloadKey]] = {}

    def stats(self) -> dict[str, float]:
        """Return the manager's `get_stats`, with the bytes of blocks that only the recorded engine has moved."""
        found, block_bytes = dict(self._manager.get_stats()), self._block_bytes
        for name in [name for name in found if name.startswith(("promoted_blocks.", "cascaded_blocks."))]:
            found[name.replace("_blocks", "_bytes", 1)] = found[name] * block_bytes
        return found

    def on_event(self, event: Event) -> None:
        """Note the sources of every load."""
        if isinstance(event, BlocksLoaded):
            self.found.loads.append((event.req_id, dict(event.by_source)))

    def take(self, record: Record) -> None:
        """Replay one record: set a tier's answer, or call the manager."""
        self.found.num_records += 1
        self._clock.advance_to(record.time)
        if self.watcher is not None:
            self.watcher.on_record(record)
        if record.kind in b"JUBAW":
            self._stage(record)
            return
        try:
            self._call(record)
        except BlockNotReadyError:
            self.found.num_diverged += 1
        if record.kind not in b"LRN":
            self._rooms.clear()

    def _stage(self, record: Record) -> None:
        """Set what a tier will answer in the next call."""
        if record.kind == b"J":
            index, job_id, complete = JOB.unpack(record.extra)
            self._tiers[index].end(job_id, None if complete else record.keys)
        elif record.kind == b"U":
            index, used = TIER.unpack(record.extra)
            self._tiers[index].used = used
        elif record.kind == b"A":
            index, room, num_looks = LATE.unpack(record.extra)
            self._rooms.late[index] = room, num_looks
        elif record.kind == b"W":
            (self._rooms.wanted,) = ROOM.unpack(record.extra)
        else:
            index, taken = TAKEN.unpack(record.extra) if len(record.extra) > 1 else (record.extra[0], 0)
            self._rooms.taken.setdefault(index, []).append(taken)

    def _call(self, record: Record) -> None:
        manager, kind, keys = self._manager, record.kind, record.keys
        if kind == b"Z":
            preempted = struct.unpack(f"<{len(record.extra) // 4}I", record.extra)
            manager.on_schedule_end(ScheduleEndContext(preempted_req_ids=[str(number) for number in preempted]))
            return
        if kind == b"X":
            manager.reset_cache(late_completions=not record.extra)
            return
        if kind == b"N":
            new = NewRequest.of(record.extra)
            params = None if new.hint is None else {HINT_KEY: new.hint}
            context = ReqContext(str(record.request), params, num_prompt_tokens=new.num_prompt_tokens)
            self._contexts[record.request] = context
            manager.on_new_request(context)
            return
        context = self._contexts.setdefault(record.request, ReqContext(str(record.request)))
        if kind in b"LR":
            self._scans[record.request] = keys = keys or self._scans.get(record.request, [])
            self._scan(keys, context, record.extra)
        elif kind == b"P":
            manager.prepare_load(keys, context)
        elif kind == b"C":
            manager.complete_load(keys, context)
        elif kind == b"T":
            manager.touch(keys, context)
        elif kind == b"S":
            manager.prepare_store(keys, context)
        elif kind in b"DF":
            manager.complete_store(keys, context, kind == b"D")
        elif kind == b"E":
            self._scans.pop(record.request, None)
            manager.on_request_finished(context)

    def _scan(self, keys: Sequence[OffloadKey], context: ReqContext, answers: bytes) -> None:
        for index, tier in enumerate(self._tiers):
            tier.has = {key for key, answer in zip(keys, answers, strict=False) if answer == index}
            tier.unsure = {key for key, answer in zip(keys, answers, strict=False) if answer == NOT_SURE + index}
        for key in keys:
            self._manager.lookup(key, context)


def repeat(path: Path) -> Repeated:
    """Replay a recording call by call; return its loads. Raises as `steps`."""
    found = Repeated()
    for _, repeater in steps(path):
        found = repeater.found
    return found


def watch(path: Path) -> tuple[Header, Repeated, LiveRun]:
    """Replay a recording call by call; return its header, its loads, and what happened over time.

    Raises:
        TraceError: as `steps`, or there is no record.
        ConfigError: as `steps`.
    """
    last: Repeater | None = None
    for _, last in steps(path, LiveRun):  # noqa: B007 - the last one is what counts
        pass
    if last is None or last.watcher is None:
        raise TraceError(f"{path}: a recording without requests")
    last.watcher.close()
    return last.header, last.found, last.watcher


def steps(path: Path, make_watcher: Callable[[int], LiveRun] | None = None) -> Iterator[tuple[float, Repeater]]:
    """Replay a recording; yield the time, in seconds, and the repeater after each call or answer.

    Args:
        make_watcher: makes the repeater's watcher of the tokens per block.

    Raises:
        TraceError: the file is no recording, or is damaged.
        ConfigError: the recorded policy is not registered.
    """
    check_regular(path)
    header, records = read_recording(path)
    try:
        repeater = Repeater(header, None if make_watcher is None else make_watcher(header.tokens_per_block))
        for record in records:
            repeater.take(record)
            yield record.time, repeater
    except KVTierError:
        raise
    except (struct.error, IndexError, ValueError, MemoryError) as error:
        raise TraceError(f"{path}: a damaged recording ({error})") from None
