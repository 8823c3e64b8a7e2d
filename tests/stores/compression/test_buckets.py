"""The shipped suite on compressed blocks in packs of a bucket: plain, and encrypted."""

import random

from compressed_blocks import CompressedBlocks
from guarded_stores import secret_options
from object_buckets import Raw, settings_for
from obstore.store import MemoryStore as Bucket

from kvtier.stores.integrity import open_sealer
from kvtier.stores.integrity.header import ENCRYPTED_VERSION, HEADER_BYTES
from kvtier.stores.object.client import Client
from kvtier.stores.object.names import PackName, digest_of
from kvtier.stores.object.store import ObjectStore
from kvtier.testing.stores import StoreSuite, make_key
from kvtier.types import FailureCause


class OverBucket(ObjectStore):
    """A store over a bucket in memory that its tests share."""

    bucket = None

    @classmethod
    def open(cls, options, context):
        _, sealer = open_sealer(options, context.namespace, context.whole_bytes)
        settings = settings_for()
        store = cls(Client(cls.bucket, settings.where), settings, context, sealer)
        store.start()
        return store


class Packed(StoreSuite):
    """A planted value gets a pack of its own."""

    def plant(self, store, key, raw):
        former = store.catalogue.find(digest_of(key))
        if former is not None:
            (count,) = {len(store.catalogue._digests(former.pack))}
            assert count == 1
            self.raw.write(former.pack.path, raw)
            if former.pack.size == len(raw):
                return
            self.raw.remove(former.pack.path)
            store.catalogue.forget([former.pack.stamp])
        self.raw.write(PackName(self.raw.stamps.make(), store._fingerprint, (digest_of(key),)).path("suite/v1"), raw)
        store.refresh()

    def peek(self, store, key):
        found = store.catalogue.find(digest_of(key))
        if found is None:
            return None
        start = found.place * found.value_bytes
        return self.raw.read(found.pack.path)[start : start + found.value_bytes]


class TestCompressed(CompressedBlocks, Packed):
    store_class = OverBucket
    header_first = True
    keeps_failed_buffers = False
    cause_when_off = FailureCause.ABSENT
    """Engines that expect whole values take no pack into their index whose size is another."""

    def setup_method(self, method=None):
        OverBucket.bucket = Bucket()
        self.raw = Raw(OverBucket.bucket)
        super().setup_method(method)

    def options(self, medium):
        return {}

    def _header(self, raw):
        return raw[:HEADER_BYTES]

    def _after_another_wrote(self):
        self.store.inner.refresh()

    def test_values_of_a_pack_take_the_space_of_its_longest(self):
        blocks = [self.payload(n) if n % 3 else random.Random(n).randbytes(self.block_bytes) for n in range(12)]
        keys = [make_key(number) for number in range(12)]
        assert all(self.store.write(keys, list(map(memoryview, blocks))))
        sizes = sorted(self.raw.sizes().values())
        assert len(sizes) == 2, "compressed blocks are kept apart from whole ones"
        assert self._read(range(12)) == blocks
        assert sum(sizes) == self.store.usage().bytes < 12 * self.block_bytes
        told = self.store.usage()
        assert told.unwritten_bytes == 12 * (self.block_bytes + HEADER_BYTES) - sum(sizes), "zeros at its end count"
        assert told.unread_bytes == told.unwritten_bytes
        self.store.inner.catalogue.check_invariants()
        with_off = OverBucket.open(self.options(self.medium), self.context)
        assert list(with_off.contains(keys)) == [number % 3 == 0 for number in range(12)]
        assert with_off.usage().bytes == sum(sizes), "what it cannot read counts, too"
        with_off.close()


class TestEncrypted(TestCompressed):
    plain_version = ENCRYPTED_VERSION

    def options(self, medium):
        return secret_options(medium, True)

    @property
    def seal_options(self):
        return secret_options(self.medium, True).items()
