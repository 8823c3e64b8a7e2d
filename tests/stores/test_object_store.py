"""The shipped suite over obstore's own bucket in memory, all of it; over servers in `test_object_servers.py`."""

import time
from types import SimpleNamespace

import pytest
from object_buckets import Raw, open_over
from obstore.store import MemoryStore

from kvtier.errors import StoreUnavailableError
from kvtier.stores.integrity.header import HEADER_BYTES
from kvtier.stores.object import refresher
from kvtier.stores.object.client import ReadCosts, RequestError, Trouble
from kvtier.stores.object.names import PackName, TakenBack, digest_of, parse
from kvtier.testing.patience import wait_for
from kvtier.testing.stores import StoreSuite, flip_bit, make_key
from kvtier.types import FailureCause


class OnBucket(StoreSuite):
    """Over any bucket; `make_bucket` and `open_over` say which."""

    def setup_method(self, method=None):
        self.raw = self.make_raw()
        super().setup_method(method)

    def make_raw(self):
        return Raw(MemoryStore())

    def open_store(self, medium, context):
        return open_over(self.raw.bucket, context)

    def plant(self, store, key, raw):
        if self.raw.plant(store.catalogue, key, raw, store._fingerprint, self.block_bytes):
            store.refresh()

    def peek(self, store, key):
        return self.raw.peek(store.catalogue, key, self.block_bytes)


