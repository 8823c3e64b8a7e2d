# ruff: noqa: D102 - the names of the tests say what they check
"""What every secondary tier must do, as a test class to inherit from.

    class TestMyTier(TierSuite):
        def make_tier(self, offloading_spec, primary_kv_view): return MyTier(offloading_spec, primary_kv_view, "mine")
        def plant(self, tier, key, raw): ...   # optional: put raw bytes where the tier keeps a block
        def peek(self, tier, key): ...         # optional: the raw bytes it keeps, or None

The suite needs no fixtures: pytest calls `setup_method` and `teardown_method`. The tier works on a real arena.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from kvtier.abc import SecondaryTierManager, TierContext
from kvtier.events import TierState
from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.primary.arena import Arena
from kvtier.testing.stores import flip_bit, make_key, make_payload
from kvtier.types import JobMetadata, JobResult, LookupResult, ReqContext, ScheduleEndContext

_POLL_SECONDS = 0.001
PATIENCE_SECONDS = 10.0
"""How long the suite waits for an answer before it says that there is none."""
_UNTOUCHED = 0x5A


class SuiteSpec:
    """The engine's spec, as far as a tier needs one."""

    def __init__(self, tier_context: TierContext) -> None:
        self.tier_context = tier_context


class TierRig:
    """A tier over a real arena, driven by hand as the tiering manager drives it.

    Attributes:
        arena: `num_blocks` slots of `block_bytes` bytes.
        answers: how often each job was answered.
        results: the answers, by job.
    """

    def __init__(self, context: TierContext, num_blocks: int = 64, block_bytes: int = 8192) -> None:
        """Args: context: `arena_fd` is set to the arena's."""
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
        """Drive this tier from now on."""
        self.tier = tier
        self._attached = True

    def poll(self) -> None:
        """One step of the scheduler, as a tier sees it."""
        self.tier.on_schedule_end(ScheduleEndContext())
        for result in self.tier.get_finished_jobs():
            self.answers[result.job_id] += 1
            self.results[result.job_id] = result
        self.tier.check_invariants()

    def wait(self, condition: Callable[[], bool], what: str, seconds: float | None = None) -> None:
        """Step until `condition()`; fail with `what` after `seconds`."""
        seconds = PATIENCE_SECONDS if seconds is None else seconds
        deadline = time.monotonic() + seconds
        self.poll()
        while not condition():
            assert time.monotonic() < deadline, (
                f"{what}: not after {seconds} s; {self.tier.state} {self.tier.state_reason}"
            )
            time.sleep(_POLL_SECONDS)
            self.poll()

    def wait_up(self, seconds: float | None = None) -> None:
        """Step until the tier is UP."""
        self.wait(lambda: self.tier.state is TierState.UP, "the tier is up", seconds)

    def fill(self, slot: int, payload: bytes) -> None:
        """Put bytes into a slot."""
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

    def finish(self, job_id: int, seconds: float | None = None) -> JobResult:
        """Step until a job is answered; return the answer."""
        self.wait(lambda: job_id in self.results, f"job {job_id} is answered", seconds)
        return self.results[job_id]

    def store(self, numbers: Sequence[int], first_slot: int = 0) -> JobResult:
        """Store the blocks of these numbers from slots `first_slot` on; return the answer."""
        slots = range(first_slot, first_slot + len(numbers))
        for slot, number in zip(slots, numbers, strict=True):
            self.fill(slot, make_payload(number, self.block_bytes))
        return self.finish(self.submit([make_key(number) for number in numbers], slots, load=False))

    def load(self, numbers: Sequence[int], first_slot: int = 32) -> tuple[JobResult, list[int]]:
        """Load blocks into slots from `first_slot` on; return the answer and the numbers that succeeded.

        Fails if a block that is said to have succeeded has other bytes than it was stored with.
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

    def lookup(self, number: int, seconds: float | None = None) -> LookupResult:
        """Ask for a block until the answer is not RETRY; return it."""
        answer = LookupResult.RETRY

        def answered() -> bool:
            nonlocal answer
            answer = self.tier.lookup(make_key(number), self.request)
            assert isinstance(answer, LookupResult), f"lookup returned {answer!r}"
            return answer is not LookupResult.RETRY

        self.wait(answered, f"a lookup of block {number} is answered", seconds)
        return answer

    def assert_each_job_answered_once(self) -> None:
        """Fail if a job was answered twice, never, or was never submitted."""
        assert set(self.answers) <= self.submitted, "an answer for a job that was never submitted"
        assert all(count == 1 for count in self.answers.values()), f"answers by job: {dict(self.answers)}"
        assert set(self.answers) == self.submitted, f"unanswered: {self.submitted - set(self.answers)}"

    def close(self) -> None:
        """Shut the tier down and release the arena."""
        if self._attached:
            self.tier.shutdown()
        self.arena.close()


def succeeded(result: JobResult, key: OffloadKey) -> bool:
    """Return whether a result says that this block succeeded."""
    return result.success or (result.successful_keys is not None and key in result.successful_keys)


class TierSuite:
    """For a `SecondaryTierManager` that holds at least `capacity_blocks` blocks of 8 KiB."""

    capacity_blocks: ClassVar[int] = 24
    rig: TierRig

    def make_tier(self, offloading_spec: Any, primary_kv_view: memoryview) -> SecondaryTierManager:
        """Make the tier; the suite starts it."""
        raise NotImplementedError

    def plant(self, tier: Any, key: OffloadKey, raw: bytes) -> None:
        """Replace the raw bytes of a block, past the tier's API; leave out if that is impossible."""
        raise NotImplementedError

    def peek(self, tier: Any, key: OffloadKey) -> bytes | None:
        """Return the raw bytes of a block, past the tier's API; leave out if that is impossible."""
        raise NotImplementedError

    def make_context(self) -> TierContext:
        """Return what the tier learns of the engine."""
        return TierContext(namespace=Namespace({"model": "suite"}))

    def setup_method(self) -> None:
        """Start a tier over a new arena."""
        self.rig = TierRig(self.make_context())
        self.rig.attach(self.make_tier(self.rig.spec, self.rig.arena.view))
        self.rig.tier.start()
        self.rig.wait_up()

    def teardown_method(self) -> None:
        """Shut it down; it must have kept its contract."""
        self.rig.close()

    def test_an_unknown_key_is_a_miss(self) -> None:
        assert self.rig.lookup(1) is LookupResult.MISS

    def test_what_was_stored_is_loaded_again(self) -> None:
        numbers = list(range(16))
        assert self.rig.store(numbers).success, "a store within the capacity failed"
        assert all(self.rig.lookup(number) is LookupResult.HIT for number in numbers)
        result, loaded = self.rig.load(numbers)
        assert result.success
        assert loaded == numbers
        self.rig.assert_each_job_answered_once()

    def test_a_block_is_loaded_more_than_once(self) -> None:
        self.rig.store([1, 2])
        for _ in range(3):
            assert self.rig.load([2, 1])[1] == [2, 1]

    def test_unknown_keys_fail_and_others_still_succeed(self) -> None:
        self.rig.store([1, 3])
        result, loaded = self.rig.load([1, 2, 3, 4])
        assert not result.success, "a load of an unknown key succeeded"
        assert loaded == [1, 3]
        result, loaded = self.rig.load([5, 6])
        assert not result.success
        assert loaded == []
        self.rig.assert_each_job_answered_once()

    def test_storing_again_what_is_here_succeeds(self) -> None:
        self.rig.store([1, 2])
        assert self.rig.store([1, 2, 3]).success
        assert self.rig.load([1, 2, 3])[1] == [1, 2, 3]

    def test_many_jobs_are_each_answered_once(self) -> None:
        rig, count = self.rig, self.capacity_blocks
        for number in range(count):
            rig.fill(number, make_payload(number, rig.block_bytes))
        stores = [rig.submit([make_key(number)], [number], load=False) for number in range(count)]
        for job_id in stores:
            rig.finish(job_id)
        loads = [rig.submit([make_key(number)], [number + count], load=True) for number in range(count)]
        for number, job_id in enumerate(loads):
            if rig.finish(job_id).success:
                assert rig.read(number + count) == make_payload(number, rig.block_bytes), f"wrong bytes in job {job_id}"
        rig.poll()
        rig.assert_each_job_answered_once()
        assert sum(rig.results[job_id].success for job_id in loads) == count

    def test_an_empty_job_is_answered(self) -> None:
        self.rig.finish(self.rig.submit([], [], load=False))
        self.rig.finish(self.rig.submit([], [], load=True))
        self.rig.assert_each_job_answered_once()

    def test_a_load_changes_no_other_slot(self) -> None:
        rig = self.rig
        rig.store([1, 2])
        before = [rig.read(slot) for slot in range(rig.num_blocks)]
        rig.load([1, 9, 2], first_slot=40)
        changed = [slot for slot in range(rig.num_blocks) if rig.read(slot) != before[slot]]
        assert set(changed) <= {40, 41, 42}

    def test_it_takes_stores_when_it_has_nothing_to_do(self) -> None:
        assert self.rig.tier.can_store(1)
        self.rig.store([1])
        assert self.rig.tier.can_store(1)

    def test_more_than_fits_is_no_error(self) -> None:
        rig = self.rig
        for start in range(0, 512, 32):
            rig.store(range(start, start + 32))
        held = [number for number in range(512) if rig.lookup(number) is LookupResult.HIT]
        _, loaded = rig.load(held[-32:], first_slot=0)
        assert loaded, "nothing survived"
        rig.assert_each_job_answered_once()

    def test_touching_unknown_keys_is_harmless(self) -> None:
        self.rig.store([1])
        self.rig.tier.touch([make_key(1), make_key(7), make_key(8)], self.rig.request)
        assert self.rig.lookup(7) is LookupResult.MISS
        assert self.rig.load([1])[1] == [1]

    def test_requests_come_and_go(self) -> None:
        request = ReqContext("another")
        self.rig.tier.on_new_request(request)
        self.rig.tier.lookup(make_key(1), request)
        self.rig.tier.on_request_finished(request)
        self.rig.poll()
        assert not self.rig.tier.has_pending_work()

    def test_a_drain_leaves_no_job_unanswered(self) -> None:
        rig = self.rig
        for number in range(16):
            rig.fill(number, make_payload(number, rig.block_bytes))
        for number in range(16):
            rig.submit([make_key(number)], [number], load=False)
        rig.tier.drain_jobs()
        rig.poll()
        rig.assert_each_job_answered_once()
        stored = [number for number in range(16) if succeeded(rig.results[number + 1], make_key(number))]
        assert rig.load(stored)[1] == stored

    def test_a_new_epoch_forgets(self) -> None:
        rig = self.rig
        rig.store([1, 2])
        rig.tier.drain_jobs()
        rig.tier.start_epoch(b"salt" * 4)
        assert rig.tier.lookup(make_key(1), rig.request) is not LookupResult.HIT
        rig.wait_up()
        assert rig.lookup(1) is LookupResult.MISS
        assert rig.load([1, 2])[1] == [], "a block of an earlier epoch was loaded"
        rig.store([1])
        assert rig.load([1, 2])[1] == [1]

    def test_shutdown_with_jobs_in_flight(self) -> None:
        rig = self.rig
        for number in range(24):
            rig.submit([make_key(number)], [number], load=False)
        started = time.monotonic()
        rig.tier.shutdown()
        assert time.monotonic() - started < 10, "shutdown took more than 10 s"
        after = [rig.read(slot) for slot in range(rig.num_blocks)]
        assert rig.tier.lookup(make_key(1), rig.request) in LookupResult
        assert after == [rig.read(slot) for slot in range(rig.num_blocks)]

    def test_corrupted_bytes_never_succeed(self) -> None:
        rig = self.rig
        for bit in (0, 7, 4000, -9):
            rig.store([1, 2])
            try:
                raw = self.peek(rig.tier, make_key(1))
                assert raw is not None, "peek does not find a block that was stored"
                self.plant(rig.tier, make_key(1), flip_bit(raw, bit % (8 * len(raw))))
            except NotImplementedError:
                return  # bytes that nobody can reach, nobody can corrupt
            if not rig.tier.verifies_payloads:
                return
            result, loaded = rig.load([1, 2])
            assert loaded == [2]
            assert not result.success
            assert rig.lookup(1) is LookupResult.MISS, "a corrupted block is still offered"
