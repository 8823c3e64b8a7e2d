"""An arena in huge pages: which kind of memory is chosen, and every kind that this machine can give."""

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kvtier.errors import CapacityError, ConfigError
from kvtier.primary.arena import Arena
from kvtier.primary.control_page import CONTROL_BYTES
from kvtier.primary.huge_pages import (
    HUGE_PAGE_BYTES,
    HugePages,
    Memory,
    MemoryKind,
    kinds_of_memory,
    tmpfs_of,
)
from kvtier.primary.memory_limit import hugetlb_limits, hugetlb_page_sizes

MIB, GIB = 1 << 20, 1 << 30
TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
POOL = Path("/proc/sys/vm/nr_hugepages")
BLOCKS, BLOCK_BYTES = 32, 512 << 10
FILE_BYTES = BLOCKS * BLOCK_BYTES + CONTROL_BYTES

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes settings of the kernel: run the tests as root")


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def pool(size_kib: int, free: int, reserved: int = 0) -> dict[str, str]:
    folder = f"sys/kernel/mm/hugepages/hugepages-{size_kib}kB"
    return {f"{folder}/free_hugepages": str(free), f"{folder}/resv_hugepages": str(reserved)}


def chosen(root: Path, num_bytes: int, wanted: HugePages = HugePages.AUTO) -> list[tuple[MemoryKind, int]]:
    return [(memory.kind, memory.page_bytes) for memory in kinds_of_memory(num_bytes, wanted, None, root)]


SMALL = (MemoryKind.SMALL, mmap.PAGESIZE)
TWO_MIB = (MemoryKind.RESERVED, 2 * MIB)
ONE_GIB = (MemoryKind.RESERVED, GIB)
ADVISED = {"sys/kernel/mm/transparent_hugepage/shmem_enabled": "always within_size [advise] never deny force"}


def test_a_machine_that_offers_nothing(tmp_path: Path) -> None:
    assert chosen(tmp_path, GIB) == [SMALL]
    with pytest.raises(ConfigError, match=r"huge_pages='require'.*shmem_enabled.*vm\.nr_hugepages=512"):
        chosen(tmp_path, GIB, HugePages.REQUIRE)


def test_free_reserved_pages_come_first(tmp_path: Path) -> None:
    root = tree(tmp_path, {**pool(2048, 600, 80), **pool(1048576, 0), **ADVISED})
    assert chosen(root, 520 * 2 * MIB) == [TWO_MIB, (MemoryKind.TRANSPARENT, mmap.PAGESIZE), SMALL]
    assert chosen(root, 521 * 2 * MIB) == [(MemoryKind.TRANSPARENT, mmap.PAGESIZE), SMALL]
    assert chosen(root, 520 * 2 * MIB, HugePages.REQUIRE) == [TWO_MIB, (MemoryKind.TRANSPARENT, mmap.PAGESIZE)]
    assert chosen(root, 520 * 2 * MIB, HugePages.OFF) == [SMALL]


def test_large_pages_that_would_waste_memory_are_left(tmp_path: Path) -> None:
    root = tree(tmp_path, {**pool(2048, 0), **pool(1048576, 200)})
    assert chosen(root, GIB + CONTROL_BYTES) == [SMALL]
    assert chosen(root, 150 * GIB + CONTROL_BYTES) == [ONE_GIB, SMALL]


@pytest.mark.parametrize(
    ("own", "offered"), [("[inherit] advise never", True), ("inherit [advise] never", True), ("inherit [never]", False)]
)
def test_the_setting_of_a_size_overrides_the_general_one(tmp_path: Path, own: str, offered: bool) -> None:
    files = {"sys/kernel/mm/transparent_hugepage/hugepages-2048kB/shmem_enabled": own}
    assert (len(chosen(tree(tmp_path, {**ADVISED, **files}), GIB)) == 2) is offered


