"""The shipped suite on compressed blocks in files: plain, vouched for, and encrypted."""

import pytest
from compressed_blocks import CompressedBlocks, sealed
from file_blocks import FileBlocks
from guarded_stores import Guarded, secret_options

from kvtier.errors import StoreError, StoreUnavailableError
from kvtier.stores.filesystem.store import FilesystemStore
from kvtier.stores.integrity.header import ENCRYPTED_VERSION
from kvtier.testing.stores import StoreSuite, make_key
from kvtier.types import FailureCause


class TestCompressedFiles(CompressedBlocks, FileBlocks, StoreSuite):
    keeps_failed_buffers = False
    store_class = FilesystemStore

    def options(self, medium):
        return {"path": str(medium / "shared"), "capacity": 64 << 20}

    @pytest.mark.parametrize("error", [StoreError("not now"), StoreUnavailableError("gone")])
    def test_a_failed_clean_up_costs_no_good_block(self, error, monkeypatch):
        self._write([1, 2])
        stored, header = sealed(self.context, make_key(3), b"does not expand", self.seal_options)
        self.plant(self.store, make_key(3), stored + header)

        def fail(keys):
            assert list(keys) == [make_key(3)]
            raise error

        monkeypatch.setattr(self.store.inner, "delete", fail)
        assert self._read([1, 3, 2]) == [self.payload(1), None, self.payload(2)]
        assert self.context.failures.take() == {FailureCause.CORRUPT: 1}


class TestOddLength(TestCompressedFiles):
    block_bytes = 5001


class TestSecret(TestCompressedFiles):
    encrypt = False

    def options(self, medium):
        return {**super().options(medium), **secret_options(medium, self.encrypt)}

    @property
    def seal_options(self):
        return secret_options(self.medium, self.encrypt).items()

    def test_another_secret_or_none_sees_nothing_and_spoils_nothing(self):
        self._write([1])
        Guarded.test_another_secret_or_none_sees_nothing_and_spoils_nothing(self)

    def open_with(self, medium, context, options):
        return FilesystemStore.open({**TestCompressedFiles.options(self, medium), **options}, context)


class TestEncrypted(TestSecret):
    encrypt = True
    plain_version = ENCRYPTED_VERSION
