"""The data files of a slab, with payloads at fixed places. Engine and tools read them; the engine allocates them."""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import threading
from collections.abc import Callable, Sequence

from kvtier.log import logger
from kvtier.stores.mounts import TELLS_UNWRITTEN, filesystem_type
from kvtier.stores.own_files import Folder
from kvtier.stores.slab.layout import SlabGeometry, data_name, segment_of
from kvtier.stores.vectored import NO_SPACE_ERRORS, PAGE_BYTES, VectoredCall, is_page_aligned, move_fully

_NO_FALLOCATE = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV})
AHEAD_BYTES = 4 << 20
"""Bytes written ahead per call. A store that needs the slab to grow waits for at most one such call."""


class DataFiles:
    """Data files `data-00000`, ... of one namespace, opened at first use. Threads may share it.

    It uses direct I/O where filesystem, block size and buffers allow it, else the page cache. Its methods raise
    OSError.
    """

    def __init__(
        self,
        folder: Folder,
        geometry: SlabGeometry,
        flags: int = os.O_RDONLY,
        on_indirect: Callable[[OSError], None] = lambda _: None,
    ) -> None:
        """Args:
        folder: the open folder of the namespace; the caller closes it.
        flags: of `os.open`, for the files.
        on_indirect: called once if the filesystem refuses direct I/O.
        """
        self._folder = folder
        self._flags = flags
        self._on_indirect = on_indirect
        self._lock = threading.Lock()
        self._descriptors: dict[tuple[int, bool], int] = {}
        self.direct = geometry.block_bytes % PAGE_BYTES == 0
        """Whether page-aligned buffers bypass the page cache."""

    def write(self, segment: int, offset: int, buffers: Sequence[memoryview]) -> int:
        """Write neighbouring payloads; return the bytes written."""
        return self._transfer(os.pwritev, segment, offset, buffers)

    def read(self, segment: int, offset: int, buffers: Sequence[memoryview]) -> int:
        """Read neighbouring payloads; return the bytes read: fewer if the file ends, 0 if it does not exist."""
        try:
            return self._transfer(os.preadv, segment, offset, buffers)
        except FileNotFoundError:
            return 0

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            descriptors, self._descriptors = self._descriptors, {}
        for descriptor in descriptors.values():
            os.close(descriptor)

    def _transfer(
        self,
        call: VectoredCall,
        segment: int,
        offset: int,
        buffers: Sequence[memoryview],
    ) -> int:
        """Try direct I/O, else use the page cache. The kernel checks the alignment anyway, so it is not checked
        first.
        """
        if self.direct:
            try:
                known = self._descriptors.get((segment, True))
                descriptor = self._descriptor(segment, direct=True) if known is None else known
                return move_fully(call, descriptor, buffers, offset, PAGE_BYTES)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                if all(map(is_page_aligned, buffers)):
                    self._stop_direct(error)
        return move_fully(call, self._descriptor(segment, direct=False), buffers, offset, 1)

    def _stop_direct(self, error: OSError) -> None:
        with self._lock:
            stopped, self.direct = self.direct, False
        if stopped:
            self._on_indirect(error)

    def _descriptor(self, segment: int, direct: bool) -> int:
        descriptor = self._descriptors.get((segment, direct))
        if descriptor is None:
            with self._lock:
                descriptor = self._descriptors.get((segment, direct))
                if descriptor is None:
                    flags = self._flags | (os.O_DIRECT if direct else 0)
                    descriptor = self._folder.open_file(data_name(segment), flags)
                    self._descriptors[segment, direct] = descriptor
        return descriptor