@pytest.mark.parametrize(
    ("cgroup", "mount", "limit", "usage"),
    [
        ("0::/pod", "30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw", "hugetlb.2MB.max", "hugetlb.2MB.current"),
        (
            "5:hugetlb:/pod",
            "31 25 0:27 / /sys/fs/cgroup rw - cgroup cgroup rw,hugetlb",
            "hugetlb.2MB.limit_in_bytes",
            "hugetlb.2MB.usage_in_bytes",
        ),
    ],
)
def test_a_group_may_have_fewer_pages_than_the_host(
    tmp_path: Path, cgroup: str, mount: str, limit: str, usage: str
) -> None:
    root = tree(
        tmp_path,
        {
            **pool(2048, 1000),
            "proc/self/cgroup": cgroup,
            "proc/self/mountinfo": mount,
            f"sys/fs/cgroup/pod/{limit}": str(64 * MIB),
            f"sys/fs/cgroup/pod/{usage}": str(32 * MIB),
        },
    )
    assert {limit.usable for limit in hugetlb_limits(2 * MIB, root)} == {2000 * MIB, 32 * MIB}
    assert chosen(root, 32 * MIB)[0] == TWO_MIB
    assert chosen(root, 33 * MIB) == [SMALL]
    with pytest.raises(CapacityError, match=f"limit: .*{limit}"):
        Memory(*TWO_MIB).check(33 * MIB, root)


def test_a_group_may_limit_pages_smaller_than_a_mebibyte(tmp_path: Path) -> None:
    files = {
        **pool(64, 1000),
        "proc/self/cgroup": "0::/pod",
        "proc/self/mountinfo": "30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
        "sys/fs/cgroup/pod/hugetlb.64KB.max": str(MIB),
    }
    assert chosen(tree(tmp_path, files), 2 * MIB) == [SMALL]


def test_a_folder_is_on_a_tmpfs_or_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"arena_path=.*an existing folder on a tmpfs"):
        Arena.create(1, mmap.PAGESIZE, folder=tmp_path / "none")
    if tmpfs_of(tmp_path)[0] != "tmpfs":
        with pytest.raises(ConfigError, match=r"arena_path=.*a folder on a tmpfs; this one is on"):
            Arena.create(1, mmap.PAGESIZE, folder=tmp_path)


def test_a_tmpfs_without_huge_pages_will_do_unless_they_are_required(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    kind, huge = tmpfs_of(shared)
    if kind != "tmpfs" or huge:
        pytest.skip(f"{shared} is a {kind}, huge pages: {huge}; needs a tmpfs with small pages there")
    before = set(os.listdir(shared))
    with Arena.create(2, mmap.PAGESIZE, folder=shared) as arena:
        arena.row(1)[:2] = b"ok"
        assert arena.memory == Memory(MemoryKind.SMALL, folder=shared)
        assert os.fstat(arena.fd).st_nlink == 0
        assert set(os.listdir(shared)) == before
    with pytest.raises(ConfigError, match="remount,huge=within_size"):
        Arena.create(2, mmap.PAGESIZE, folder=shared, huge_pages=HugePages.REQUIRE)


@contextmanager
def setting(path: Path, value: str) -> Iterator[None]:
    """Change a setting of the kernel, and restore it."""
    text = path.read_text()
    before = text.partition("[")[2].partition("]")[0] or text.strip()
    path.write_text(value)
    try:
        yield
    finally:
        path.write_text(before)


@contextmanager
def reserved_pages() -> Iterator[Path | None]:
    if 2 * MIB not in hugetlb_page_sizes():
        pytest.skip("the kernel reserves no pages of 2 MiB: needs one built with CONFIG_HUGETLBFS")
    # Tests that run beside this one may take some of the pages for arenas of their own.
    pages = int(POOL.read_text()) + 256
    with setting(POOL, str(pages)):
        if int(POOL.read_text()) < pages:
            pytest.skip("memory is too fragmented for 256 huge pages: run the tests soon after a boot")
        yield None


@contextmanager
def transparent_pages() -> Iterator[Path | None]:
    if not TRANSPARENT.exists():
        pytest.skip("no transparent huge pages: needs a kernel built with CONFIG_TRANSPARENT_HUGEPAGE")
    with setting(TRANSPARENT, "advise"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "kvtier.primary.huge_pages.hugetlb_page_sizes", lambda root: []
        )  # the host may have reserved some
        yield None


@contextmanager
def huge_tmpfs() -> Iterator[Path | None]:
    with ExitStack() as stack:
        place = Path("/tmp") / f"kvtier-huge-{os.getpid()}"
        place.mkdir()
        stack.callback(place.rmdir)
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "huge=within_size,size=64m", "kvtier-test", place], capture_output=True
        )
        if mounted.returncode:
            pytest.skip(f"mount: {mounted.stderr.decode().strip()}; run the tests where root may mount a tmpfs")
        stack.callback(subprocess.run, ["umount", place], check=True)
        yield place