class TestInMemory(OnBucket):
    def teardown_method(self, method=None):
        self.store.catalogue.check_invariants()
        super().teardown_method(method)

    def test_blocks_of_a_write_are_one_object(self):
        self._write(range(40))
        assert len(self.raw.paths()) == 1
        name = parse(self.raw.paths()[0], "suite/v1")
        assert name.digests == tuple(digest_of(make_key(number)) for number in range(40))
        assert self.store.client.requests["put"] == 1
        self.store.client.requests.clear()
        assert self._read(range(5, 35)) == [self.payload(number) for number in range(5, 35)]
        assert self.store.client.requests["get"] == 1

    @pytest.mark.parametrize(("latency_in_values", "requests"), [(0, 4), (1, 3), (6, 2), (18, 1)])
    def test_scattered_blocks_are_read_together_where_a_request_costs_more(self, latency_in_values, requests):
        self._write(range(40))
        self.store.client.requests.clear()
        self.store.client.read_costs = costs = ReadCosts()
        for _ in range(200):  # a value takes a second
            value_bytes = HEADER_BYTES + self.block_bytes
            costs.learn(latency_in_values + 0.5, 1.0, value_bytes)
        numbers = [0, 1, 3, 10, 11, 30]  # gaps of 1, 6 and 18 values
        assert self._read(numbers) == [self.payload(number) for number in numbers]
        assert self.store.client.requests["get"] == requests

    def test_the_costs_of_a_request_are_measured_with_every_read(self):
        before = self.store.client.read_costs.bytes_per_request
        self._write([1])
        assert self._read([1]) == [self.payload(1)]
        assert self.store.client.read_costs.bytes_per_request != before

    def test_a_lookup_is_no_request(self):
        self._write(range(10))
        self.store.client.requests.clear()
        assert list(self.store.contains([make_key(number) for number in range(1000)])).count(True) == 10
        assert not self.store.client.requests["get"] + self.store.client.requests["put"]

    def test_another_instance_finds_what_was_written(self):
        self._write(range(10))
        other = self.open_store(self.medium, self.make_context())
        assert all(other.contains([make_key(number) for number in range(10)]))
        self._write(range(10, 20))
        other.refresh()
        assert all(other.contains([make_key(number) for number in range(20)]))
        other.close()

    def test_what_another_instance_deleted_is_gone(self):
        self._write(range(4))
        other = self.open_store(self.medium, self.make_context())
        other.delete([make_key(1)])
        names = [parse(path, "suite/v1") for path in self.raw.paths()]  # of the same millisecond, in any order
        assert sorted(isinstance(name, TakenBack) for name in names) == [False, True]
        self.store.refresh()
        assert list(self.store.contains([make_key(number) for number in range(4)])) == [True, False, True, True]
        other.delete([make_key(number) for number in range(4)])
        assert not [path for path in self.raw.paths() if isinstance(parse(path, "suite/v1"), PackName)]
        assert self._read(range(4)) == [None] * 4  # nobody told this one: a miss, and known from now on
        assert not any(self.store.contains([make_key(number) for number in range(4)]))
        other.close()

    def test_both_write_the_same_block_at_once(self):
        other = self.open_store(self.medium, self.make_context())
        self._write(range(5))
        self._write(range(5), other)
        for store in (self.store, other):
            store.refresh()
            store.catalogue.check_invariants()
            buffers = self.buffers(5)
            assert all(store.read_into([make_key(number) for number in range(5)], buffers))
        other.close()

    def test_garbage_in_the_bucket_is_left_alone(self):
        paths = ["suite/v1/what", "suite/v1/0/1/2", f"suite/v1/{'0' * 12}-{'1' * 8}-{'2' * 6}/{'a' * 32}/!!"]
        for path in paths:
            self.raw.write(path, b"x" * 100)
        self._write([1])
        self.store.refresh()
        assert self._read([1]) == [self.payload(1)]
        assert self.store.catalogue.num_packs == 1
        assert set(paths) < set(self.raw.paths())

    def test_a_pack_of_another_size_than_its_name_says_is_not_offered(self):
        name = PackName("0" * 12 + "-" + "1" * 8 + "-" + "2" * 6, self.store._fingerprint, (digest_of(make_key(1)),))
        self.raw.write(name.path("suite/v1"), b"short")
        other = self.open_store(self.medium, self.make_context())
        assert list(other.contains([make_key(1)])) == [False]
        assert other.catalogue.total_bytes == 5
        other.close()

    def test_an_object_that_vanished_is_absent_and_forgotten(self):
        self._write(range(3))
        self.raw.remove()
        assert self._read(range(3)) == [None] * 3
        assert self.context.failures.take() == {FailureCause.ABSENT: 3}
        assert not any(self.store.contains([make_key(number) for number in range(3)]))

    def test_a_bucket_that_is_lost_in_a_clean_up_costs_no_good_block(self, monkeypatch):
        self._write([1, 2])
        raw = self.peek(self.store, make_key(1))
        self.plant(self.store, make_key(1), flip_bit(raw, 8 * HEADER_BYTES))

        def fail(*body):
            error = RequestError(Trouble.FAILED, "no connection")
            for _ in range(3):
                self.store._refresher.note(error)
            raise error

        monkeypatch.setattr(self.store.client, "put", fail)
        assert self._read([1, 2]) == [None, self.payload(2)]
        assert self.context.failures.take() == {FailureCause.CORRUPT: 1}
        with pytest.raises(StoreUnavailableError, match="no connection"):
            self.store.contains([make_key(2)])

    def test_what_others_delete_is_noticed_though_the_clock_was_set_back(self, monkeypatch):
        name = PackName("0" * 12 + "-" + "1" * 8 + "-" + "2" * 6, self.store._fingerprint, (digest_of(make_key(1)),))
        self.raw.write(name.path("suite/v1"), bytes(HEADER_BYTES + self.block_bytes))
        other = self.open_store(self.medium, self.make_context())
        wait_for(lambda: list(other.contains([make_key(1)])) == [True], "the pack is listed")

        class ADayBack:
            """The clock of a host that was set back by a day, and an hour later."""

            time = staticmethod(lambda: time.time() - 86400)
            monotonic = staticmethod(lambda: time.monotonic() + 3600)

        monkeypatch.setattr(refresher, "time", ADayBack)
        self.raw.remove(name.path("suite/v1"))
        wait_for(lambda: list(other.contains([make_key(1)])) == [False], "the pack is forgotten")
        other.close()

    def test_names_fit_every_store(self):
        self._write(range(64))
        (path,) = self.raw.paths()
        assert len(path) <= 1024 - 200
        assert max(map(len, path.split("/"))) <= 200


