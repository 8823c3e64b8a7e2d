"""The shipped suite on a real server, over each way to reach one."""

import pytest
from guarded_stores import Guarded

from kvtier.stores.resp.options import RespOptions
from kvtier.stores.resp.store import RespStore
from kvtier.testing.stores import StoreSuite, flip_bit, make_key
from kvtier.types import FailureCause


def open_store(context, url, **options):
    return RespStore.open({"url": url, **options}, context)


class OnServer(StoreSuite):
    keeps_failed_buffers = False  # a payload is verified where it belongs

    @pytest.fixture(autouse=True)
    def _server(self, valkey):
        self.server = valkey
        self.connect()
        yield
        self.disconnect()

    def setup_method(self, method=None):
        """The server comes as a fixture, after this."""

    def teardown_method(self, method=None):
        pass

    def connect(self):
        self.client = self.server.client()
        super().setup_method()

    def disconnect(self):
        super().teardown_method()
        self.client.close()

    def open_store(self, medium, context):
        return open_store(context, self.server.url)

    def plant(self, store, key, raw):
        self.client.set(store.name(key), raw)

    def peek(self, store, key):
        return self.client.get(store.name(key))


class TestSingle(OnServer):
    def test_what_is_held_is_named_by_prefix_namespace_and_key(self):
        self._write([1])
        assert self.client.keys() == [self.store.name(make_key(1))]
        prefix, namespace, key = self.client.keys()[0].decode().split(":")
        assert (prefix, namespace, key) == ("kvtier", self.context.namespace.fingerprint.hex(), make_key(1).hex())

    @pytest.mark.parametrize("step", [1, 3, 50, 1000])
    def test_existence_of_many(self, step):
        keys = [make_key(number) for number in range(203)]
        for key in keys[::step]:
            self.client.set(self.store.name(key), b"anything")
        assert self.store.contains(keys) == [number % step == 0 for number in range(203)]

    def test_a_block_lives_as_long_as_configured(self):
        store = open_store(self.context, self.server.url, ttl=90)
        self._write([1], store)
        assert 60_000 < self.client.pttl(store.name(make_key(1))) <= 90_000
        store.close()

    def test_prefixes_keep_engines_apart(self):
        store = open_store(self.context, self.server.url, prefix="another")
        self._write([1], store)
        assert self._read([1]) == [None]
        assert list(store.contains([make_key(1)])) == [True]
        store.close()

    def test_a_value_far_too_long_costs_only_itself(self):
        self._write(range(6))
        self.plant(self.store, make_key(2), bytes(1 << 20))
        assert self._read(range(6)) == [None if number == 2 else self.payload(number) for number in range(6)]
        assert self.context.failures.take() == {FailureCause.CORRUPT: 1}
        assert self.peek(self.store, make_key(2)) is None

    def test_another_kind_of_value_is_corrupt(self):
        self._write([1, 3])
        self.client.lpush(self.store.name(make_key(2)), "what", "is", "this")
        assert self._read([1, 2, 3]) == [self.payload(1), None, self.payload(3)]
        assert self.context.failures.take() == {FailureCause.CORRUPT: 1}
        assert not self.client.exists(self.store.name(make_key(2)))


class TestOnTwoConnections(OnServer):
    """Blocks so large that each is a batch: a call of several goes over two connections."""

    block_bytes = 300_000

    def _connections(self):
        """Return the ids of the store's connections."""
        ours = self.client.client_id()
        return sorted({int(client["id"]) for client in self.client.client_list()} - {ours})

    def test_a_call_uses_two_connections_if_there_is_enough_for_both(self):
        self._write([1])
        assert len(self._connections()) == 1
        self._write(range(6))
        assert len(self._connections()) == 2
        assert self._read(range(6)) == [self.payload(number) for number in range(6)]
        assert len(self._connections()) == 2

    def test_absent_and_corrupt_blocks_between_others_cost_only_themselves(self):
        self._write(range(9))
        self.client.delete(self.store.name(make_key(3)), self.store.name(make_key(8)))
        self.plant(self.store, make_key(4), flip_bit(self.peek(self.store, make_key(4)), 77))
        self.plant(self.store, make_key(5), b"short")
        assert self._read(range(9)) == [None if number in (3, 4, 5, 8) else self.payload(number) for number in range(9)]
        assert self.context.failures.take() == {FailureCause.ABSENT: 2, FailureCause.CORRUPT: 2}

    @pytest.mark.parametrize("lost", [0, 1])
    def test_a_lost_connection_costs_no_block(self, lost):
        self._write(range(6))
        self.client.client_kill_filter(_id=self._connections()[lost])
        self._write(range(6, 12))
        assert self._read(range(12)) == [self.payload(number) for number in range(12)]
        assert self.context.failures.take() == {}


