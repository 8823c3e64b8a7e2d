"""Replays a recording call by call: tiers give the recorded answers at the recorded times.

The primary tier, its policy and every decision of the manager are made anew. The recording only fixes the answers of
secondary tiers: which blocks they had, when their jobs ended and which blocks of a job succeeded. So the replay has the
same hits as the engine had.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvtier.errors import BlockNotReadyError, KVTierError, TraceError
from kvtier.events import BlocksLoaded, Event, Observers
from kvtier.hints import HINT_KEY
from kvtier.keys import OffloadKey
from kvtier.primary.manager import CPUPrimaryTierOffloadingManager
from kvtier.recording.format import JOB, LATE, NOT_SURE, ROOM, TAKEN, TIER, Header, NewRequest, Record
from kvtier.recording.reader import read_recording
from kvtier.registry import POLICIES
from kvtier.simulator.devices import SimulatedClock
from kvtier.simulator.live_run import LiveRun
from kvtier.simulator.recorded_tiers import RecordedTierManager, RepeatedManager, Rooms
from kvtier.simulator.trace_files import check_regular
from kvtier.tiering.settings import TieringSettings
from kvtier.types import (
    Admission,
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
