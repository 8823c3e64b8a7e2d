"""What every store must do whose blocks are compressed; shared by the suites of stores that can."""

import random

import numpy as np
import zstandard

from kvtier.abc import StoreContext
from kvtier.stores.compression.codec import BlockCodec
from kvtier.stores.compression.store import CompressedStore
from kvtier.stores.integrity import open_sealer
from kvtier.stores.integrity.header import COMPRESSED, HEADER_BYTES
from kvtier.testing.stores import make_key
from kvtier.types import FailureCause


def bfloat16(seed, num_bytes):
    """Return numbers as a cache has them."""
    values = np.random.default_rng(seed).standard_normal(num_bytes // 2 + 1).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()[:num_bytes]


def sealed(context, key, payload, options=()):
    """Return what a store keeps of any payload that is shorter than its block: stored bytes and header."""
    _, sealer = open_sealer(dict(options), context.namespace, context.block_bytes)
    (stored,), (header,) = sealer.seal([key], [memoryview(payload)])
    return bytes(stored), header


class CompressedBlocks:
    """Tests for a suite of stores by key; a class says which store it opens, with which `options`."""

    store_class = None
    header_first = False
    plain_version = 1
    seal_options = ()
    cause_when_off = FailureCause.OLD_FORMAT

    def options(self, medium):
        raise NotImplementedError

    def open_store(self, medium, context):
        return CompressedStore.over(self.store_class, {**self.options(medium), "compress": "zstd"}, context)

    def payload(self, number):
        return bfloat16(number, self.block_bytes)

    def plant(self, store, key, raw):
        super().plant(getattr(store, "inner", store), key, raw)

    def peek(self, store, key):
        return super().peek(getattr(store, "inner", store), key)

    def _header(self, raw):
        raw = raw.rstrip(b"\0") if self.header_first else raw
        return raw[:HEADER_BYTES] if self.header_first else raw[-HEADER_BYTES:]

    def test_less_is_stored_and_the_header_says_so(self):
        raw = self._raw(1)
        assert len(raw) < 0.9 * self.block_bytes
        assert self._header(raw)[4] == self.plain_version | COMPRESSED
        self._read([1, 1])
        told = self.store.usage()
        assert told.compressed_blocks == 1
        assert 0.1 * self.block_bytes < told.unwritten_bytes < self.block_bytes
        assert told.unread_bytes == 2 * told.unwritten_bytes

    def test_noise_is_stored_as_it_is(self):
        noise = random.Random(3).randbytes(self.block_bytes)
        assert self.store.write([make_key(1)], [memoryview(noise)]) == [True]
        raw = self.peek(self.store, make_key(1))
        assert len(raw) == self.block_bytes + HEADER_BYTES
        assert self._header(raw)[4] == self.plain_version
        assert self._read([1]) == [noise]
        assert self.store.usage().unwritten_bytes == self.store.usage().unread_bytes == 0

    def test_blocks_from_before_stay_readable(self):
        with_off = self.store_class.open(self.options(self.medium), self.context)
        self._write([1, 2], with_off)
        assert len(self.peek(with_off, make_key(1))) == self.block_bytes + HEADER_BYTES
        with_off.close()
        self._write([3])
        self._after_another_wrote()
        assert self._read([1, 2, 3]) == [self.payload(1), self.payload(2), self.payload(3)]

    def test_engines_that_do_not_compress_miss_compressed_blocks(self):
        self._write([1])
        context = StoreContext(self.context.namespace, self.block_bytes)
        with_off = self.store_class.open(self.options(self.medium), context)
        assert list(with_off.read_into([make_key(1)], self.buffers(1))) == [False]
        assert set(context.failures.take()) == {self.cause_when_off}
        with_off.close()

    def test_a_sealed_block_of_another_length_is_a_miss_where_none_is_compressed(self):
        context = StoreContext(self.context.namespace, self.block_bytes)
        with_off = self.store_class.open(self.options(self.medium), context)
        _, sealer = open_sealer(dict(self.seal_options), context.namespace)
        for payload_bytes in (1, self.block_bytes // 2, self.block_bytes - 1):
            (stored,), (header,) = sealer.seal([make_key(1)], [memoryview(self.payload(1)[:payload_bytes])])
            whole = (header + bytes(stored)).ljust(HEADER_BYTES + self.block_bytes, b"\0")
            self.plant(with_off, make_key(1), whole if self.header_first else bytes(stored) + header)
            assert list(with_off.read_into([make_key(1)], self.buffers(1))) == [False]
            assert set(context.failures.take()) <= {FailureCause.CORRUPT, FailureCause.ABSENT}
        with_off.close()

    def test_what_does_not_expand_is_a_miss_although_it_is_sealed(self):
        key, codec = make_key(1), BlockCodec(self.block_bytes, 2)
        room = memoryview(bytearray(codec.most_bytes))
        whole = bytes(room[: codec.compress(memoryview(self.payload(1)), room)])
        bomb = zstandard.compress(bytes(64 << 20), 1)[: self.block_bytes // 2]
        for number, payload in enumerate((whole[:-1], whole + b"\0", bytes(100), b"x", b"\1\0\0\0" + bomb, bomb)):
            self._plant_sealed(key, payload)
            self._assert_lost(1, f"bad content {number}")
        self._plant_sealed(key, whole)
        assert self._read([1]) == [self.payload(1)]

    def test_a_payload_of_a_whole_blocks_length_is_never_expanded(self):
        lookalike = b"\2\0\0\0" + bytes(self.block_bytes - 4)
        noise = bytearray(random.Random(5).randbytes(self.block_bytes))
        noise[:4] = lookalike[:4]
        assert self.store.write([make_key(1)], [memoryview(noise)]) == [True]
        assert self._read([1]) == [bytes(noise)]

    def _plant_sealed(self, key, payload):
        stored, header = sealed(self.context, key, payload, self.seal_options)
        self.plant(self.store, key, header + stored if self.header_first else stored + header)

    def _after_another_wrote(self):
        """Let the store learn of blocks that another engine has written."""
