"""The arena: shape, sharing between processes, refusal, and its end."""

import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from kvtier.errors import CapacityError, ConfigError
from kvtier.primary.arena import Arena, align_block_bytes, arena_rows
from kvtier.primary.control_page import MAX_RANKS, ControlPage
from kvtier.primary.huge_pages import HugePages

PAGE = mmap.PAGESIZE


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena.create(8, 2 * PAGE, huge_pages=HugePages.OFF) as arena:  # files of reserved pages are longer
        yield arena


def test_shape_and_alignment(arena: Arena) -> None:
    assert (arena.view.shape, arena.view.format, arena.view.c_contiguous) == ((8, 2 * PAGE), "B", True)
    assert not arena.view.readonly
    assert np.asarray(arena.view).ctypes.data % PAGE == 0
    assert not os.get_inheritable(arena.fd)


def test_rows_are_the_views_rows(arena: Arena) -> None:
    rows = arena_rows(arena.view)
    assert (len(rows), rows.block_bytes) == (8, 2 * PAGE)
    for slot in range(8):
        arena.row(slot)[:] = bytes([slot]) * (2 * PAGE)
    assert all((np.asarray(arena.view)[slot] == slot).all() for slot in range(8))
    assert all(bytes(rows[slot]) == bytes([slot]) * (2 * PAGE) for slot in range(8))
    for slot in (-1, 8):
        with pytest.raises(IndexError):
            arena.row(slot)


def test_rows_of_plain_memory() -> None:
    array = np.zeros((3, 5), dtype=np.int8)
    arena_rows(memoryview(array))[1][:] = b"abcde"
    assert array[1].tobytes() == b"abcde"
    for wrong in (np.zeros(4, np.uint8), np.zeros((2, 4), np.int32), np.zeros((4, 4), np.uint8)[:, :2]):
        with pytest.raises(ConfigError):
            arena_rows(memoryview(wrong))


@pytest.mark.parametrize(("num_blocks", "block_bytes"), [(0, PAGE), (4, 0), (4, PAGE + 1), (4, -PAGE)])
def test_bad_sizes_are_refused(num_blocks: int, block_bytes: int) -> None:
    with pytest.raises(ConfigError):
        Arena.create(num_blocks, block_bytes)


def test_align_block_bytes() -> None:
    assert [align_block_bytes(size) for size in (1, PAGE, PAGE + 1)] == [PAGE, PAGE, 2 * PAGE]


def test_every_page_is_there_and_progress_says_so() -> None:
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))

    with Arena.create(40, 1024 * PAGE, huge_pages=HugePages.OFF, progress=progress, threads=3) as arena:
        total = 40 * 1024 * PAGE + PAGE
        assert os.fstat(arena.fd).st_blocks * 512 >= total
        assert [done for done, _ in seen] == sorted({done for done, _ in seen})
        assert seen[-1] == (total, total)


def test_the_arena_cannot_be_shrunk(arena: Arena) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, PAGE)


def test_a_failing_progress_leaves_nothing_open() -> None:
    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt):
        Arena.create(4, PAGE, progress=fail)
    assert set(os.listdir("/proc/self/fd")) <= before  # less, if the collector finds others


def test_more_than_the_machine_has_is_refused_in_one_line() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(CapacityError, match=r"^1024\.0 TiB of host memory asked, .* available \(limit: .*\)$"):
        Arena.create(2**38, PAGE)
    assert set(os.listdir("/proc/self/fd")) <= before  # less, if the collector finds others


CHILD = """
import sys
from kvtier.primary.arena import Arena
fd, blocks, size = map(int, sys.argv[1:])
with Arena.attach(fd, blocks, size) as arena:
    arena.row(3)[:4] = bytes(arena.row(2)[:4])[::-1]
    arena.control.publish(1, 7)
"""


def test_another_process_maps_the_same_bytes(arena: Arena) -> None:
    arena.row(2)[:4] = b"abcd"
    arena.control.publish(0, 9)
    arguments = [str(number) for number in (arena.fd, arena.num_blocks, arena.block_bytes)]
    subprocess.run([sys.executable, "-c", CHILD, *arguments], pass_fds=[arena.fd], check=True)
    assert bytes(arena.row(3)[:4]) == b"dcba"
    assert arena.control.finished(2) == 7


def test_attach_leaves_the_callers_descriptor(arena: Arena) -> None:
    with Arena.attach(arena.fd, 8, 2 * PAGE) as other:
        assert other.fd != arena.fd
        other.row(0)[:2] = b"hi"
    assert os.fstat(arena.fd).st_size == 16 * PAGE + PAGE
    assert bytes(arena.row(0)[:2]) == b"hi"
    with pytest.raises(ConfigError, match="arena_fd"):
        Arena.attach(arena.fd, 9, 2 * PAGE)


