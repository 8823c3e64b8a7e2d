"""The conformance suite for a `BlockStore` (for a `SlotStore`: `slot_stores.py`). Derive a test class from it:

    class TestMyStore(StoreSuite):
        def open_store(self, medium, context): ...
        def plant(self, store, key, raw): ...     # replace the store's raw value, past its API
        def peek(self, store, key): ...           # return the store's raw value, or None

The suite needs no fixtures: pytest calls `setup_method` and `teardown_method`.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from kvtier.abc import BlockStore, StoreContext
from kvtier.errors import StoreError
from kvtier.keys import MAX_KEY_BYTES, MIN_KEY_BYTES, OffloadKey, make_offload_key
from kvtier.namespace import Namespace
from kvtier.testing.patience import PATIENCE_SECONDS
from kvtier.types import MOST_LISTED

FILLING = 0xA5
"""The byte that fills buffers before a read."""
NUM_THREADS = 4


def make_key(number: int, group_idx: int = 0) -> OffloadKey:
    """Return a key of the usual length; different numbers give different keys."""
    return make_offload_key(random.Random(number).randbytes(32), group_idx)


def make_payload(number: int, length: int) -> bytes:
    """Return `length` bytes; the same number gives the same bytes."""
    return random.Random(~number).randbytes(length)


def flip_bit(raw: bytes, bit: int) -> bytes:
    """Return `raw` with one bit inverted."""
    flipped = bytearray(raw)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def some_bits(length: int) -> list[int]:
    """Return positions of bits in a value of `length` bytes: one per byte near its ends, and some in between."""
    edge = min(length, 160)
    between = random.Random(length).sample(range(length), min(length, 40))
    return [byte * 8 + byte % 8 for byte in sorted({*range(edge), *range(length - edge, length), *between})]


def run_threads(work: Callable[[int], None], count: int = NUM_THREADS) -> None:
    """Call `work(0)` to `work(count - 1)` at the same time; raise the first error of them."""
    errors: list[BaseException] = []
    start = threading.Barrier(count)

    def guarded(number: int) -> None:
        try:
            start.wait(PATIENCE_SECONDS)
            work(number)
        except BaseException as error:  # noqa: BLE001 - handed to the caller below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Suite:
    """Opens a store for each test, with a new medium and context."""

    block_bytes: ClassVar[int] = 8192
    store: Any

    def make_medium(self) -> Path:
        """Return a new directory for stores that need one."""
        return Path(tempfile.mkdtemp(prefix="kvtier-suite-"))

    def make_context(self, model: str = "suite") -> StoreContext:
        """Return a context; different models have different namespaces."""
        return StoreContext(Namespace({"model": model}), self.block_bytes)

    def _open(self, context: StoreContext) -> Any:
        raise NotImplementedError

    def setup_method(self, method: object = None) -> None:
        """Open the store under test."""
        self.medium = self.make_medium()
        self.context = self.make_context()
        self.store = self._open(self.context)

    def teardown_method(self, method: object = None) -> None:
        """Close the store and remove the medium."""
        try:
            if self.store is not None:
                self.store.close()
        finally:
            shutil.rmtree(self.medium, ignore_errors=True)

    def payload(self, number: int) -> bytes:
        """Return the payload of block `number`."""
        return make_payload(number, self.block_bytes)

    def buffers(self, count: int, length: int | None = None) -> list[memoryview]:
        """Return buffers that are filled with FILLING."""
        size = self.block_bytes if length is None else length
        return [memoryview(bytearray([FILLING]) * size) for _ in range(count)]


def _refused(call: Callable[[], Sequence[bool]]) -> bool:
    """Return whether a call failed in one of the two allowed ways: all False, or a StoreError."""
    try:
        return not any(call())
    except StoreError:
        return True


class StoreSuite(Suite):
    """For a `BlockStore` as kvtier uses it: wrapped in a `CheckedStore`, or sealing its values itself.

    Attributes:
        keeps_failed_buffers: whether a buffer is unchanged if its read failed. `CheckedStore` promises this; the
            contract of `BlockStore` does not.
    """

    keeps_failed_buffers: ClassVar[bool] = True
    store: BlockStore

    def open_store(self, medium: Path, context: StoreContext) -> BlockStore:
        """Return a store as kvtier uses it. A second store of the same medium must share its contents."""
        raise NotImplementedError

    def plant(self, store: Any, key: OffloadKey, raw: bytes) -> None:
        """Replace the store's raw value of `key`, past its API."""
        raise NotImplementedError

    def peek(self, store: Any, key: OffloadKey) -> bytes | None:
        """Return the store's raw value of `key`, past its API; None if there is none."""
        raise NotImplementedError

    def _open(self, context: StoreContext) -> BlockStore:
        return self.open_store(self.medium, context)

    def _write(self, numbers: Iterable[int], store: BlockStore | None = None) -> None:
        """Store blocks, and assert that all of them succeed."""
        numbers = list(numbers)
        payloads = [memoryview(self.payload(number)) for number in numbers]
        results = (store or self.store).write([make_key(number) for number in numbers], payloads)
        assert list(results) == [True] * len(numbers), "a write into an empty store failed"

    def _read(self, numbers: Iterable[int]) -> list[bytes | None]:
        """Read blocks; None for those that failed."""
        keys = [make_key(number) for number in numbers]
        buffers = self.buffers(len(keys))
        results = list(self.store.read_into(keys, buffers))
        assert len(results) == len(keys), "one result per key"
        if self.keeps_failed_buffers:
            for result, buffer in zip(results, buffers, strict=True):
                assert result or bytes(buffer) == bytes([FILLING]) * self.block_bytes, "a failed buffer was written"
        return [bytes(buffer) if result else None for result, buffer in zip(results, buffers, strict=True)]

    def _assert_lost(self, number: int, what: str) -> None:
        """Assert that block `number` is a miss now, and was counted and deleted."""
        self.context.failures.take()
        assert self._read([number]) == [None], f"a block was served whose value was {what}"
        assert sum(self.context.failures.take().values()) >= 1, f"not counted: value {what}"
        assert list(self.store.contains([make_key(number)])) == [False], f"not deleted: value {what}"

    def test_what_was_written_is_read(self) -> None:
        self._write([1])
        assert list(self.store.contains([make_key(1)])) == [True]
        assert self._read([1]) == [self.payload(1)]
        assert not self.context.failures.take()

    def test_a_batch_keeps_its_order(self) -> None:
        self._write(range(20))
        order = random.Random(7).sample(range(20), 20)
        assert self._read(order) == [self.payload(number) for number in order]

    def test_one_key_may_be_read_twice_in_a_batch(self) -> None:
        self._write([1, 2])
        assert self._read([1, 2, 1]) == [self.payload(1), self.payload(2), self.payload(1)]

    def test_absent_keys_miss(self) -> None:
        assert list(self.store.contains([make_key(1), make_key(2)])) == [False, False]
        assert self._read([1, 2]) == [None, None]

    def test_partial_presence_is_told_per_key(self) -> None:
        self._write([1, 3])
        assert list(self.store.contains([make_key(number) for number in range(5)])) == [False, True, False, True, False]
        assert self._read(range(5)) == [None, self.payload(1), None, self.payload(3), None]

    def test_the_second_write_of_a_key_wins(self) -> None:
        key = make_key(1)
        for number in (1, 2, 3):
            assert list(self.store.write([key], [memoryview(self.payload(number))])) == [True]
        assert self._read([1]) == [self.payload(3)]

    def test_keys_of_all_lengths_and_groups(self) -> None:
        keys = [make_offload_key(b"h" * (length - 4), 0) for length in (MIN_KEY_BYTES, 20, 36, MAX_KEY_BYTES)]
        keys += [make_offload_key(b"h" * 32, group_idx) for group_idx in (0, 1, 2**32 - 1)]
        keys += [make_offload_key(b"\0" * 32, 0), make_offload_key(bytes(range(32)), 0)]
        keys = list(dict.fromkeys(keys))
        payloads = [self.payload(number) for number in range(len(keys))]
        assert all(self.store.write(keys, [memoryview(payload) for payload in payloads]))
        buffers = self.buffers(len(keys))
        assert all(self.store.read_into(keys, buffers))
        assert [bytes(buffer) for buffer in buffers] == payloads

    def test_written_buffers_are_not_kept(self) -> None:
        source = bytearray(self.payload(1))
        assert all(self.store.write([make_key(1)], [memoryview(source)]))
        source[:] = bytes(len(source))
        assert self._read([1]) == [self.payload(1)]

    def test_delete_forgets_only_what_it_names(self) -> None:
        self._write([1, 2, 3])
        self.store.delete([make_key(1), make_key(3), make_key(4)])
        assert list(self.store.contains([make_key(number) for number in (1, 2, 3)])) == [False, True, False]
        assert self._read([1, 2, 3]) == [None, self.payload(2), None]

    def _listed(self, most: int) -> list[OffloadKey] | None:
        """Return all keys that the store lists, page by page; None if it cannot list."""
        found: list[OffloadKey] = []
        cursor: bytes | None = b""
        while cursor is not None:
            page = self.store.list_keys(cursor, most)
            if page is None:
                assert not found, "a store that lists some pages must list all"
                return None
            assert page.cursor != cursor or page.keys, "a listing that does not go on"
            assert len(page.keys) <= 2 * MOST_LISTED
            found += page.keys
            cursor = page.cursor
        return found

    def test_a_listing_has_every_key_of_this_namespace(self) -> None:
        if self._listed(10) is None:
            return
        foreign = self.open_store(self.medium, self.make_context("another"))
        try:
            self._write([100], foreign)
        finally:
            foreign.close()
        assert self._listed(10) == []
        self._write(range(30))
        for most in (1, 7, 30, MOST_LISTED):
            assert set(self._listed(most) or ()) == {make_key(number) for number in range(30)}
        self.store.delete([make_key(number) for number in range(0, 30, 2)])
        assert set(self._listed(7) or ()) == {make_key(number) for number in range(1, 30, 2)}

    def test_a_listing_goes_on_while_blocks_come_and_go(self) -> None:
        self._write(range(30))
        first = self.store.list_keys(b"", 5)
        if first is None:
            return
        found, cursor = list(first.keys), first.cursor
        self.store.delete([make_key(number) for number in range(10)])
        self._write(range(100, 110))
        while cursor is not None:
            page = self.store.list_keys(cursor, 5)
            assert page is not None
            found += page.keys
            cursor = page.cursor
        assert {make_key(number) for number in range(10, 30)} <= set(found)

    def test_what_is_kept_is_told_per_key_and_can_be_read(self) -> None:
        self._write([1, 3])
        held = self.store.keep([make_key(1), make_key(2), make_key(3)], 60.0)
        if held is None:
            return
        assert list(held) == [True, False, True]
        assert self._read([1, 2, 3]) == [self.payload(1), None, self.payload(3)]
        self.store.delete([make_key(1)])
        assert list(self.store.keep([make_key(1), make_key(3)], 60.0) or ()) == [False, True]

    def test_a_cursor_that_is_none_raises_nothing_else(self) -> None:
        for cursor in (b"nonsense", b"\xff" * 100):
            try:
                self.store.list_keys(cursor, 5)
            except StoreError:
                continue

    def test_empty_batches(self) -> None:
        assert list(self.store.contains([])) == []
        assert list(self.store.write([], [])) == []
        assert list(self.store.read_into([], [])) == []
        self.store.delete([])

    def test_buffers_of_a_wrong_length_are_refused(self) -> None:
        self._write([1])
        for length in (0, 1, self.block_bytes - 1, self.block_bytes + 1):
            assert _refused(lambda length=length: self.store.read_into([make_key(1)], self.buffers(1, length)))  # type: ignore[misc] # mypy cannot infer a lambda's default
            assert _refused(lambda length=length: self.store.write([make_key(2)], self.buffers(1, length)))  # type: ignore[misc] # as above
        assert self._read([2]) == [None]

    def _raw(self, number: int) -> bytes:
        """Write a block and return its raw value."""
        self._write([number])
        raw = self.peek(self.store, make_key(number))
        assert raw is not None, "peek finds nothing after a write"
        return raw

    def test_a_flipped_bit_is_a_miss(self) -> None:
        raw = self._raw(1)
        for bit in some_bits(len(raw)):
            self.plant(self.store, make_key(1), flip_bit(raw, bit))
            self._assert_lost(1, f"flipped at bit {bit}")
        self.plant(self.store, make_key(1), raw)
        assert self._read([1]) == [self.payload(1)], "what is planted as it was must be served"

    def test_a_truncated_value_is_a_miss(self) -> None:
        raw = self._raw(1)
        for length in (1, 16, 127, 128, len(raw) // 2, len(raw) - 1):
            self.plant(self.store, make_key(1), raw[:length])
            self._assert_lost(1, f"cut to {length} bytes")

    def test_a_grown_value_is_a_miss(self) -> None:
        raw = self._raw(1)
        for more in (1, 128, len(raw)):
            self.plant(self.store, make_key(1), (raw + raw)[: len(raw) + more])
            self._assert_lost(1, f"{more} bytes longer")

    def test_an_emptied_value_is_a_miss(self) -> None:
        raw = self._raw(1)
        for value in (b"", bytes(len(raw))):
            self.plant(self.store, make_key(1), value)
            self._assert_lost(1, "emptied")

    def test_another_keys_value_is_a_miss(self) -> None:
        raws = {number: self._raw(number) for number in (1, 2)}
        self.plant(self.store, make_key(1), raws[2])
        self.plant(self.store, make_key(2), raws[1])
        self._assert_lost(1, "another key's")
        self._assert_lost(2, "another key's")

    def test_a_bad_block_does_not_spoil_its_batch(self) -> None:
        raw = self._raw(2)
        self._write([1, 3])
        self.plant(self.store, make_key(2), flip_bit(raw, len(raw) * 4))
        assert self._read([1, 2, 3]) == [self.payload(1), None, self.payload(3)]

    def test_another_namespaces_blocks_are_invisible(self) -> None:
        foreign = self.open_store(self.medium, self.make_context("another"))
        try:
            self._write([1], foreign)
            raw = self.peek(foreign, make_key(1))
        finally:
            foreign.close()
        assert raw is not None
        assert self._read([1]) == [None], "another namespace's block was served"
        self.plant(self.store, make_key(1), raw)
        self._assert_lost(1, "another namespace's")

    def test_threads_at_once(self) -> None:
        def work(thread: int) -> None:
            numbers = range(100 + thread * 10, 110 + thread * 10)
            for _ in range(5):
                self._write(numbers)
                assert self._read(numbers) == [self.payload(number) for number in numbers]
                assert all(self.store.contains([make_key(number) for number in numbers]))
            self.store.delete([make_key(number) for number in numbers[::2]])
            expected = [None if index % 2 == 0 else self.payload(number) for index, number in enumerate(numbers)]
            assert self._read(numbers) == expected

        run_threads(work)

    def test_threads_on_one_key_see_one_write_whole(self) -> None:
        allowed = {self.payload(number) for number in range(NUM_THREADS)} | {None}

        def work(thread: int) -> None:
            for _ in range(10):
                self.store.write([make_key(1)], [memoryview(self.payload(thread))])
                assert self._read([1])[0] in allowed

        run_threads(work)
