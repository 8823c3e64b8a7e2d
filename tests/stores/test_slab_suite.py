import tempfile
from pathlib import Path

import pytest
import slab_files

from kvtier.testing.slot_stores import SlotStoreSuite


class SlabSuite(SlotStoreSuite):
    def open_store(self, medium, context):
        return slab_files.open_slab(medium / "slab", context)

    def plant(self, store, slot, raw):
        path = slab_files.segment_file(self.medium / "slab", self.context)
        slab_files.write_at(path, slot * self.block_bytes, raw)

    def peek(self, store, slot):
        path = slab_files.segment_file(self.medium / "slab", self.context)
        return slab_files.read_at(path, slot * self.block_bytes, self.block_bytes)

    def plant_record(self, store, slot, raw):
        slab_files.write_at(slab_files.headers_file(self.medium / "slab", self.context), slot * 128, raw)

    def peek_record(self, store, slot):
        return slab_files.read_at(slab_files.headers_file(self.medium / "slab", self.context), slot * 128, 128)


class TestSlabOnDisk(SlabSuite):
    pass


class TestSlabOfUnalignedBlocks(SlabSuite):
    """Blocks that direct I/O cannot take."""

    block_bytes = 5000


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs at /dev/shm")
class TestSlabOnTmpfs(SlabSuite):
    def make_medium(self):
        return Path(tempfile.mkdtemp(prefix="kvtier-suite-", dir="/dev/shm"))
