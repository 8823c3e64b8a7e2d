"""The shipped suite on compressed blocks in a real server: plain, larger than a send call, and encrypted."""

import random

from compressed_blocks import CompressedBlocks
from guarded_stores import secret_options
from test_resp_store import OnServer

from kvtier.stores.integrity.header import ENCRYPTED_VERSION
from kvtier.stores.resp.store import RespStore
from kvtier.testing.stores import flip_bit, make_key


class TestCompressed(CompressedBlocks, OnServer):
    store_class = RespStore

    def options(self, medium):
        return {"url": self.server.url}

    def test_lengths_may_change_within_a_batch(self):
        blocks = [self.payload(n) if n % 3 else random.Random(n).randbytes(self.block_bytes) for n in range(30)]
        keys = [make_key(number) for number in range(30)]
        assert all(self.store.write(keys, list(map(memoryview, blocks))))
        assert self._read(range(30)) == blocks


class TestLarge(TestCompressed):
    block_bytes = 900_000

    def test_a_flipped_bit_is_a_miss(self):
        raw = self._raw(1)
        for bit in (0, 8 * 64, 4 * len(raw), 8 * len(raw) - 1):
            self.plant(self.store, make_key(1), flip_bit(raw, bit))
            self._assert_lost(1, f"flipped at bit {bit}")


class TestEncrypted(TestCompressed):
    plain_version = ENCRYPTED_VERSION

    def options(self, medium):
        return {**super().options(medium), **secret_options(medium, True)}

    @property
    def seal_options(self):
        return secret_options(self.medium, True).items()