KINDS = {
    MemoryKind.RESERVED: reserved_pages,
    MemoryKind.TRANSPARENT: transparent_pages,
    MemoryKind.TMPFS: huge_tmpfs,
}

CHILD = """
import sys
from kvtier.primary.arena import Arena
fd, blocks, size = map(int, sys.argv[1:])
with Arena.attach(fd, blocks, size) as arena:
    assert arena.is_in_huge_pages()
    arena.row(3)[:4] = bytes(arena.row(2)[:4])[::-1]
    arena.control.publish(1, 7)
"""


def test_an_arena_in_small_pages_says_so() -> None:
    with Arena.create(BLOCKS, BLOCK_BYTES, huge_pages=HugePages.OFF) as arena:
        arena.row(2)[:4] = b"abcd"
        assert not arena.is_in_huge_pages()


@needs_root
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.lower())
def test_every_kind_of_huge_pages_holds_an_arena(kind: MemoryKind) -> None:
    with KINDS[kind]() as folder:
        arena = Arena.create(BLOCKS, BLOCK_BYTES, huge_pages=HugePages.REQUIRE, folder=folder)
        with arena:
            assert arena.memory is not None
            assert arena.memory.kind is kind
            assert arena.huge_bytes() >= BLOCKS * BLOCK_BYTES
            assert kind.value in arena.describe_memory()
            assert arena.describe_memory().endswith(" MiB mapped so")
            assert FILE_BYTES <= os.fstat(arena.fd).st_size < FILE_BYTES + HUGE_PAGE_BYTES
            arena.row(2)[:4] = b"abcd"
            arena.control.publish(0, 9)
            subprocess.run(
                [sys.executable, "-c", CHILD, str(arena.fd), str(BLOCKS), str(BLOCK_BYTES)],
                pass_fds=[arena.fd],
                check=True,
            )
            assert bytes(arena.row(3)[:4]) == b"dcba"
            assert arena.control.finished(2) == 7
            if folder is None:
                with pytest.raises(PermissionError):
                    os.ftruncate(arena.fd, 0)
            child = os.fork()
            if child == 0:  # the child's pages are private: it reads zeros, and what it writes stays its own
                found = bytes(arena.row(2)[:4])
                arena.row(2)[:4] = b"zzzz"
                os._exit(found != bytes(4))
            assert os.waitpid(child, 0)[1] == 0
            assert bytes(arena.row(2)[:4]) == b"abcd"


@needs_root
@pytest.mark.parametrize("kind", [MemoryKind.RESERVED, MemoryKind.TMPFS], ids=lambda kind: kind.name.lower())
def test_a_kernel_that_cannot_populate_a_mapping_gives_huge_pages_too(
    kind: MemoryKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtier.primary.arena._MADV_POPULATE_WRITE", 9999)  # no kernel knows it: EINVAL
    with (
        KINDS[kind]() as folder,
        Arena.create(BLOCKS, BLOCK_BYTES, huge_pages=HugePages.REQUIRE, folder=folder) as arena,
    ):
        assert arena.huge_bytes() >= BLOCKS * BLOCK_BYTES


@needs_root
def test_the_log_says_why_few_pages_are_huge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtier.primary.arena._MADV_POPULATE_WRITE", 9999)  # as before Linux 5.14
    with transparent_pages(), Arena.create(BLOCKS, BLOCK_BYTES) as arena:
        assert arena.memory == Memory(MemoryKind.TRANSPARENT)
        assert "transparent huge pages, 0 B mapped so; the rest is in 4 KiB pages" in arena.describe_memory()


@needs_root
def test_reserved_pages_are_given_back() -> None:
    with reserved_pages():
        for _ in range(20):  # more in all than there are pages
            Arena.create(2 * BLOCKS, BLOCK_BYTES, huge_pages=HugePages.REQUIRE).close()


@needs_root
def test_a_tmpfs_that_is_too_small_is_an_error_of_one_line() -> None:
    with huge_tmpfs() as folder, pytest.raises(CapacityError, match=r"^cpu_bytes_to_use: .*No space left.*huge pages"):
        Arena.create(256, BLOCK_BYTES, folder=folder)