class TestSmallPacks(OnBucket):
    """A pack for a block."""

    def open_store(self, medium, context):
        return open_over(self.raw.bucket, context, pack_size=8192)

    def test_a_block_larger_than_a_pack_has_its_own(self):
        self._write(range(3))
        assert len(self.raw.paths()) == 3

    def test_a_listing_reads_several_packs_at_once(self, monkeypatch):
        self._write(range(12))
        get, running, peaks = self.store.client.get, [], [0]

        def slow(*place):
            running.append(place)
            peaks.append(len(running))
            wait_for(lambda: max(peaks) >= 4, "other requests")
            running.remove(place)
            return get(*place)

        monkeypatch.setattr(self.store.client, "get", slow)
        assert set(self.store.list_keys(b"", 450).keys) == {make_key(number) for number in range(12)}

    def test_a_page_that_takes_long_ends_early(self, monkeypatch):
        self._write(range(40))
        now, get = [0.0], self.store.client.get

        def slow(*place):
            now[0] += 0.5
            return get(*place)

        monkeypatch.setattr(self.store.client, "get", slow)
        monkeypatch.setattr("kvtier.stores.object.store.time", SimpleNamespace(monotonic=lambda: now[0]))
        found, cursor = [], b""
        while cursor is not None:
            page = self.store.list_keys(cursor, 450)
            assert len(page.keys) < 20
            found, cursor = [*found, *page.keys], page.cursor
        assert sorted(found) == sorted(make_key(number) for number in range(40))

    @pytest.mark.parametrize("num_written", [0, 2])
    def test_a_bucket_that_is_lost_in_a_write_costs_no_stored_block(self, monkeypatch, num_written):
        put, tried = self.store.client.put, []

        def fail_later(path, body):
            tried.append(path)
            if len(tried) <= num_written:
                return put(path, body)
            error = RequestError(Trouble.FAILED, "no connection")
            for _ in range(3):
                self.store._refresher.note(error)
            raise error

        monkeypatch.setattr(self.store.client, "put", fail_later)
        keys, payloads = [make_key(number) for number in range(4)], [memoryview(self.payload(1))] * 4
        if num_written:
            assert self.store.write(keys, payloads) == [True, True, False, False]
        with pytest.raises(StoreUnavailableError, match="no connection"):
            self.store.write(keys, payloads)
        assert len(tried) == num_written + 1
        causes = {FailureCause.IO_ERROR: 1, FailureCause.UNREACHABLE: 3 - num_written}
        assert self.context.failures.take() == causes

    def test_a_page_looks_at_few_of_many_packs(self):
        self._write(range(40))
        later = self.store.catalogue.after("", 5)
        assert len(later) == 5
        assert self.store.catalogue.after(later[-1][0].stamp, 100)[0][0].stamp > later[-1][0].stamp


