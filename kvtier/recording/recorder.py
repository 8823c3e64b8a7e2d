"""Records an engine's calls to its manager, so that the simulator can replay them.

On the scheduler's thread, a call only copies its keys into a buffer, and a lookup does nothing: the manager keeps a
step's lookups anyway. Another process hashes and writes the records (`stream`, `writer`). If a recording cannot
continue, it ends; the engine is not affected.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Collection, Sequence
from typing import Any

import msgspec

from kvtier.hints import NO_HINT, read_hint
from kvtier.keys import OffloadKey
from kvtier.recording.format import HASH_BYTES, JOB, LATE, NONE_LATE, NOT_FOUND, NOT_SURE, PROMPT, ROOM, TAKEN, TIER
from kvtier.recording.stream import Recorder
from kvtier.secondary.jobs import Job
from kvtier.tiering.cascades import Cascades
from kvtier.tiering.guarded_tier import TierGuard
from kvtier.tiering.manager import TieringOffloadingManager
from kvtier.tiering.requests import RequestState
from kvtier.tiering.turns import in_turn
from kvtier.tiering.watchers import Watcher, Watchers
from kvtier.types import (
    CPULoadStoreSpec,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)

MAX_NUMBERED_REQUESTS = 100_000
"""Most requests whose numbers are remembered. A number outlives its request, since completions may come later."""


class CallLog:
    """Makes the records.

    `RecordedManager` tells it of calls. It watches the manager for scans (a request's lookups) and for tiers' answers.
    Lookups are recorded just before the next other record.
    """

    def __init__(self, recorder: Recorder, tiers: Sequence[str]) -> None:
        """Args: recorder: records nothing until it is started; tiers: names of the secondary tiers, in order."""
        self._recorder = recorder
        self._tiers = tuple(tiers)
        self._usable = [False] * len(self._tiers)
        self._salt = secrets.token_bytes(32)
        self._numbers: dict[str, int] = {}
        self._num_requests = 0
        self._scanning: RequestState | None = None
        self._scanning_number = self._num_noted = 0
        """The number of the scanning request, and how many keys of its scan are recorded."""
        self._last_scans: dict[int, tuple[int, OffloadKey, OffloadKey]] = {}

    # -- calls --------------------------------------------------------------------------------------------

    def note_call(self, kind: bytes, req_context: ReqContext, keys: Collection[OffloadKey] = ()) -> None:
        """Record a call for one request."""
        if self._recorder.active:
            self.note_scan()
            self._recorder.note(kind, self._number(req_context), keys=keys)

    def note_new_request(self, req_context: ReqContext) -> None:
        """Record a new request, which gets a number."""
        if self._recorder.active:
            self.note_scan()
            self._numbers.pop(req_context.req_id, None)
            self._number(req_context)

    def note_finished_request(self, req_context: ReqContext) -> None:
        """Record the end of a request, and forget its lookups."""
        if self._recorder.active:
            number = self._number(req_context)
            self._last_scans.pop(number, None)
            self._recorder.note(b"E", number)

    def note_step(self, context: ScheduleEndContext) -> None:
        """Record the end of a step."""
        if self._recorder.active:
            numbers = [self._numbers.get(req_id, 0) for req_id in context.preempted_req_ids]
            self._recorder.note(b"Z", 0, struct.pack(f"<{len(numbers)}I", *numbers))
            self._recorder.flush()

    def note_reset(self, late_completions: bool) -> None:
        """Record a reset."""
        self._recorder.note(b"X", 0, b"" if late_completions else NONE_LATE)

    def _number(self, req_context: ReqContext) -> int:
        number = self._numbers.get(req_context.req_id)
        if number is None:
            self._num_requests += 1
            number = self._numbers[req_context.req_id] = self._num_requests
            prompt = req_context.num_prompt_tokens
            extra = PROMPT.pack(-1 if prompt is None else prompt) + self._hint_of(req_context)
            self._recorder.note(b"N", number, extra)
            if len(self._numbers) > MAX_NUMBERED_REQUESTS:
                self._last_scans.pop(self._numbers.pop(next(iter(self._numbers))), None)
        return number

    def _hint_of(self, req_context: ReqContext) -> bytes:
        """Return a request's hint in JSON, with hashed names of session and tenant; empty if it has none."""
        hint = read_hint(req_context.kv_transfer_params).hint
        if hint is NO_HINT:
            return b""
        names = {"session": self._alias(hint.session), "tenant": self._alias(hint.tenant)}
        return msgspec.json.encode(msgspec.structs.replace(hint, **names))

    def _alias(self, name: str | None) -> str | None:
        if name is None:
            return None
        return hashlib.blake2b(name.encode(errors="replace"), digest_size=HASH_BYTES, key=self._salt).hexdigest()

    # -- scans --------------------------------------------------------------------------------------------

    def on_scan(self, state: RequestState) -> None:
        """Learn that a request begins lookups; they will be recorded before the next other record."""
        if self._recorder.active:
            self.note_scan()
            self._scanning, self._num_noted = state, len(state.scan.keys)
            self._scanning_number = self._number(state.context)

    def end_scan(self) -> None:
        """Record the lookups so far, since the manager is about to forget them."""
        if self._recorder.active:
            self.note_scan()
        self._scanning = None

    def note_scan(self) -> None:
        """Record the lookups since the last record: without keys if the request looked up the same ones before."""
        state = self._scanning
        if state is None:
            return
        keys = state.scan.keys[self._num_noted :]
        if not keys:
            return
        self._num_noted += len(keys)
        number, shape = self._scanning_number, (len(keys), keys[0], keys[-1])
        if self._last_scans.get(number) == shape:
            self._recorder.note(b"R", number, _answers(state, keys))
        else:
            self._last_scans[number] = shape
            self._recorder.note(b"L", number, _answers(state, keys), keys)

    # -- answers of tiers ---------------------------------------------------------------------------------

    def on_job_ended(self, guard: TierGuard, job: Job) -> None:
        """Record which blocks of a job succeeded."""
        complete = len(job.successful) == len(job.keys)
        successful = () if complete else list(job.successful)
        self._recorder.note(b"J", 0, JOB.pack(guard.index, job.job_id, complete), successful)

    def on_poll(self, guards: Sequence[TierGuard]) -> None:
        """Record the tiers that began or ceased to be used."""
        for guard in guards:
            if guard.usable != self._usable[guard.index]:
                self._usable[guard.index] = guard.usable
                self._recorder.note(b"U", 0, TIER.pack(guard.index, guard.usable))

    def note_taken(self, index: int, count: int) -> None:
        """Record how many blocks of a store a tier took, if not all."""
        self.note_scan()
        self._recorder.note(b"B", 0, TAKEN.pack(index, count))

    def note_late(self, index: int, room: int, num_looks: int) -> None:
        """Record that a tier was offered late blocks."""
        self.note_scan()
        self._recorder.note(b"A", 0, LATE.pack(index, room, num_looks))

    def note_room(self, room: int) -> None:
        """Record how many blocks of a store the tiers would have taken."""
        self.note_scan()
        self._recorder.note(b"W", 0, ROOM.pack(room))


def _answers(state: RequestState, keys: Sequence[OffloadKey]) -> bytes:
    """Return the tiers' answers for the keys of a scan, one byte per key; b"" if all of them missed."""
    found, unresolved = state.scan.found, state.scan.unresolved
    if not found and not unresolved:
        return b""
    asked = NOT_SURE + min(state.wait.probing, default=0)
    return bytes([asked if key in unresolved else found.get(key, NOT_FOUND) for key in keys])


class RecordedCascades(Cascades):
    """Records how many blocks tiers take. That depends on the time of each look at the clock, which a replay does not
    know.
    """

    def __init__(self, log: CallLog, *parts: Any) -> None:
        super().__init__(*parts)
        self._log = log

    def _num_taken(self, guard: TierGuard, count: int) -> int:
        taken = super()._num_taken(guard, count)
        if taken < count:
            self._log.note_taken(guard.index, taken)
        return taken

    def _offer_late(self, guard: TierGuard) -> tuple[int, int]:
        room, num_looks = super()._offer_late(guard)
        if num_looks:
            self._log.note_late(guard.index, room, num_looks)
        return room, num_looks

    def room(self) -> int:
        room = super().room()
        self._log.note_room(room)
        return room


class RecordedManager(TieringOffloadingManager):
    """A manager that records its calls and its tiers' answers.

    A call is recorded after it has returned. What the call learnt from tiers (answers, refusals, states) is recorded
    before it.
    """

    def __init__(
        self,
        *args: Any,
        recorder: Recorder,
        names: Sequence[str],
        watcher: Watcher | None = None,
        **keywords: Any,
    ) -> None:
        """Args: as for `TieringOffloadingManager`; recorder: the manager starts it, and `shutdown` closes it."""
        self._recorder = recorder
        self._log = CallLog(recorder, names)
        both = self._log if watcher is None else Watchers(self._log, watcher)
        super().__init__(*args, names=names, watcher=both, **keywords)
        recorder.start()

    def _make_cascades(self, *parts: Any) -> Cascades:
        return RecordedCascades(self._log, *parts)

    @in_turn
    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        answer = super().on_new_request(req_context)
        self._log.note_new_request(req_context)
        return answer

    @in_turn
    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> CPULoadStoreSpec:
        spec = super().prepare_load(keys, req_context)
        self._log.note_call(b"P", req_context, keys)
        return spec

    @in_turn
    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        super().complete_load(keys, req_context, success)
        self._log.note_call(b"C", req_context, keys)

    @in_turn
    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        super().touch(keys, req_context)
        self._log.note_call(b"T", req_context, keys)

    @in_turn
    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput | None:
        output = super().prepare_store(keys, req_context)
        self._log.note_call(b"S", req_context, keys)
        return output

    @in_turn
    def complete_store(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        super().complete_store(keys, req_context, success)
        self._log.note_call(b"D" if success else b"F", req_context, keys)

    @in_turn
    def on_request_finished(self, req_context: ReqContext) -> None:
        self._log.end_scan()
        super().on_request_finished(req_context)
        self._log.note_finished_request(req_context)

    @in_turn
    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._log.end_scan()
        super().on_schedule_end(context)
        self._log.note_step(context)

    @in_turn
    def reset_cache(self, late_completions: bool = True) -> None:
        self._log.end_scan()
        super().reset_cache(late_completions)
        self._log.note_reset(late_completions)

    @in_turn
    def shutdown(self) -> None:
        self._recorder.close()
        super().shutdown()
