"""The shipped suite on compressed blocks in files: plain, vouched for, and encrypted."""

from compressed_blocks import CompressedBlocks
from file_blocks import FileBlocks
from guarded_stores import Guarded, secret_options

from kvtier.stores.filesystem.store import FilesystemStore
from kvtier.stores.integrity.header import ENCRYPTED_VERSION
from kvtier.testing.stores import StoreSuite


class TestCompressedFiles(CompressedBlocks, FileBlocks, StoreSuite):
    keeps_failed_buffers = False
    store_class = FilesystemStore

    def options(self, medium):
        return {"path": str(medium / "shared"), "capacity": 64 << 20}


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
