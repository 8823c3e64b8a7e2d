"""The conformance suite for secondary tiers. Derive a test class from it:

    class TestMyTier(TierSuite):
        def make_tier(self, offloading_spec, primary_kv_view): return MyTier(offloading_spec, primary_kv_view, "mine")
        def plant(self, tier, key, raw): ...   # optional: replace the raw bytes of a block, past the tier's API
        def peek(self, tier, key): ...         # optional: return the raw bytes of a block, or None

The suite needs no fixtures: pytest calls `setup_method` and `teardown_method`. The tier works on a real arena.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar

from kvtier.abc import SecondaryTierManager, TierContext
from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.testing.patience import PATIENCE_SECONDS
from kvtier.testing.stores import flip_bit, make_key, make_payload
from kvtier.testing.tier_rig import TierRig, succeeded
from kvtier.types import LookupResult, ReqContext


class TierSuite:
    """For a `SecondaryTierManager` with room for at least `capacity_blocks` blocks of 8 KiB."""

    capacity_blocks: ClassVar[int] = 24
    patience: ClassVar[float] = PATIENCE_SECONDS
    """Longest wait for a condition, seconds."""
    rig: TierRig

    def make_tier(self, offloading_spec: Any, primary_kv_view: memoryview) -> SecondaryTierManager:
        """Make the tier, without starting it."""
        raise NotImplementedError

    def plant(self, tier: Any, key: OffloadKey, raw: bytes) -> None:
        """Replace the raw bytes of a block, past the tier's API. Do not define it if that is impossible."""
        raise NotImplementedError

    def peek(self, tier: Any, key: OffloadKey) -> bytes | None:
        """Return the raw bytes of a block, past the tier's API. Do not define it if that is impossible."""
        raise NotImplementedError

    def make_context(self) -> TierContext:
        """Return the context for the tier."""
        return TierContext(namespace=Namespace({"model": "suite"}))

    def setup_method(self) -> None:
        """Start a tier over a new arena."""
        self.rig = TierRig(self.make_context(), patience=self.patience)
        self.rig.attach(self.make_tier(self.rig.spec, self.rig.arena.view))
        self.rig.tier.start()
        self.rig.wait_up()

    def teardown_method(self) -> None:
        """Shut down the tier."""
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

    def test_what_was_deleted_misses(self) -> None:
        rig = self.rig
        if not rig.tier.deletes:
            return
        rig.store(range(16))
        rig.lookup(0)
        numbers = [0, 3, 15, 99]
        assert set(rig.delete(numbers) or ()) == {make_key(number) for number in numbers}
        assert [rig.lookup(number) for number in numbers] == [LookupResult.MISS] * 4
        kept = [number for number in range(16) if number not in numbers]
        assert rig.load(range(16))[1] == kept
        assert rig.store([3]).success
        assert rig.load([3])[1] == [3]
        assert rig.delete([]) is not None

    def test_a_listing_has_every_key(self) -> None:
        rig = self.rig
        if not rig.tier.lists_keys:
            return
        assert rig.listed(5) == []
        rig.store(range(16))
        assert set(rig.listed(5) or ()) == {make_key(number) for number in range(16)}
        if rig.tier.deletes:
            rig.delete([4, 5])
            assert set(rig.listed(100) or ()) == {make_key(number) for number in range(16) if number not in (4, 5)}

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
        assert time.monotonic() - started < self.patience, f"shutdown took more than {self.patience:g} s"
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