def test_close_is_idempotent_and_tolerates_views() -> None:
    arena = Arena.create(2, PAGE)
    fd, row, array = arena.fd, arena.row(1), np.asarray(arena.view)
    row[:2] = b"ok"
    arena.close()
    arena.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert bytes(row[:2]) == b"ok"
    assert array[1, 0] == ord("o")


def test_the_last_view_unmaps_a_closed_arena() -> None:
    gc.collect()
    before = Path("/proc/self/maps").read_text().count("kvtier-arena")
    arena = Arena.create(2, PAGE)
    row = arena.row(1)
    arena.close()
    assert row[0] == 0
    del row
    gc.collect()
    assert Path("/proc/self/maps").read_text().count("kvtier-arena") == before
    del arena


IN_LITTLE_ADDRESS_SPACE = """
import resource, threading
from kvtier.errors import CapacityError
from kvtier.primary.arena import Arena
{before}
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), -1))
try:
    Arena.create(64, 4096)
except CapacityError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("before", "said"),
    [
        # More of the address space than is left, which the check of free memory cannot know.
        ("threading.stack_size(1 << 30)", "cpu_bytes_to_use: no thread can allocate"),
        (
            "resource.setrlimit(resource.RLIMIT_STACK, (128 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]))",
            "260.0 KiB of host memory asked, 0 B available (limit: address space, RLIMIT_AS",
        ),
    ],
)
def test_stacks_of_threads_that_find_no_room_are_told_in_one_line(before: str, said: str) -> None:
    code = IN_LITTLE_ADDRESS_SPACE.format(before=before)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith(said)
    assert result.stdout.count("\n") == 1


def test_nothing_stays_mapped() -> None:
    def num_mapped() -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count("kvtier-arena")

    before = num_mapped()
    arena = Arena.create(2, PAGE)
    assert num_mapped() == before + 1
    arena.close()
    del arena
    assert num_mapped() == before


def test_control_page_counts_failures_apart_from_ends() -> None:
    control = ControlPage(memoryview(bytearray(4096)))
    assert control.failures() == 0
    assert not control.has_failures
    control.publish(0, 5)
    control.count_failure(0)
    control.count_failure(255)
    assert (control.failures(), control.has_failures, control.finished(1)) == (2, True, 5)
    with pytest.raises(ValueError, match="rank 256"):
        control.count_failure(256)


def test_control_page_takes_the_minimum_over_ranks() -> None:
    page = ControlPage(memoryview(bytearray(PAGE)))
    assert page.finished(MAX_RANKS) == 0
    for rank, sequence in enumerate((5, 2**40, 3)):
        page.publish(rank, sequence)
    assert [page.finished(size) for size in (1, 2, 3, 4)] == [5, 5, 3, 0]
    page.publish(2, 2**63)
    assert page.finished(3) == 5
    for rank in (-1, MAX_RANKS):
        with pytest.raises(ValueError):
            page.publish(rank, 1)
    for size in (0, MAX_RANKS + 1):
        with pytest.raises(ValueError):
            page.finished(size)


LIMITED = """
import os, sys
with open(sys.argv[1], "w") as file:
    file.write(str(os.getpid()))
from kvtier.errors import CapacityError
from kvtier.primary.arena import Arena
from kvtier.primary.huge_pages import HugePages
Arena.create(1024, 4096, huge_pages=HugePages.OFF).close()
try:
    Arena.create(64 * 1024, 4096, huge_pages=HugePages.OFF)  # reserved huge pages count elsewhere
except CapacityError as error:
    print(error)
"""


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """A cgroup below this process's own that may hold 192 MiB."""
    made = None
    for mount, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        with suppress(OSError):
            group = Path(mount) / f"kvtier-test-{os.getpid()}"
            group.mkdir()
            made = group
            (group / limit).write_text(str(192 * 1024**2))
            break
        if made is not None:
            made.rmdir()
            made = None
    if made is None:
        pytest.skip("CANNOT MAKE A MEMORY CGROUP (needs root): the refusal under a real limit was not checked")
    yield made
    made.rmdir()


@pytest.mark.root
def test_a_real_cgroup_limit_refuses_before_the_kernel_kills(limited_group: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(limited_group / "cgroup.procs")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "256.0 MiB of host memory asked" in result.stdout
    assert limited_group.name in result.stdout