@pytest.mark.parametrize(
    ("options", "threads", "per_call"),
    [
        ({}, 4, 2),
        ({"connections": 1}, 1, 1),
        ({"connections": 3}, 3, 1),
        ({"connections": 5}, 2, 2),
        ({"compress": "zstd"}, 8, 1),
        ({"secret_env": "SECRET"}, 8, 1),
        ({"cluster": True}, 8, 1),
        ({"url": "rediss://host"}, 8, 1),
    ],
)
def test_where_bytes_take_processor_time_each_connection_has_a_thread(options, threads, per_call):
    read = RespOptions.read({"url": "redis://host", **options})
    assert (read.threads, read.connections_per_call) == (threads, per_call)


class TestWithSecret(Guarded, OnServer):
    def open_with(self, medium, context, options):
        return RespStore.open({"url": self.server.url, **options}, context)


class TestEncrypted(TestWithSecret):
    encrypt = True


class TestEncryptedOverUnixSocket(TestWithSecret):
    """And of blocks that are larger than the pieces in which they pass."""

    encrypt = True
    block_bytes = 300_000

    def open_with(self, medium, context, options):
        return RespStore.open({"url": f"unix://{self.server.unix_path}", **options}, context)

    def test_a_flipped_bit_is_a_miss(self):
        raw = self._raw(1)
        for bit in (0, 8 * 64, 4 * len(raw), 8 * len(raw) - 1):
            self.plant(self.store, make_key(1), flip_bit(raw, bit))
            self._assert_lost(1, f"flipped at bit {bit}")


class TestDatabase(OnServer):
    def open_store(self, medium, context):
        return open_store(context, self.server.url + "/3")

    def connect(self):
        super().connect()
        self.client.close()
        self.client = self.server.client(db=3)


class TestUnixSocket(OnServer):
    def open_store(self, medium, context):
        return open_store(context, f"unix://{self.server.unix_path}")


class TestLargeBlocks(OnServer):
    """Larger than the pieces that are sent, received and summed at once, and no multiple of them."""

    block_bytes = 300_000

    def test_a_flipped_bit_is_a_miss(self):
        raw = self._raw(1)
        for bit in (0, 8 * 64, 8 * 200, 4 * len(raw), 8 * len(raw) - 1):
            changed = bytearray(raw)
            changed[bit // 8] ^= 1
            self.plant(self.store, make_key(1), bytes(changed))
            self._assert_lost(1, f"flipped at bit {bit}")

    def test_misses_stop_no_later_batch(self):
        keys = [make_key(number) for number in range(9)]
        payloads = [memoryview(bytes([number]) * self.block_bytes) for number in range(9)]
        assert all(self.store.write(keys[1::2], payloads[1::2]))
        self.plant(self.store, keys[4], b"no block")
        buffers = [memoryview(bytearray(self.block_bytes)) for _ in keys]
        assert self.store.read_into(keys, buffers) == [number % 2 == 1 for number in range(9)]
        assert buffers[1::2] == payloads[1::2]


class TestCluster(OnServer):
    @pytest.fixture(autouse=True)
    def _server(self, valkey_cluster):
        self.cluster = valkey_cluster
        self.connect()
        yield
        self.disconnect()

    def connect(self):
        from redis.cluster import ClusterNode, RedisCluster

        nodes = [ClusterNode(*node.address) for node in self.cluster.nodes]
        self.client = RedisCluster(startup_nodes=nodes)
        StoreSuite.setup_method(self)

    def open_store(self, medium, context):
        return open_store(context, self.cluster.urls[0], cluster=True)

    def test_every_node_has_its_share(self):
        self._write(range(60))
        assert all(node.command("DBSIZE") >= 5 for node in self.cluster.nodes)
