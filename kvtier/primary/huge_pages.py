"""The kinds of memory an arena can lie in: which of them this machine offers, and what would offer a better one.

Direct I/O hands a device one segment per run of adjacent physical pages. In pages of 4 KiB nearly every page is a run
of its own, and a request is split where its segments run out; in huge pages one segment holds 2 MiB.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from kvtier.errors import CapacityError, ConfigError, describe
from kvtier.primary.memory_limit import check_memory, hugetlb_limits, hugetlb_page_sizes, memory_limits

HUGE_PAGE_BYTES = 2 << 20
"""The size of a transparent huge page on x86-64, and on arm64 with pages of 4 KiB."""
MAX_WASTE = 0.01
"""Largest share of an arena that may be lost since its file ends at a whole reserved page."""
ENABLE_TRANSPARENT = "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled"
"""As root, until the next boot."""
ADVICE = (
    "in huge pages a disk was 1.5 to 2.7 times as fast (kvtier bench disk measures yours); as root:"
    f" {ENABLE_TRANSPARENT}"
)
"""For an arena in small pages; measured by `benchmarks/huge_pages.py`."""

LEAST_HUGE = 0.9
"""Share of an arena in huge pages below which the log says `FEW_PAGES`."""
FEW_PAGES = (
    "the rest is in 4 KiB pages: the host's memory is fragmented, or its kernel is older than 5.14, which gives memory"
    " files huge pages only with shmem_enabled=always; sysctl vm.nr_hugepages=N (as root) reserves them"
)

_TRANSPARENT_FOLDER = "sys/kernel/mm/transparent_hugepage"
_ADVISED = {"advise", "within_size", "always", "force"}


class HugePages(Enum):
    """Whether an arena lies in huge pages."""

    AUTO = "auto"
    REQUIRE = "require"
    OFF = "off"


class MemoryKind(Enum):
    """Where an arena's memory comes from."""

    RESERVED = "huge pages that the host has reserved"
    TRANSPARENT = "transparent huge pages"
    TMPFS = "the huge pages of a tmpfs"
    SMALL = "4 KiB pages"


@dataclass(frozen=True)
class Memory:
    """One kind of memory, for an arena.

    Attributes:
        kind: where it comes from.
        page_bytes: the file's size is a multiple of this.
        folder: the folder on a tmpfs that holds the file; None for a file without a folder.
    """

    kind: MemoryKind
    page_bytes: int = os.sysconf("SC_PAGESIZE")
    folder: Path | None = None

    def whole_pages(self, num_bytes: int) -> int:
        """Return `num_bytes` rounded up to whole pages."""
        return -(-num_bytes // self.page_bytes) * self.page_bytes

    def check(self, num_bytes: int, root: Path = Path("/")) -> None:
        """Check that this process may allocate `num_bytes` of this memory.

        Raises:
            CapacityError: a limit leaves too little.
        """
        reserved = self.kind is MemoryKind.RESERVED
        check_memory(
            self.whole_pages(num_bytes), hugetlb_limits(self.page_bytes, root) if reserved else memory_limits(root)
        )


SMALL = Memory(MemoryKind.SMALL)


def kinds_of_memory(num_bytes: int, wanted: HugePages, folder: Path | None, root: Path = Path("/")) -> list[Memory]:
    """Return the kinds of memory to try for an arena of `num_bytes`, the best first.

    A folder that the user has named is the only choice. Otherwise: huge pages that the host has reserved and that are
    free, transparent huge pages where the kernel gives them to files in memory, small pages.

    Args:
        num_bytes: bytes of the arena's file before it is rounded up.
        wanted: with REQUIRE, only huge pages are returned.
        folder: a folder on a tmpfs for the arena's file; None for none.
        root: the folder that holds `proc` and `sys`.

    Raises:
        ConfigError: huge pages are required and the machine offers none; the message says what would offer them.
    """
    if folder is not None:
        return [Memory(_kind_of_folder(folder, wanted, root), folder=folder)]
    huge = [] if wanted is HugePages.OFF else list(_huge_kinds(num_bytes, root))
    if wanted is HugePages.REQUIRE and not huge:
        pages = -(-num_bytes // HUGE_PAGE_BYTES)
        allowed = (
            f'"auto", or huge pages from the host: {ENABLE_TRANSPARENT} (as root), or sysctl vm.nr_hugepages={pages}'
        )
        raise ConfigError("huge_pages", wanted.value, allowed)
    return huge if wanted is HugePages.REQUIRE else [*huge, SMALL]


def _kind_of_folder(folder: Path, wanted: HugePages, root: Path) -> MemoryKind:
    try:
        kind, huge = tmpfs_of(folder, root)
    except OSError as error:
        raise ConfigError("arena_path", str(folder), f"an existing folder on a tmpfs: {describe(error)}") from error
    if kind != "tmpfs":  # on a disk, the kernel would write the arena back to it
        raise ConfigError(
            "arena_path", str(folder), f"a folder on a tmpfs; this one is on {kind or 'an unknown filesystem'}"
        )
    if wanted is HugePages.REQUIRE and not huge:
        allowed = "a folder on a tmpfs with huge pages: mount -o remount,huge=within_size MOUNT_POINT (as root)"
        raise ConfigError("arena_path", str(folder), allowed)
    return MemoryKind.TMPFS if huge else MemoryKind.SMALL


def _huge_kinds(num_bytes: int, root: Path) -> Iterator[Memory]:
    for page_bytes in hugetlb_page_sizes(root):
        memory = Memory(MemoryKind.RESERVED, page_bytes)
        waste = memory.whole_pages(num_bytes) - num_bytes
        if waste > max(HUGE_PAGE_BYTES, num_bytes * MAX_WASTE):
            continue
        try:
            memory.check(num_bytes, root)
        except CapacityError:
            continue
        yield memory
    if transparent_pages_are_offered(root):
        yield Memory(MemoryKind.TRANSPARENT)


def transparent_pages_are_offered(root: Path = Path("/")) -> bool:
    """Return whether the kernel gives huge pages to files in memory that ask for them (madvise).

    Since Linux 6.10 each size of page has a setting of its own, which may be "inherit".
    """
    folder = root / _TRANSPARENT_FOLDER
    own = _selected(folder / f"hugepages-{HUGE_PAGE_BYTES >> 10}kB/shmem_enabled")
    return (_selected(folder / "shmem_enabled") if own in ("", "inherit") else own) in _ADVISED


def _selected(path: Path) -> str:
    """Return the word in brackets of a file such as "always [never]"; "" if there is none."""
    try:
        return path.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return ""


def tmpfs_of(folder: Path, root: Path = Path("/")) -> tuple[str, bool]:
    """Return the type of the filesystem of `folder` ("" if unknown), and whether it is a tmpfs with huge pages.

    Raises:
        OSError: there is no such folder.
    """
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = (root / "proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return "", False
    for line in lines:
        mount, _, filesystem = (part.split() for part in line.partition(" - "))
        if len(mount) > 2 and len(filesystem) > 2 and mount[2] == number:
            options = dict(option.partition("=")[::2] for option in filesystem[2].split(","))
            return filesystem[0], filesystem[0] == "tmpfs" and options.get("huge", "never") in _ADVISED
    return "", False