class TestCapacity:
    """Several instances over one bucket, never above its capacity."""

    @pytest.fixture
    def suite(self):
        suite = OnBucket()
        suite.raw = Raw(MemoryStore())
        return suite

    def open(self, suite, capacity, **options):
        return open_over(suite.raw.bucket, suite.make_context(), capacity=capacity, refresh=3600, **options)

    def write(self, suite, store, numbers):
        payloads = [memoryview(suite.payload(number)) for number in numbers]
        return store.write([make_key(number) for number in numbers], payloads)

    @pytest.mark.parametrize("instances", [1, 3])
    def test_the_sum_of_all_writers_stays_below_the_capacity(self, suite, instances):
        capacity, overlap = 1 << 20, 0.0  # one clock, and a listing that is never late
        stores = [self.open(suite, capacity, pack_size=8192, overlap_seconds=overlap) for _ in range(instances)]
        written = 0
        for turn in range(120):
            for index, store in enumerate(stores):
                first = (turn * instances + index) * 4
                written += sum(self.write(suite, store, range(first, first + 4)))
                assert sum(suite.raw.sizes().values()) <= capacity
            for store in stores:
                store._refresher._step()
        assert written * 8320 > 2 * capacity
        total = sum(suite.raw.sizes().values())
        assert total > capacity // 2
        for store in stores:
            store.refresh()
            store._refresher._rescan()
            assert store.catalogue.total_bytes == total
            store.catalogue.check_invariants()
            store.close()

    def test_the_oldest_leave(self, suite):
        store = self.open(suite, 1 << 20, pack_size=8192)
        for first in range(0, 400, 2):
            self.write(suite, store, [first, first + 1])
            store._refresher._step()
        held = store.contains([make_key(number) for number in range(400)])
        assert not any(held[:200])
        assert all(held[-90:])
        store.close()

    def fill(self, suite, store, numbers):
        """Write so many blocks, a pack each, and let the store make room meanwhile."""
        for number in numbers:
            self.write(suite, store, [number])
            store._refresher._step()
        store.catalogue.check_invariants()

    def held(self, store, numbers):
        return [number for number in numbers if store.contains([make_key(number)]) == [True]]

    def test_what_is_kept_outlasts_what_is_newer(self, suite):
        store = self.open(suite, 1 << 20, pack_size=8192)
        self.fill(suite, store, range(50))
        assert store.keep([make_key(number) for number in (3, 777, 9)], 60.0) == [True, False, True]
        self.fill(suite, store, range(100, 400))
        assert self.held(store, range(50)) == [3, 9]
        buffers = suite.buffers(2)
        assert store.read_into([make_key(3), make_key(9)], buffers) == [True, True]
        assert [bytes(buffer) for buffer in buffers] == [suite.payload(3), suite.payload(9)]
        store.close()

    def test_what_was_kept_leaves_when_its_time_is_over(self, suite, monkeypatch):
        store = self.open(suite, 1 << 20, pack_size=8192)
        self.fill(suite, store, range(50))
        store.keep([make_key(3)], 60.0)
        store.keep([make_key(9)], 600.0)
        later = SimpleNamespace(monotonic=lambda: time.monotonic() + 61, time=time.time)
        monkeypatch.setattr(refresher, "time", later)
        self.fill(suite, store, range(100, 400))
        assert self.held(store, range(50)) == [9]
        store.close()

    def test_half_of_the_space_is_kept_at_most_and_of_one_call_the_head(self, suite):
        store = self.open(suite, 1 << 20, pack_size=8192)
        self.fill(suite, store, range(100))
        assert all(store.keep([make_key(number) for number in range(100)], 60.0))
        self.fill(suite, store, range(100, 400))
        held = self.held(store, range(100))
        assert held == list(range(len(held)))
        assert 7 / 16 * (1 << 20) - 8320 < len(held) * 8320 <= 7 / 16 * (1 << 20)
        assert self.held(store, range(350, 400)) == list(range(350, 400))
        store.close()

    def test_a_kept_block_that_is_written_again_stays_kept(self, suite):
        store = self.open(suite, 1 << 20, pack_size=8192)
        self.write(suite, store, [3])
        store.keep([make_key(3)], 60.0)
        self.write(suite, store, [3])
        self.fill(suite, store, range(100, 400))
        assert self.held(store, [3]) == [3]
        store.close()

    def test_what_is_kept_in_vain_is_gone(self, suite):
        """Of blocks that are deleted, by this instance or another one, nothing is kept."""
        store, other = (self.open(suite, 1 << 20, pack_size=8192) for _ in range(2))
        self.fill(suite, store, range(4))
        keys = [make_key(number) for number in range(4)]
        assert all(store.keep(keys, 60.0))
        store.delete(keys[:1])
        other.refresh()
        other.delete(keys[1:2])
        store._refresher._rescan()
        store._refresher._look_at_head()
        assert store.read_into(keys, suite.buffers(4)) == [False, False, True, True]
        assert store.keep(keys, 60.0) == [False, False, True, True]
        for one in (store, other):
            one.close()

    def test_a_pack_is_kept_for_the_time_asked_beyond_its_ttl_and_not_again(self, suite, monkeypatch):
        store = self.open(suite, 1 << 20, pack_size=8192, ttl=60)
        self.write(suite, store, [1])
        self.write(suite, store, [2])
        assert store.keep([make_key(1)], 30.0) == [True]

        def at(seconds):
            """Let the store live so many seconds later."""
            clock = SimpleNamespace(monotonic=lambda: time.monotonic() + seconds, time=lambda: time.time() + seconds)
            monkeypatch.setattr(refresher, "time", clock)
            monkeypatch.setattr("kvtier.stores.object.store.time", clock)
            store._refresher._make_room()

        at(20)
        assert store.keep([make_key(1)], 60.0) == [True]
        at(70)
        assert self.held(store, [1, 2]) == [1]
        assert store.keep([make_key(1)], 60.0) == [True]
        at(90)
        assert self.held(store, [1, 2]) == []
        store.close()

    def test_two_that_delete_at_once_leave_as_much_as_one(self, suite):
        stores = [self.open(suite, 1 << 20, pack_size=8192) for _ in range(2)]
        first = 0
        while all(self.write(suite, stores[0], [first, first + 1])) or stores[0].catalogue.total_bytes < 1_000_000:
            first += 2
            stores[0]._refresher.refresh()
        stores[1].refresh()
        victims = [store.catalogue.oldest(int((1 << 20) * 7 / 8)) for store in stores]
        assert [pack.path for pack in victims[0]] == [pack.path for pack in victims[1]]
        for store, packs in zip(stores, victims, strict=True):
            store._refresher._delete(packs)
        total = sum(suite.raw.sizes().values())
        assert (1 << 20) * 7 / 8 - 3 * 8320 < total <= (1 << 20) * 7 / 8
        for store in stores:
            store.close()

    def test_a_full_store_refuses_and_says_why(self, suite):
        store = self.open(suite, 1 << 20, pack_size=8192)
        context_failures = store._failures
        while self.write(suite, store, [1, 2]) == [True, True]:
            pass
        assert FailureCause.NO_SPACE in context_failures.take()
        store.close()

    def test_what_is_too_old_is_deleted(self, suite):
        store = self.open(suite, 1 << 20, ttl=60)
        old = PackName("0" * 12 + "-" + "1" * 8 + "-" + "2" * 6, "a" * 32, (1,)).path("suite/v1")
        suite.raw.write(old, b"x" * 100)
        self.write(suite, store, [1])
        store._refresher._rescan()
        store._refresher._make_room() if store._refresher._is_my_turn() else store._refresher._delete(
            store.catalogue.oldest(1 << 20, "0" * 11 + "1")
        )
        assert old not in suite.raw.paths()
        assert len(suite.raw.paths()) == 1
        store.close()
