"""The shipped suites on stores whose blocks a secret guards, or encrypts; and forgers who have everything but it.

Servers are in `test_resp_store.py`; files that are vouched for and not encrypted in `test_secrets.py`.
"""

import pytest
import slab_files
from file_blocks import FileBlocks
from guarded_stores import ANOTHER, Guarded, forgeries, secret_options
from object_buckets import Raw, settings_for
from obstore.store import MemoryStore as Bucket

from kvtier.abc import StoreContext
from kvtier.errors import StoreUnavailableError
from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.stores.filesystem.store import FilesystemStore
from kvtier.stores.integrity import open_sealer
from kvtier.stores.integrity.checked_store import CheckedStore
from kvtier.stores.integrity.header import header_checksum
from kvtier.stores.integrity.sealing import MAX_SCRATCH_BYTES
from kvtier.stores.memory import MemoryStore
from kvtier.stores.object.client import Client
from kvtier.stores.object.store import ObjectStore
from kvtier.stores.slab import SlabStore
from kvtier.testing.slot_stores import SlotStoreSuite
from kvtier.testing.stores import StoreSuite, make_key, make_payload


class OnFiles(FileBlocks, Guarded, StoreSuite):
    keeps_failed_buffers = False

    def open_with(self, medium, context, options):
        return FilesystemStore.open({"path": str(medium / "shared"), "capacity": 64 << 20, **options}, context)


class TestEncryptedFiles(OnFiles):
    encrypt = True


class TestEncryptedFilesOfOddLength(OnFiles):
    encrypt = True
    block_bytes = 5001


class SharedMemory(MemoryStore):
    """A store of opaque values, as somebody writes it; stores of one namespace share their values."""

    def __init__(self, shared, prefix):
        super().__init__(64 << 20)
        self._shared, self._prefix = shared, prefix

    @classmethod
    def open(cls, options, context):
        assert options.keys() == {"shared"}, "what is the seal's is not for the store"
        return cls(options["shared"], context.namespace.fingerprint)

    def _named(self, keys):
        return [OffloadKey(self._prefix + key) for key in keys]

    def contains(self, keys):
        return self._shared.contains(self._named(keys))

    def write(self, keys, buffers):
        return self._shared.write(self._named(keys), buffers)

    def read_into(self, keys, buffers):
        return self._shared.read_into(self._named(keys), buffers)

    def delete(self, keys):
        self._shared.delete(self._named(keys))

    def keep(self, keys, seconds):
        return self._shared.keep(self._named(keys), seconds)

    def list_keys(self, cursor, most):
        return None  # as a store that cannot


class OnSealed(Guarded, StoreSuite):
    header_first = True

    def setup_method(self, method=None):
        self.shared = MemoryStore(64 << 20)
        super().setup_method(method)

    def open_with(self, medium, context, options):
        return CheckedStore.over(SharedMemory, {"shared": self.shared, **options}, context)

    def plant(self, store, key, raw):
        self.shared.write(store.inner._named([key]), [memoryview(raw)])

    def peek(self, store, key):
        return self.shared.snapshot().get(store.inner._named([key])[0])


class TestSealedWithSecret(OnSealed):
    pass


class TestSealedAndEncrypted(OnSealed):
    encrypt = True


class OnBucket(Guarded, StoreSuite):
    header_first = True

    def setup_method(self, method=None):
        self.raw = Raw(Bucket())
        super().setup_method(method)

    def open_with(self, medium, context, options):
        settings = settings_for()
        _, sealer = open_sealer(options, context.namespace)
        store = ObjectStore(Client(self.raw.bucket, settings.where), settings, context, sealer)
        store.start()
        return store

    def plant(self, store, key, raw):
        if self.raw.plant(store.catalogue, key, raw, store._fingerprint, self.block_bytes):
            store.refresh()

    def peek(self, store, key):
        return self.raw.peek(store.catalogue, key, self.block_bytes)


class TestBucketWithSecret(OnBucket):
    pass


class TestBucketEncrypted(OnBucket):
    encrypt = True


