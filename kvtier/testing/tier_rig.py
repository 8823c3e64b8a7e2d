"""Drives a secondary tier in tests, as the tiering manager would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from kvtier.abc import SecondaryTierManager, TierContext
from kvtier.events import TierState
from kvtier.keys import OffloadKey
from kvtier.primary.arena import Arena
from kvtier.testing.patience import PATIENCE_SECONDS, wait_for
from kvtier.testing.stores import make_key, make_payload
from kvtier.types import (
    Answer,
    AnswerState,
    JobMetadata,
    JobResult,
    LookupResult,
    ReqContext,
    ScheduleEndContext,
)

T = TypeVar("T")
_UNTOUCHED = 0x5A


class SuiteSpec:
    """Stands in for the engine's spec: a tier reads only its `tier_context`."""

    def __init__(self, tier_context: TierContext) -> None:
        self.tier_context = tier_context


class TierRig:
    """A tier over a real arena; each method makes the calls that the tiering manager would make.

    Attributes:
        arena: `num_blocks` slots of `block_bytes` bytes.
        answers: number of results per job.
        results: the last result per job.
    """

    def __init__(
        self,
        context: TierContext,
        num_blocks: int = 64,
        block_bytes: int = 8192,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        """Args: context: for the tier, with the arena's `arena_fd`; patience: longest wait for a condition, seconds."""
        self._patience = patience
        self.arena = Arena.create(num_blocks, block_bytes)
        self.num_blocks, self.block_bytes = num_blocks, block_bytes
        self.spec = SuiteSpec(replace(context, arena_fd=self.arena.fd))
        self.request = ReqContext("suite")
        self.answers: Counter[int] = Counter()
        self.results: dict[int, JobResult] = {}
        self.submitted: set[int] = set()
        self._next_job = 1
        self._attached = False

    def attach(self, tier: SecondaryTierManager) -> None:
        """Set the tier to drive."""
        self.tier = tier
        self._attached = True

    def poll(self) -> None:
        """Make the calls of one scheduler step, and check the tier's invariants."""
        self.tier.on_schedule_end(ScheduleEndContext())
        for result in self.tier.get_finished_jobs():
            self.answers[result.job_id] += 1
            self.results[result.job_id] = result
        self.tier.check_invariants()

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Poll until `condition()` is true; fail with `what` after `patience`."""

        def stepped() -> bool:
            self.poll()
            return condition()

        try:
            wait_for(stepped, what, self._patience)
        except AssertionError as error:
            error.add_note(f"the tier is {self.tier.state} {self.tier.state_reason}")
            raise

    def wait_up(self) -> None:
        """Poll until the tier is UP."""
        self.wait(lambda: self.tier.state is TierState.UP, "the tier is up")

    def fill(self, slot: int, payload: bytes) -> None:
        """Write bytes into a slot."""
        self.arena.row(slot)[:] = payload

    def read(self, slot: int) -> bytes:
        """Return the bytes of a slot."""
        return bytes(self.arena.row(slot))

    def submit(self, keys: Sequence[OffloadKey], slots: Sequence[int], load: bool) -> int:
        """Submit a job; return its number."""
        job_id, self._next_job = self._next_job, self._next_job + 1
        job = JobMetadata(job_id, list(keys), np.asarray(slots, dtype=np.int32), load, self.request)
        self.submitted.add(job_id)
        (self.tier.submit_load if load else self.tier.submit_store)(job)
        return job_id

    def finish(self, job_id: int) -> JobResult:
        """Poll until a job has its result; return the result."""
        self.wait(lambda: job_id in self.results, f"job {job_id} is answered")
        return self.results[job_id]

    def store(self, numbers: Sequence[int], first_slot: int = 0) -> JobResult:
        """Store the blocks with these numbers from slots `first_slot` on; return the result."""
        slots = range(first_slot, first_slot + len(numbers))
        for slot, number in zip(slots, numbers, strict=True):
            self.fill(slot, make_payload(number, self.block_bytes))
        return self.finish(self.submit([make_key(number) for number in numbers], slots, load=False))

    def load(self, numbers: Sequence[int], first_slot: int = 32) -> tuple[JobResult, list[int]]:
        """Load blocks into slots from `first_slot` on; return the result and the numbers that succeeded.

        Fail if a successful block has other bytes than were stored.
        """
        slots = range(first_slot, first_slot + len(numbers))
        for slot in slots:
            self.fill(slot, bytes([_UNTOUCHED]) * self.block_bytes)
        result = self.finish(self.submit([make_key(number) for number in numbers], slots, load=True))
        loaded = []
        for slot, number in zip(slots, numbers, strict=True):
            if succeeded(result, make_key(number)):
                assert self.read(slot) == make_payload(number, self.block_bytes), f"wrong bytes for block {number}"
                loaded.append(number)
        return result, loaded

    def lookup(self, number: int) -> LookupResult:
        """Look up a block until the answer is not RETRY; return the answer."""
        answer = LookupResult.RETRY

        def answered() -> bool:
            nonlocal answer
            answer = self.tier.lookup(make_key(number), self.request)
            assert isinstance(answer, LookupResult), f"lookup returned {answer!r}"
            return answer is not LookupResult.RETRY

        self.wait(answered, f"a lookup of block {number} is answered")
        return answer

    def delete(self, numbers: Sequence[int]) -> Collection[OffloadKey] | None:
        """Delete blocks; return the keys that are gone, None if the deletion failed."""
        return self._value(self.tier.delete([make_key(number) for number in numbers]), "a deletion")

    def listed(self, most: int) -> list[OffloadKey] | None:
        """Return all keys that the tier lists; None if a page failed."""
        found: list[OffloadKey] = []
        cursor: bytes | None = b""
        while cursor is not None:
            page = self._value(self.tier.list_keys(cursor, most), "a page of keys")
            if page is None:
                return None
            found += page.keys
            cursor = page.cursor
        return found

    def _value(self, answer: Answer[T], what: str) -> T | None:
        self.wait(lambda: answer.state is not AnswerState.OPEN, what)
        return answer.value

    def assert_each_job_answered_once(self) -> None:
        """Fail unless each submitted job, and no other, has exactly one result."""
        assert set(self.answers) <= self.submitted, "an answer for a job that was never submitted"
        assert all(count == 1 for count in self.answers.values()), f"answers by job: {dict(self.answers)}"
        assert set(self.answers) == self.submitted, f"unanswered: {self.submitted - set(self.answers)}"

    def close(self) -> None:
        """Shut down the tier, and close the arena."""
        if self._attached:
            self.tier.shutdown()
        self.arena.close()


def succeeded(result: JobResult, key: OffloadKey) -> bool:
    """Return whether a result says that this block succeeded."""
    return result.success or (result.successful_keys is not None and key in result.successful_keys)
