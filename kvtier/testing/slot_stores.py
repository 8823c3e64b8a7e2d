"""The conformance suite for a `SlotStore`. `stores.py` shows how to use it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from kvtier.abc import SlotStore, StoreContext
from kvtier.keys import OffloadKey
from kvtier.testing.stores import NUM_THREADS, Suite, flip_bit, make_key, run_threads, some_bits


class SlotStoreSuite(Suite):
    """For a `SlotStore`. `plant` and `peek` access the payload of a slot, `*_record` its header, past the store's
    API.
    """

    capacity_slots: ClassVar[int] = 64
    store: SlotStore

    def open_store(self, medium: Path, context: StoreContext) -> SlotStore:
        """Open a store of at least `capacity_slots` slots on the medium."""
        raise NotImplementedError

    def plant(self, store: Any, slot: int, raw: bytes) -> None:
        """Replace the payload of a slot."""
        raise NotImplementedError

    def peek(self, store: Any, slot: int) -> bytes:
        """Return the payload of a slot."""
        raise NotImplementedError

    def plant_record(self, store: Any, slot: int, raw: bytes) -> None:
        """Replace what the store keeps beside the payload of a slot."""
        raise NotImplementedError

    def peek_record(self, store: Any, slot: int) -> bytes:
        """Return what the store keeps beside the payload of a slot."""
        raise NotImplementedError

    def _open(self, context: StoreContext) -> SlotStore:
        store = self.open_store(self.medium, context)
        self.recovered = self._recover(store)
        return store

    def _recover(self, store: SlotStore) -> dict[int, OffloadKey]:
        """Return the keys that a store recovers, by slot and in its order; both must be unique."""
        pairs = [pair for slots, keys in store.recover() for pair in zip(slots, keys, strict=True)]
        recovered = dict(pairs)
        assert len(recovered) == len(pairs), "a slot was recovered twice"
        assert len(set(recovered.values())) == len(pairs), "a key was recovered twice"
        assert all(0 <= slot < store.num_slots for slot in recovered)
        return recovered

    def _reopen(self, model: str | None = None) -> dict[int, OffloadKey]:
        """Close and reopen the store, for another model if one is given; return the recovered keys by slot."""
        self.store.close()
        if model is not None:
            self.context = self.make_context(model)
        self.store = self._open(self.context)
        return self.recovered

    def _write(self, slots: Sequence[int], numbers: Sequence[int] | None = None) -> None:
        numbers = slots if numbers is None else numbers
        payloads = [memoryview(self.payload(number)) for number in numbers]
        results = self.store.write(slots, [make_key(number) for number in numbers], payloads)
        assert list(results) == [True] * len(slots), "a write to free slots failed"

    def _read(self, slots: Sequence[int], numbers: Sequence[int] | None = None) -> list[bytes | None]:
        keys = [make_key(number) for number in (slots if numbers is None else numbers)]
        buffers = self.buffers(len(slots))
        results = list(self.store.read_into(slots, keys, buffers))
        assert len(results) == len(slots), "one result per slot"
        return [bytes(buffer) if result else None for result, buffer in zip(results, buffers, strict=True)]

    def _assert_lost(self, slot: int, what: str) -> None:
        """Assert that a slot, which was written with the block of its own number, is a counted miss."""
        self.context.failures.take()
        assert self._read([slot]) == [None], f"a block was served whose slot was {what}"
        assert sum(self.context.failures.take().values()) >= 1, f"not counted: slot {what}"

    def test_there_are_slots(self) -> None:
        assert self.store.num_slots >= self.capacity_slots

    def test_what_was_written_is_read(self) -> None:
        self._write([3])
        assert self._read([3]) == [self.payload(3)]
        assert self.peek(self.store, 3) == self.payload(3)
        assert not self.context.failures.take()

    def test_a_batch_in_any_order(self) -> None:
        slots = random.Random(3).sample(range(self.capacity_slots), self.capacity_slots)
        self._write(slots)
        random.Random(4).shuffle(slots)
        assert self._read(slots) == [self.payload(slot) for slot in slots]

    def test_first_and_last_slot(self) -> None:
        slots = [0, self.store.num_slots - 1]
        self._write(slots)
        assert self._read(slots) == [self.payload(slot) for slot in slots]

    def test_empty_slots_miss(self) -> None:
        self._write([2])
        assert self._read([1, 2, 5]) == [None, self.payload(2), None]

    def test_a_slot_that_was_overwritten_serves_the_new_key_only(self) -> None:
        self._write([1], [10])
        self._write([1], [11])
        assert self._read([1], [11]) == [self.payload(11)]
        assert self._read([1], [10]) == [None]

    def test_what_was_deleted_is_gone_for_later_processes_too(self) -> None:
        self._write([1, 2, 3])
        self.store.delete([1, 3], [make_key(1), make_key(3)])
        assert self._read([1, 2, 3]) == [None, self.payload(2), None]
        assert self._reopen() == {2: make_key(2)}
        self._write([1], [10])
        assert self._read([1], [10]) == [self.payload(10)]
        self.store.delete([], [])

    def test_empty_batches(self) -> None:
        assert list(self.store.write([], [], [])) == []
        assert list(self.store.read_into([], [], [])) == []

    def test_slots_and_buffers_that_cannot_be_are_refused(self) -> None:
        self._write([1])
        for length in (0, self.block_bytes - 1, self.block_bytes + 1):
            assert not any(self.store.read_into([1], [make_key(1)], self.buffers(1, length)))
            assert not any(self.store.write([2], [make_key(2)], self.buffers(1, length)))
        for slot in (-1, self.store.num_slots):
            assert self._read([slot]) == [None]
            assert not any(self.store.write([slot], [make_key(2)], self.buffers(1)))
        assert self._read([1, 2]) == [self.payload(1), None]

    def test_reopened_it_recovers_what_it_held_oldest_first(self) -> None:
        slots = random.Random(5).sample(range(self.capacity_slots), 20)
        for slot in slots:
            self._write([slot])
        recovered = self._reopen()
        assert list(recovered.items()) == [(slot, make_key(slot)) for slot in slots]
        assert self._read(slots) == [self.payload(slot) for slot in slots]

    def test_reopened_a_key_in_two_slots_is_the_later(self) -> None:
        self._write([1], [10])
        self._reopen()
        self._write([2], [10])
        assert self._reopen() == {2: make_key(10)}
        assert self._reopen() == {2: make_key(10)}

    def test_a_flipped_bit_is_a_miss(self) -> None:
        self._write([4])
        for bit in some_bits(self.block_bytes):
            self._write([4])
            self.plant(self.store, 4, flip_bit(self.peek(self.store, 4), bit))
            self._assert_lost(4, f"flipped at bit {bit}")
        assert 4 not in self._reopen()

    def test_a_flipped_bit_in_the_record_is_a_miss(self) -> None:
        self._write([4])
        for bit in range(len(self.peek_record(self.store, 4)) * 8):
            self._write([4])
            self.plant_record(self.store, 4, flip_bit(self.peek_record(self.store, 4), bit))
            self._assert_lost(4, f"flipped at bit {bit} of its record")
        assert 4 not in self._reopen()

    def test_broken_records_are_not_recovered(self) -> None:
        slots = list(range(40))
        self._write(slots)
        good = {slot: self.peek_record(self.store, slot) for slot in slots}
        for slot in slots[::2]:
            self.plant_record(self.store, slot, flip_bit(good[slot], slot * 25 + 3))
        self.context.failures.take()
        assert sorted(self._reopen()) == slots[1::2]
        assert sum(self.context.failures.take().values()) == 20
        assert sorted(self._reopen()) == slots[1::2]
        assert not self.context.failures.take()

    def test_slots_that_were_swapped_miss(self) -> None:
        self._write([1, 2])
        for first, second in ((1, 2), (2, 1)):
            self.plant(self.store, first, self.payload(second))
        records = [self.peek_record(self.store, slot) for slot in (1, 2)]
        self._assert_lost(1, "another's payload")
        self.plant_record(self.store, 1, records[1])
        self.plant_record(self.store, 2, records[0])
        self._assert_lost(1, "another's payload and record")
        self._assert_lost(2, "another's payload and record")
        assert self._reopen() == {}

    def test_an_emptied_slot_is_a_miss(self) -> None:
        self._write([1, 2, 3])
        self.plant(self.store, 1, bytes(self.block_bytes))
        self._assert_lost(1, "emptied")
        self.plant_record(self.store, 2, bytes(len(self.peek_record(self.store, 2))))
        self._assert_lost(2, "without record")
        assert self._read([3]) == [self.payload(3)]

    def test_another_namespace_sees_nothing(self) -> None:
        self._write([1, 2])
        assert self._reopen("another") == {}
        assert self._read([1, 2]) == [None, None]

    def test_another_namespaces_record_is_refused(self) -> None:
        self._write([1])
        record = self.peek_record(self.store, 1)
        self._reopen("another")
        self._write([1], [7])
        self.plant(self.store, 1, self.payload(1))
        self.plant_record(self.store, 1, record)
        self._assert_lost(1, "another namespace's")

    def test_threads_at_once(self) -> None:
        def work(thread: int) -> None:
            slots = list(range(thread, self.capacity_slots, NUM_THREADS))
            for start in range(5):
                numbers = [slot + start * 1000 for slot in slots]
                self._write(slots, numbers)
                assert self._read(slots, numbers) == [self.payload(number) for number in numbers]

        run_threads(work)
