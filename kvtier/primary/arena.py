"""The primary arena: one shared, page-aligned mapping of blocks of equal size, followed by a control page."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from kvtier import forks
from kvtier.descriptors import Descriptor
from kvtier.errors import CapacityError, ConfigError
from kvtier.interrupts import interrupts_noted
from kvtier.primary.control_page import CONTROL_BYTES, ControlPage
from kvtier.primary.huge_pages import (
    ADVICE,
    FEW_PAGES,
    HUGE_PAGE_BYTES,
    LEAST_HUGE,
    SMALL,
    HugePages,
    Memory,
    MemoryKind,
    kinds_of_memory,
)
from kvtier.primary.memory_file import forbid_resizing, make_memory_file, no_room
from kvtier.primary.memory_limit import NUM_THREADS
from kvtier.sizes import format_size

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p

Progress = Callable[[int, int], None]
"""Called with (bytes allocated so far, bytes in total)."""

_SLICE_BYTES = 64 * 1024**2
_SAMPLED_PAGES = 64
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23
"""Since Linux 5.14: maps and touches pages at once. It returns an error where an access would raise SIGBUS
(madvise(2))."""


def align_block_bytes(num_bytes: int) -> int:
    """Return `num_bytes` rounded up to a multiple of the page size."""
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


class Rows:
    """The rows of a 2-D view of bytes: `rows[slot]` is a 1-D memoryview of format "B" over `block_bytes` bytes."""

    def __init__(self, view: memoryview) -> None:
        shape = view.shape or ()
        if len(shape) != 2 or not view.c_contiguous or view.itemsize != 1:
            raise ConfigError("primary_kv_view", shape, "a C-contiguous view of bytes, shape (blocks, bytes)")
        self._flat = view.cast("B")
        self._num_rows, self.block_bytes = shape

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, slot: int) -> memoryview:
        if not 0 <= slot < self._num_rows:
            raise IndexError(f"slot {slot}: 0 to {self._num_rows - 1} allowed")
        start = slot * self.block_bytes
        return self._flat[start : start + self.block_bytes]

    def of(self, slots: Sequence[int]) -> list[memoryview]:
        """Return the rows of slots.

        Raises:
            IndexError: there is no such slot.
        """
        if slots and (min(slots) < 0 or max(slots) >= self._num_rows):
            raise IndexError(f"slots {min(slots)} to {max(slots)}: 0 to {self._num_rows - 1} allowed")
        flat, length = self._flat, self.block_bytes
        return [flat[start : start + length] for start in map(length.__mul__, slots)]


def arena_rows(view: memoryview) -> Rows:
    """Return the rows of a (num_blocks, block_bytes) view. `view[slot]` does not work: CPython cannot take a row of a
    2-D memoryview.

    Raises:
        ConfigError: the view is not 2-D, is not C-contiguous, or its items are not of one byte.
    """
    return Rows(view)


class SharedMapping(mmap.mmap):
    """A writable mapping of a file; a forked child sees private zero pages in its place.

    A child may still hold views of the arena, in a plug-in for example. It cannot read or overwrite the parent's blocks
    through them. `mmap` itself maps no file here: it would keep a duplicate of the descriptor, which nothing in the
    child can close.
    """

    address: int
    offset: int
    num_bytes: int

    def __new__(cls, fd: int, num_bytes: int, align: int = HUGE_PAGE_BYTES) -> Self:
        """Map the first `num_bytes` of `fd`, which may be closed afterwards.

        The file begins at `offset` of the mapping, at an address where a huge page can begin: mmap promises only small
        pages, so one huge page more is mapped.

        Raises:
            OSError: the system refuses the mapping.
        """
        self = super().__new__(cls, -1, num_bytes + align, flags=_PRIVATE)
        start = np.frombuffer(self, dtype=np.uint8).ctypes.data
        self.offset = -start % align
        self.num_bytes, self.address = num_bytes, start + self.offset
        self._place(mmap.MAP_SHARED, fd)  # over the anonymous pages, at the same address
        forks.register(self)
        return self

    def leave_to_parent(self) -> None:
        """In a forked child, replace the file's pages by private zero pages."""
        if not self.closed:
            self._place(_PRIVATE, -1)

    def _place(self, flags: int, fd: int) -> None:
        access = mmap.PROT_READ | mmap.PROT_WRITE
        if _libc.mmap(self.address, self.num_bytes, access, flags | _MAP_FIXED, fd, 0) != self.address:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Arena(forks.ProcessBound):
    """`num_blocks` blocks of `block_bytes` bytes in an unnamed file in memory, which vanishes with its last user.

    Attributes:
        memory: the kind of memory that it was made in; None in a process that has attached it.
        fd: descriptor of that file, closed by `close`; other programs inherit it only if it is passed on purpose.
        view: memoryview of shape (num_blocks, block_bytes), format "B", C-contiguous, page aligned.
        control: the control page, shared like the blocks.
    """

    def __init__(self, fd: int, num_blocks: int, block_bytes: int, memory: Memory | None = None) -> None:
        """Map `fd` and take ownership of it; callers use `create` or `attach`."""
        self.fd = fd
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.memory = memory
        self._descriptor = Descriptor(fd)
        used, page_bytes = num_blocks * block_bytes, _page_bytes(fd)
        whole = _whole_pages(used + CONTROL_BYTES, page_bytes)
        self._mapping = SharedMapping(fd, whole, max(page_bytes, HUGE_PAGE_BYTES))
        place = memoryview(self._mapping)[self._mapping.offset :][: used + CONTROL_BYTES]
        self.view = place[:used].cast("B", (num_blocks, block_bytes))
        self._rows = Rows(self.view)
        self.control = ControlPage(place[used:])
        self._closed = False
        forks.register(self)

    def leave_to_parent(self) -> None:
        """In a forked child, close its copy of the descriptor; `SharedMapping` replaces its own pages."""
        self._descriptor.close()
        self.fd = -1

    @classmethod
    def create(
        cls,
        num_blocks: int,
        block_bytes: int,
        *,
        huge_pages: HugePages = HugePages.AUTO,
        folder: Path | None = None,
        progress: Progress | None = None,
        threads: int = NUM_THREADS,
    ) -> Self:
        """Make an arena and allocate all of its pages, so that no later access fails for lack of memory.

        The kinds of memory that the machine offers are tried, the best first (`kinds_of_memory`).

        Args:
            block_bytes: a multiple of the page size (`align_block_bytes`).
            huge_pages: whether the arena lies in huge pages.
            folder: a folder on a tmpfs for the arena's file, which has no name there; None for a file without a folder.
            progress: called on the caller's thread while pages are allocated.
            threads: number of threads that allocate pages.

        Raises:
            ConfigError: a size is not allowed, the folder is not on a tmpfs, or huge pages are required and the machine
                does not offer them.
            CapacityError: the memory limits of this process leave too little, or the system refuses the memory.
        """
        total = _checked_bytes(num_blocks, block_bytes)
        *better, last = kinds_of_memory(total, huge_pages, folder)
        for memory in better:
            with suppress(CapacityError):  # reserved pages may have gone to somebody else since they were counted
                return cls._create_in(memory, num_blocks, block_bytes, huge_pages, progress, threads)
        return cls._create_in(last, num_blocks, block_bytes, huge_pages, progress, threads)

    @classmethod
    def _create_in(
        cls,
        memory: Memory,
        num_blocks: int,
        block_bytes: int,
        huge_pages: HugePages,
        progress: Progress | None,
        threads: int,
    ) -> Self:
        total = _checked_bytes(num_blocks, block_bytes)
        memory.check(total)
        total = memory.whole_pages(total)
        fd = make_memory_file(total, memory)
        try:
            arena = cls(fd, num_blocks, block_bytes, memory)
        except OSError as error:
            os.close(fd)
            raise no_room(total, error, memory=memory) from error
        try:
            arena._back(total, progress, threads)
            forbid_resizing(fd)
            if huge_pages is HugePages.REQUIRE:
                arena._check_huge()
        except BaseException:
            arena.close()
            raise
        return arena

    @classmethod
    def attach(cls, fd: int, num_blocks: int, block_bytes: int) -> Self:
        """Map the arena in the file `fd`, which another process made.

        The descriptor is duplicated: the caller still owns `fd`.

        Raises:
            ConfigError: a size is not allowed, or the file has a different size.
        """
        total = _whole_pages(_checked_bytes(num_blocks, block_bytes), _page_bytes(fd))
        found = os.fstat(fd).st_size
        if found != total:
            raise ConfigError("arena_fd", fd, f"a file of {total} bytes is needed, it has {found}")
        return cls._over_duplicate(fd, num_blocks, block_bytes)

    @classmethod
    def _over_duplicate(cls, fd: int, num_blocks: int, block_bytes: int) -> Self:
        own = os.dup(fd)
        try:
            return cls(own, num_blocks, block_bytes)
        except BaseException:
            os.close(own)
            raise

    def row(self, slot: int) -> memoryview:
        """Return the bytes of one slot: shape (block_bytes,), format "B".

        Raises:
            IndexError: there is no such slot.
        """
        return self._rows[slot]

    def close(self) -> None:
        """Close the descriptor and unmap; idempotent. The mapping stays as long as somebody holds a view of it."""
        if self._closed:
            return
        self._closed = True
        self._descriptor.close()
        mapping = self._mapping
        del self._rows, self.control, self._mapping  # else the mapping would stay as long as this object
        try:
            self.view.release()
            mapping.close()
        except BufferError:
            return  # a memoryview keeps its mmap alive, and the last one to be released unmaps it

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def describe_memory(self) -> str:
        """Return one line for the log: the size, the kind of memory, and what would give the arena huge pages."""
        size = format_size(self.num_blocks * self.block_bytes)
        if self.memory is None or self.memory.kind is MemoryKind.SMALL:
            return f"{size} of host memory in 4 KiB pages; {ADVICE}"
        found = self.huge_bytes()
        line = f"{size} of host memory in {self.memory.kind.value}, {format_size(found)} mapped so"
        return line if found >= self._whole_huge_pages() * LEAST_HUGE else f"{line}; {FEW_PAGES}"

    def is_in_huge_pages(self) -> bool:
        """Return whether this process maps most of the arena by huge pages: true for most of a few places, now read."""
        if _page_bytes(self.fd) >= HUGE_PAGE_BYTES:
            return True
        total = self.num_blocks * self.block_bytes
        places = range(0, total, max(HUGE_PAGE_BYTES, -(-total // _SAMPLED_PAGES)))
        for place in places:
            self._mapping[self._mapping.offset + place]  # maps the page, by a huge page if it is one
        return 2 * self.huge_bytes() > len(places) * HUGE_PAGE_BYTES

    def huge_bytes(self) -> int:
        """Return how many bytes of the arena this process maps by huge pages (`/proc/self/smaps`, proc(5)).

        0 where there is no such file: without /proc, or in a kernel built without it.
        """
        wanted, found = f"{self._mapping.address:x}-", 0
        inside = False
        with suppress(FileNotFoundError), open("/proc/self/smaps") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if value[:1] != " ":  # the first line of a mapping: its addresses, flags and file
                    if inside:
                        break
                    inside = line.startswith(wanted)
                elif inside and name in ("ShmemPmdMapped", "Shared_Hugetlb", "Private_Hugetlb"):
                    found += int(value.split()[0]) << 10
        return found

    def _check_huge(self) -> None:
        """Raise CapacityError if a whole huge page of the blocks is not one."""
        least, found = self._whole_huge_pages(), self.huge_bytes()
        if found < least:
            raise CapacityError(
                f"huge_pages: only {format_size(found)} of {format_size(least)} are in huge pages: the host's memory is"
                " fragmented; reserve huge pages soon after its start (sysctl vm.nr_hugepages)"
            )

    def _whole_huge_pages(self) -> int:
        """Return how many bytes of the blocks would be in huge pages if all were."""
        return self.num_blocks * self.block_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES

    def _back(self, total: int, progress: Progress | None, threads: int) -> None:
        """Allocate and map all pages, slice by slice, on `threads` threads."""
        # ctypes releases the interpreter lock during a call; mmap.madvise would hold it, and the threads would take
        # turns.
        start, madvise = self._mapping.address, _libc.madvise
        if self.memory is not SMALL:
            madvise(start, total, _MADV_HUGEPAGE)

        def back_slice(offset: int) -> int:
            length = min(_SLICE_BYTES, total - offset)
            # The mapping has asked for huge pages; fallocate, which knows nothing of it, would take small ones. Kernels
            # before 5.14 refuse the first call, and an access to a page then maps it, which costs time but cannot fail.
            # One access per huge page maps those that the file has, so that `huge_bytes` finds them.
            if madvise(start + offset, length, _MADV_POPULATE_WRITE):
                os.posix_fallocate(self.fd, offset, length)
                for page in range(offset, offset + length, HUGE_PAGE_BYTES):
                    _ = self._mapping[self._mapping.offset + page]
            return length

        with interrupts_noted() as check, ThreadPoolExecutor(max(1, threads), "kvtier-arena") as executor:
            try:
                slices = executor.map(back_slice, range(0, total, _SLICE_BYTES))
            except RuntimeError as error:  # the limits of address space or of processes leave no room for a thread
                raise CapacityError(
                    f"cpu_bytes_to_use: no thread can allocate {format_size(total)}: {error}; raise the limit of"
                    " address space (ulimit -v) or of processes (ulimit -u, pids.max), or give less memory"
                ) from error
            try:
                done = 0
                for length in slices:
                    check()
                    done += length
                    if progress is not None:
                        progress(done, total)
            except OSError as error:
                raise no_room(total, error, self.fd, self.memory or SMALL) from error
            finally:
                executor.shutdown(wait=True, cancel_futures=True)


def _page_bytes(fd: int) -> int:
    """Return the size of the pages of a file in memory: a file of reserved huge pages ends at a whole one."""
    return os.fstatvfs(fd).f_bsize


def _whole_pages(num_bytes: int, page_bytes: int) -> int:
    return -(-num_bytes // page_bytes) * page_bytes


def _checked_bytes(num_blocks: int, block_bytes: int) -> int:
    """Check the sizes, and return the size of the file: the blocks and the control page."""
    if num_blocks < 1:
        raise ConfigError("num_blocks", num_blocks, "at least 1")
    if block_bytes < 1 or block_bytes % mmap.PAGESIZE:
        raise ConfigError("block_bytes", block_bytes, f"a positive multiple of the page size, {mmap.PAGESIZE}")
    return num_blocks * block_bytes + CONTROL_BYTES