class Segments:
    """The data files of a slab in use. It allocates space when it is needed, or ahead. Threads may share it."""

    def __init__(
        self,
        folder: Folder,
        geometry: SlabGeometry,
        make_room: Callable[[Sequence[int]], None],
        min_free: int = 0,
        writes_ahead: bool | None = None,
    ) -> None:
        """Args:
        folder: the open folder of the namespace; the caller closes it.
        make_room: called before the files grow, with the lengths that they will have.
        min_free: bytes of the filesystem that must stay free.
        writes_ahead: whether `write_ahead` does anything; None: if the filesystem has unwritten extents.
        """
        self._folder = folder
        self._geometry = geometry
        self._make_room = make_room
        self._min_free = min_free
        self._lock = threading.Lock()
        self._files = DataFiles(folder, geometry, os.O_RDWR | os.O_CREAT, self._say_indirect)
        if writes_ahead is None:
            writes_ahead = filesystem_type(folder.descriptor) in TELLS_UNWRITTEN
        self._ahead = writes_ahead
        self.write = self._files.write
        """`DataFiles.write`, for space that was reserved."""
        self.lengths = [0] * geometry.num_segments
        """Allocated bytes per data file."""

    def fit(self) -> None:
        """Cut or delete data files beyond the geometry, and read the lengths of the others."""
        for name in self._folder.names():
            segment = segment_of(name)
            if segment is None:
                continue
            length = self._geometry.segment_bytes(segment)
            if length:
                self.lengths[segment] = self._cut_to(segment, length)
            elif not self._folder.unlink(name):
                logger.warning("%s: %s is not kvtier's and stays", self._folder.path, name)

    @property
    def direct(self) -> bool:
        """Whether page-aligned buffers bypass the page cache."""
        return self._files.direct

    def reserve(self, segment: int, end: int) -> None:
        """Allocate a segment up to offset `end`: by a whole step or, if there is no space for it, just to `end`.

        Raises:
            OSError: ENOSPC if there is no space, or less than `min_free` would stay free.
        """
        if self.lengths[segment] >= end:
            return
        with self._lock:
            length = self.lengths[segment]
            if length >= end:
                return
            grown = self._geometry.grown_bytes(segment, end)
            try:
                self._grow(segment, length, grown)
            except OSError as error:
                if error.errno not in NO_SPACE_ERRORS or grown == end:
                    raise
                self._grow(segment, length, end)

    def write_ahead(self, has_room: Callable[[Sequence[int]], bool] = lambda _: True) -> tuple[int, int] | None:
        """Allocate the next bytes of the slab and write zeros there.

        ext4 and XFS mark allocated extents as unwritten, and the first store into such an extent takes 1.4 to 2.1 times
        as long. `lengths` changes only after the zeros are written, so no store writes there before.

        Args:
            has_room: returns whether data files may have these lengths (bytes) without blocks in them yet.

        Returns:
            (bytes allocated, bytes of a full slab); None if there is nothing left to do or no space.
        """
        if not self._ahead or not self.direct:
            return None
        with self._lock:
            segment = next((number for number in range(len(self.lengths)) if self._missing(number)), None)
            if segment is None:
                self._ahead = False
                return None
            length = self.lengths[segment]
            start = -(-length // PAGE_BYTES) * PAGE_BYTES
            end = min(length + AHEAD_BYTES, self._geometry.segment_bytes(segment))
            if not has_room(self._with_length(segment, end)):
                self._ahead = False
                return None
            try:
                self._back(segment, length, end)
                self._files.write(segment, start, [_zeros()[: end - start]])
            except OSError as error:
                self._ahead = False
                logger.info("%s: stopped preparing space: %s", self._folder.path, error.strerror)
                self._cut(segment, length)
                return None
            self.lengths[segment] = end
            return sum(self.lengths), sum(map(self._geometry.segment_bytes, range(len(self.lengths))))

    def _missing(self, segment: int) -> int:
        """Return how many bytes of a segment are not allocated yet."""
        return self._geometry.segment_bytes(segment) - self.lengths[segment]

    def read(self, segment: int, offset: int, buffers: Sequence[memoryview]) -> int:
        """Read neighbouring payloads; return the bytes read: fewer at the end of the file."""
        return self._files.read(segment, offset, buffers) if self.lengths[segment] else 0

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _say_indirect(self, error: OSError) -> None:
        logger.warning("%s: no direct I/O here (%s), using the page cache", self._folder.path, error.strerror)

    def _grow(self, segment: int, length: int, grown: int) -> None:
        """Allocate a data file from `length` to `grown` bytes, and note its length."""
        self._back(segment, length, grown)
        self.lengths[segment] = grown

    def _cut(self, segment: int, length: int) -> None:
        """Cut a data file to `length`; ignore an error."""
        with contextlib.suppress(OSError):
            self._cut_to(segment, length)

    def _back(self, segment: int, length: int, grown: int) -> None:
        """Allocate a data file from `length` to `grown` bytes; after an error it has its old length."""
        self._make_room(self._with_length(segment, grown))
        if not has_space(self._folder.descriptor, grown - length + self._min_free):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        descriptor = self._folder.open_file(data_name(segment), os.O_RDWR | os.O_CREAT)
        try:
            allocate(descriptor, length, grown)
        except OSError:
            os.ftruncate(descriptor, length)
            raise
        finally:
            os.close(descriptor)

    def _with_length(self, segment: int, length: int) -> list[int]:
        """Return the lengths of all data files, with this length for one of them."""
        return [*self.lengths[:segment], length, *self.lengths[segment + 1 :]]

    def _cut_to(self, segment: int, length: int) -> int:
        """Cut a data file if it is longer than `length`; return its length."""
        descriptor = self._folder.open_file(data_name(segment), os.O_RDWR)
        try:
            size = os.fstat(descriptor).st_size
            if size > length:
                os.ftruncate(descriptor, length)
            return min(size, length)
        finally:
            os.close(descriptor)


def data_lengths(namespace: Folder) -> dict[int, int]:
    """Return the length of each data file by its number."""
    lengths = {}
    for name in namespace.names():
        segment = segment_of(name)
        if segment is not None and namespace.is_own_file(name):
            with contextlib.suppress(FileNotFoundError):
                lengths[segment] = namespace.status(name).st_size
    return lengths


@functools.cache
def _zeros() -> memoryview:
    """Return `AHEAD_BYTES` zeros at a page boundary. They take no memory: the kernel maps its one page of zeros."""
    return memoryview(mmap.mmap(-1, AHEAD_BYTES, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))


def has_space(descriptor: int, num_bytes: int) -> bool:
    """Return whether the filesystem of an open file has `num_bytes` free; True if it does not report its size."""
    status = os.statvfs(descriptor)
    return not status.f_blocks or status.f_bavail * status.f_frsize >= num_bytes


def allocate(descriptor: int, start: int, end: int) -> None:
    """Allocate bytes `start` to `end` of a file; only lengthen it if the filesystem cannot allocate."""
    try:
        os.posix_fallocate(descriptor, start, end - start)
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise
        os.ftruncate(descriptor, end)
