"""Arenas in memory of somebody else's."""

import mmap
import os

import pytest

from kvtier.errors import ConfigError
from kvtier.primary.foreign_arena import ForeignArena

PAGE = mmap.PAGESIZE


@pytest.fixture
def file():
    """A file in memory of 10 pages and a half."""
    descriptor = os.memfd_create("somebody's")
    os.truncate(descriptor, 10 * PAGE + PAGE // 2)
    yield descriptor
    os.close(descriptor)


def test_its_first_blocks_are_shared_and_nothing_behind_them_is_written(file):
    content = bytes(range(256)) * (os.fstat(file).st_size // 256)
    os.pwrite(file, content, 0)
    with ForeignArena.attach(file, 5, 2 * PAGE) as arena, ForeignArena.attach(file, 5, 2 * PAGE) as another:
        assert arena.view.shape == (5, 2 * PAGE)
        assert arena.view.tobytes() == content[: 10 * PAGE]
        arena.row(3)[:] = b"x" * 2 * PAGE
        assert bytes(another.row(3)) == b"x" * 2 * PAGE
    assert os.pread(file, len(content), 0) == content[: 6 * PAGE] + b"x" * 2 * PAGE + content[8 * PAGE :]


def test_a_file_that_is_too_short_is_refused(file):
    for num_blocks, block_bytes in ((6, 2 * PAGE), (0, PAGE), (11, PAGE)):
        with pytest.raises(ConfigError, match="arena_fd"):
            ForeignArena.attach(file, num_blocks, block_bytes)


def test_it_closes_its_own_descriptor_only(file):
    arena = ForeignArena.attach(file, 5, 2 * PAGE)
    own = arena.fd
    arena.close()
    arena.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(own)
    os.fstat(file)
