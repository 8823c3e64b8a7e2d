"""Records what an engine asks of its manager, so that the simulator can replay it.

On the scheduler's thread a call costs one copy of its keys into a buffer, a lookup nothing; a process of its own hashes
and writes (`stream`, `writer`). A recording that cannot go on ends, and the engine never notices.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from typing import Any

from kvtier.events import CascadeRefused, Event
from kvtier.keys import OffloadKey
from kvtier.recording.format import JOB, NOT_FOUND, NOT_SURE, PROMPT, TIER
from kvtier.recording.stream import Recorder
from kvtier.tiering.guarded_tier import Job, TierGuard
from kvtier.tiering.manager import TieringOffloadingManager
from kvtier.tiering.turns import in_turn
from kvtier.types import (
    CPULoadStoreSpec,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)

_MOST_REQUESTS = 100_000


class RecordedManager(TieringOffloadingManager):
    """The manager, with its calls, its tiers' answers and nothing else written down.

    A record follows what it stands for, but for a tier's answers, refusals and states, which come before the call that
    learnt of them.
    """

    def __init__(self, *args: Any, recorder: Recorder, **keywords: Any) -> None:
        """Args: as `TieringOffloadingManager`; recorder: started with the first call, closed at `shutdown`."""
        super().__init__(*args, **keywords)
        self._recorder = recorder
        self._numbers: dict[str, int] = {}
        self._num_requests = 0
        self._noted_scan: tuple[int, int] | None = None
        self._last_scans: dict[int, tuple[int, OffloadKey, OffloadKey]] = {}
        self._usable = [False] * len(self._tiers)
        self._observer.add(self)
        recorder.start()

    def on_event(self, event: Event) -> None:
        """Note that a tier took no cascade."""
        if isinstance(event, CascadeRefused) and event.reason != "admission":
            self._note_scan()
            index = next(guard.index for guard in self._tiers if guard.name == event.tier)
            self._recorder.note(b"B", 0, bytes([index]))

    def _number(self, req_context: ReqContext) -> int:
        number = self._numbers.get(req_context.req_id)
        if number is None:
            self._num_requests += 1
            number = self._numbers[req_context.req_id] = self._num_requests
            prompt = req_context.num_prompt_tokens
            self._recorder.note(b"N", number, PROMPT.pack(-1 if prompt is None else prompt))
            if len(self._numbers) > _MOST_REQUESTS:
                del self._numbers[next(iter(self._numbers))]
        return number

    def _note(self, kind: bytes, req_context: ReqContext, keys: Collection[OffloadKey] = ()) -> None:
        if self._recorder.active:
            self._note_scan()
            self._recorder.note(kind, self._number(req_context), keys=keys)

    def _note_scan(self) -> None:
        """Note what has been looked up since the last record, in short if it is what the request looked up before."""
        if self._noted_scan is None:
            return
        number, start = self._noted_scan
        scan = self._state.scan.keys
        keys = scan[start:]
        if not keys:
            return
        self._noted_scan = (number, len(scan))
        shape, answers = (len(keys), keys[0], keys[-1]), self._answers(keys)
        if self._last_scans.get(number) == shape:
            self._recorder.note(b"R", number, answers)
        else:
            self._last_scans[number] = shape
            self._recorder.note(b"L", number, answers, keys)

    def _answers(self, keys: list[OffloadKey]) -> bytes:
        """Return what tiers answered for the keys of a scan, a byte each; nothing if no tier had any."""
        found, unresolved = self._state.scan.found, self._state.scan.unresolved
        if not found and not unresolved:
            return b""
        asked = NOT_SURE + min(self._state.wait.probing, default=0)
        return bytes([asked if key in unresolved else found.get(key, NOT_FOUND) for key in keys])

    # -- calls --------------------------------------------------------------------------------------------

    @in_turn
    def _enter(self, req_context: ReqContext) -> None:
        if self._recorder.active:
            self._note_scan()
        super()._enter(req_context)
        if self._recorder.active:
            self._noted_scan = (self._number(req_context), len(self._state.scan.keys))

    @in_turn
    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """As the manager's."""
        answer = super().on_new_request(req_context)
        if self._recorder.active:
            self._note_scan()
            self._numbers.pop(req_context.req_id, None)
            self._number(req_context)
        return answer

    @in_turn
    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> CPULoadStoreSpec:
        """As the manager's."""
        spec = super().prepare_load(keys, req_context)
        self._note(b"P", req_context, keys)
        return spec

    @in_turn
    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """As the manager's."""
        super().complete_load(keys, req_context)
        self._note(b"C", req_context, keys)

    @in_turn
    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """As the manager's."""
        super().touch(keys, req_context)
        self._note(b"T", req_context, keys)

    @in_turn
    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput | None:
        """As the manager's."""
        output = super().prepare_store(keys, req_context)
        self._note(b"S", req_context, keys)
        return output

    @in_turn
    def complete_store(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        """As the manager's."""
        super().complete_store(keys, req_context, success)
        self._note(b"D" if success else b"F", req_context, keys)

    @in_turn
    def on_request_finished(self, req_context: ReqContext) -> None:
        """As the manager's."""
        if self._recorder.active:
            self._note_scan()
            self._noted_scan = None  # the manager forgets the scan
        super().on_request_finished(req_context)
        if self._recorder.active:
            number = self._number(req_context)
            self._last_scans.pop(number, None)
            self._recorder.note(b"E", number)

    @in_turn
    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """As the manager's."""
        if self._recorder.active:
            self._note_scan()
            self._noted_scan = None
        super().on_schedule_end(context)
        if self._recorder.active:
            numbers = [self._numbers.get(req_id, 0) for req_id in context.preempted_req_ids]
            self._recorder.note(b"Z", 0, struct.pack(f"<{len(numbers)}I", *numbers))
            self._recorder.flush()

    @in_turn
    def reset_cache(self) -> None:
        """As the manager's."""
        self._noted_scan = None
        super().reset_cache()
        self._recorder.note(b"X", 0)

    @in_turn
    def shutdown(self) -> None:
        """As the manager's; the recording ends, too."""
        self._recorder.close()
        super().shutdown()

    # -- what tiers say -----------------------------------------------------------------------------------

    def _poll(self) -> None:
        super()._poll()
        for guard in self._tiers:
            if guard.usable != self._usable[guard.index]:
                self._usable[guard.index] = guard.usable
                self._recorder.note(b"U", 0, TIER.pack(guard.index, guard.usable))

    def _take(self, guard: TierGuard, job: Job) -> None:
        complete = len(job.successful) == len(job.keys)
        successful = () if complete else list(job.successful)
        self._recorder.note(b"J", 0, JOB.pack(guard.index, job.job_id, complete), successful)
        super()._take(guard, job)