class OnSlab(SlotStoreSuite):
    encrypt = False

    def open_store(self, medium, context):
        return slab_files.open_slab(medium / "slab", context, **secret_options(medium, self.encrypt))

    def _file(self, store, name):
        return store._directory.namespace_path / name

    def plant(self, store, slot, raw):
        slab_files.write_at(self._file(store, "data-00000"), slot * self.block_bytes, raw)

    def peek(self, store, slot):
        return slab_files.read_at(self._file(store, "data-00000"), slot * self.block_bytes, self.block_bytes)

    def plant_record(self, store, slot, raw):
        slab_files.write_at(self._file(store, "headers"), slot * 128, raw)

    def peek_record(self, store, slot):
        return slab_files.read_at(self._file(store, "headers"), slot * 128, 128)

    def test_what_was_written_is_read(self):
        self._write([3])
        assert self._read([3]) == [self.payload(3)]
        assert (self.peek(self.store, 3) == self.payload(3)) is not self.encrypt
        assert not self.context.failures.take()

    def test_blocks_cannot_be_forged_without_the_secret(self):
        self._write([1])
        record, namespace = self.peek_record(self.store, 1), self.store._sealer.namespace
        for number, (payload, forged) in enumerate(forgeries(namespace, make_key(1), self.payload(666), record, 1)):
            self.plant(self.store, 1, payload)
            self.plant_record(self.store, 1, forged)
            self._assert_lost(1, f"forgery {number}")

    def test_a_block_moved_to_another_slot_or_key_is_a_miss_and_an_old_one_of_its_own_a_hit(self):
        self._write([1, 2])
        old = self.peek(self.store, 1), self.peek_record(self.store, 1)
        record = self.peek_record(self.store, 2)
        moved = record[:12] + old[1][12:16] + record[16:52] + old[1][52:120]
        self.plant(self.store, 1, self.peek(self.store, 2))
        self.plant_record(self.store, 1, moved + header_checksum(moved).to_bytes(8, "little"))
        self._assert_lost(1, "another block under its own name")
        self._write([1], [7])
        self.plant(self.store, 1, old[0])
        self.plant_record(self.store, 1, old[1])
        assert self._read([1]) == [self.payload(1)]

    def test_a_forged_record_of_the_last_sequence_stops_nobody(self):
        self._write([1])
        record = self.peek_record(self.store, 1)
        last = record[:6] + b"\xff" * 6 + record[12:120]
        self.plant_record(self.store, 1, last + header_checksum(last).to_bytes(8, "little"))
        self._reopen()
        self._write([2, 3])
        assert self._read([1, 2, 3]) == [None, self.payload(2), self.payload(3)]

    def test_another_secret_or_none_sees_nothing_and_spoils_nothing(self):
        self._write([1])
        self.store.close()
        for more in (
            {},
            secret_options(self.medium, self.encrypt, ANOTHER),
            secret_options(self.medium, not self.encrypt),
        ):
            other = slab_files.open_slab(self.medium / "slab", self.context, **more)
            assert slab_files.recovered(other) == {}
            assert list(other.read_into([1], [make_key(1)], self.buffers(1))) == [False]
            other.close()
        self.context.failures.take()
        self.store = self._open(self.context)
        assert self.recovered == {1: make_key(1)}
        assert self._read([1]) == [self.payload(1)]


class TestSlabWithSecret(OnSlab):
    pass


class TestSlabEncrypted(OnSlab):
    encrypt = True

    def test_every_writing_is_another(self):
        stored = set()
        for _ in range(3):
            self._write([1, 2], [1, 1])
            stored |= {self.peek(self.store, slot) for slot in (1, 2)}
        assert len(stored) == 6


class TestSlabEncryptedOfUnalignedBlocks(TestSlabEncrypted):
    block_bytes = 8192 - 96


def test_runs_of_encrypted_blocks_longer_than_private_memory(tmp_path):
    block_bytes = 1 << 20
    context = slab_files.make_context(block_bytes=block_bytes)
    store = slab_files.open_slab(tmp_path / "slab", context, 64 << 20, **secret_options(tmp_path, True))
    slots, keys = list(range(20)), [make_key(number) for number in range(20)]
    payloads = [make_payload(number, block_bytes) for number in range(20)]
    assert len(slots) * block_bytes > MAX_SCRATCH_BYTES
    assert list(store.write(slots, keys, [memoryview(payload) for payload in payloads])) == [True] * 20
    assert 1 <= len(store._sealer._scratch.spacious) <= MAX_SCRATCH_BYTES // block_bytes
    buffers = [memoryview(bytearray(block_bytes)) for _ in slots]
    assert list(store.read_into(slots[::-1], keys[::-1], buffers)) == [True] * 20
    assert [bytes(buffer) for buffer in buffers] == payloads[::-1]
    assert len(store._sealer._scratch.spacious) == 1, "a block fills the processor's cache"
    store.close()


def test_encrypting_without_a_secret_stores_nothing(tmp_path):
    context = StoreContext(Namespace({"model": "m"}), 8192)
    with pytest.raises(StoreUnavailableError, match="encrypt"):
        SlabStore.open({"path": str(tmp_path / "slab"), "capacity": 1 << 20, "encrypt": True}, context)
    assert not (tmp_path / "slab").exists()


def test_direct_io_goes_past_the_page_cache_still(tmp_path):
    context = slab_files.make_context()
    plain = slab_files.open_slab(tmp_path / "plain", context)
    store = slab_files.open_slab(tmp_path / "slab", context, **secret_options(tmp_path, True))
    payload = memoryview(make_payload(1, 8192))
    for each in (plain, store):
        assert each.write([0, 1], [make_key(0), make_key(1)], [payload, payload]) == [True, True]
    assert store.direct == plain.direct
    for each in (plain, store):
        each.close()
