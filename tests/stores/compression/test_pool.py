"""The shipped suite on compressed blocks in a pool of Mooncake's: plain, and encrypted."""

import random
import uuid

import pytest
from compressed_blocks import CompressedBlocks, bfloat16
from guarded_stores import SECRET

from kvtier.abc import StoreContext
from kvtier.namespace import Namespace
from kvtier.stores.compression.store import CompressedStore
from kvtier.stores.integrity.header import ENCRYPTED_VERSION
from kvtier.stores.mooncake.store import MooncakeStore
from kvtier.testing.stores import StoreSuite, make_key
from kvtier.types import FailureCause


class Pooled(StoreSuite):
    def plant(self, store, key, raw):
        self.values.plant(store.name(key), raw)

    def peek(self, store, key):
        return self.values.peek(store.name(key))


class TestCompressed(CompressedBlocks, Pooled):
    keeps_failed_buffers = False
    store_class = MooncakeStore
    cause_when_off = FailureCause.CORRUPT
    """Mooncake itself refuses to read a value into memory of another length."""

    @pytest.fixture
    def secret(self):
        return {}

    @pytest.fixture(autouse=True)
    def _pool(self, mooncake_pool, mooncake_values, secret):
        self.values, self._master, self._prefix = mooncake_values, mooncake_pool.address, uuid.uuid4().hex
        self._secret = secret
        super().setup_method()
        yield
        super().teardown_method()

    def setup_method(self, method=None):
        """The pool comes as a fixture, after this."""

    def teardown_method(self, method=None):
        pass

    def options(self, medium):
        return {"master": self._master, "prefix": self._prefix, **self._secret}

    @property
    def seal_options(self):
        return self._secret.items()


@pytest.mark.parametrize("block_bytes", [64 << 10, 600_000])
def test_a_lost_host_is_not_taken_for_broken_blocks(make_pool, block_bytes):
    pool, keys = make_pool(), [make_key(number) for number in range(3)]
    context = StoreContext(Namespace({"dtype": "bfloat16"}), block_bytes)
    options = {"master": pool.address, "prefix": uuid.uuid4().hex, "compress": "zstd"}
    store = CompressedStore.over(MooncakeStore, options, context)
    try:
        payloads = [bfloat16(0, block_bytes), random.Random(1).randbytes(block_bytes), bfloat16(2, block_bytes)]
        assert all(store.write(keys, list(map(memoryview, payloads))))
        pool.kill_lender()
        assert store.read_into(keys, [memoryview(bytearray(block_bytes)) for _ in keys]) == [False] * 3
        assert FailureCause.CORRUPT not in context.failures.take()
    finally:
        store.close()


class TestEncrypted(TestCompressed):
    plain_version = ENCRYPTED_VERSION

    @pytest.fixture
    def secret(self, tmp_path):
        tmp_path.joinpath("secret").write_text(SECRET)
        return {"secret_file": str(tmp_path / "secret"), "encrypt": True}


class TestLarge(TestCompressed):
    block_bytes = 600_000

    def test_a_flipped_bit_is_a_miss(self):
        raw = bytearray(self._raw(1))
        raw[len(raw) // 2] ^= 1
        self.plant(self.store, make_key(1), bytes(raw))
        self._assert_lost(1, "flipped")
