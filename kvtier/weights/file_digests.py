"""XXH3-128 of whole files, on threads, and remembered in the user's cache folder.

A digest is remembered under device, inode, size, modification and change time. Nobody can set the last one, so a
file that still has all five holds the bytes that were hashed, with two exceptions that are hashed anew each time: a
file that changed within the granularity of its filesystem's clock, and one that changed while it was read.

An entry is one file, `<device>-<inode>`, locked by whoever hashes: other processes of the host wait for its answer
instead of reading the same bytes. The kernel drops the lock of a process that ends.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from kvtier.log import logger
from kvtier.stores.own_files import FOLDER_MODE, Folder

LEAF_BYTES = 64 << 20
"""Threads take a file in leaves of this size; its digest is that of the leaves' digests, one after the other."""
PIECE_BYTES = 4 << 20
"""A read and an update: short enough for the cache, long enough for a thread that must win the interpreter lock."""
_MAX_THREADS = 4
"""The engine starts meanwhile, and needs processors, too."""
CLOCK_SECONDS = 2.0
"""The coarsest clock of a filesystem in use (FAT, ext3, some NFS servers): a younger change may not show."""
PATIENCE_SECONDS = 120.0
"""Longest wait for another process that hashes the same file; a stopped one must not hold anybody for ever."""
_PAUSE_SECONDS = 0.05
MAX_ENTRIES = 1024
_MAX_ENTRY_BYTES = 4096
_VERSION = 1
_DIGEST_DIGITS = 32


class ChangedFileError(Exception):
    """A file changed while it was read, or is none; the message names it."""


class StoppedError(Exception):
    """The caller asked to stop before all was read."""


@dataclass(frozen=True)
class FileDigest:
    """Attributes: digest: 32 hexadecimal digits; size: bytes of the file; remembered: it was not read."""

    digest: str
    size: int
    remembered: bool


def digest_file(
    path: Path,
    memory: DigestMemory | None = None,
    stop: threading.Event | None = None,
    *,
    leaf_bytes: int = LEAF_BYTES,
    piece_bytes: int = PIECE_BYTES,
) -> FileDigest:
    """Return the digest of all bytes of a file.

    Args:
        memory: where digests are remembered; None reads the file.
        stop: set by another thread when nobody wants the answer any more.
        leaf_bytes: what one thread hashes at a time; another size makes another digest.
        piece_bytes: what it reads at a time.

    Raises:
        ChangedFileError: it changed meanwhile, or is no regular file.
        StoppedError: `stop` was set.
        OSError: it cannot be read.
    """
    stop = stop or threading.Event()
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hang
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ChangedFileError(f"{path} is no regular file")
        with _claimed(memory, status, stop) as entry:
            known = entry.read(status) if entry else None
            if known is not None:
                return FileDigest(known, status.st_size, remembered=True)
            started = time.time()
            digest = _Leaves(descriptor, status.st_size, leaf_bytes, piece_bytes, stop).digest()
            if _marks(os.fstat(descriptor)) != _marks(status):
                raise ChangedFileError(f"{path} changed while it was read")
            if memory and entry and status.st_ctime < started - memory.clock_seconds:
                entry.write(status, digest)
            return FileDigest(digest, status.st_size, remembered=False)
    finally:
        os.close(descriptor)


def _marks(status: os.stat_result) -> list[int]:
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


@dataclass
class _Leaves:
    """The leaves of an open file, hashed by several threads."""

    descriptor: int
    size: int
    leaf_bytes: int
    piece_bytes: int
    stop: threading.Event

    def digest(self) -> str:
        leaves = -(-self.size // self.leaf_bytes)
        digests: list[bytes] = [b""] * leaves
        faults: list[Exception] = []
        numbers = itertools.count()  # its next() is atomic

        def work() -> None:
            buffer = memoryview(bytearray(min(self.piece_bytes, self.size)))
            try:
                while not faults and (number := next(numbers)) < leaves:
                    digests[number] = self._leaf(number * self.leaf_bytes, buffer)
            except Exception as fault:  # noqa: BLE001 - handed to the caller's thread, which raises it
                faults.append(fault)

        # Daemons: an interpreter that exits does not wait for a read that hangs.
        count = min(_MAX_THREADS, len(os.sched_getaffinity(0)), leaves)
        helpers = [threading.Thread(target=work, name="kvtier-digest", daemon=True) for _ in range(count - 1)]
        for helper in helpers:
            helper.start()
        work()
        for helper in helpers:
            helper.join()
        if faults:
            raise faults[0]
        return xxhash.xxh3_128(self.size.to_bytes(8, "little") + b"".join(digests)).hexdigest()

    def _leaf(self, start: int, buffer: memoryview) -> bytes:
        digest, position, end = xxhash.xxh3_128(), start, min(start + self.leaf_bytes, self.size)
        while position < end:
            if self.stop.is_set():
                raise StoppedError
            count = os.preadv(self.descriptor, [buffer[: end - position]], position)
            if not count:
                raise ChangedFileError("a file of weights was cut while it was read")
            digest.update(buffer[:count])
            position += count
        return digest.digest()


class DigestMemory:
    """A folder of remembered digests that only its owner can read and write."""

    def __init__(
        self,
        folder: Path,
        *,
        max_entries: int = MAX_ENTRIES,
        clock_seconds: float = CLOCK_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """Make the folder, or check it.

        Args:
            max_entries: digests kept from earlier starts; the oldest go.
            clock_seconds: a file that changed later than that before it was read is not remembered.
            patience_seconds: longest wait for another process that hashes the same file.

        Raises:
            OSError: it cannot be made or written, is a link or somebody else's, or open to others.
        """
        self.clock_seconds, self.patience_seconds = clock_seconds, patience_seconds
        self._complained = False
        folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        self._folder = Folder.open(folder, follow=False)
        try:
            if self._folder.owner != os.geteuid():
                raise PermissionError(f"{folder} belongs to user {self._folder.owner}, not to {os.geteuid()}")
            _check_private(self._folder.mode, folder)
            self._forget_oldest(max_entries)
        except BaseException:
            self.close()
            raise

    @classmethod
    def of_user(cls) -> DigestMemory | None:
        """Return the memory in the user's cache folder; None, and one line in the log, if there can be none."""
        candidates = (os.environ.get("XDG_CACHE_HOME", ""), os.path.join(os.environ.get("HOME", ""), ".cache"))
        try:
            base = next((base for base in candidates if os.path.isabs(base)), None)
            if base is None:
                raise OSError("neither XDG_CACHE_HOME nor HOME names a folder")
            return cls(Path(base, "kvtier", "weights"))
        except OSError as error:
            logger.warning("digests of weights are not remembered, each start reads all files: %s", error)
            return None

    def close(self) -> None:
        """Let go of the folder."""
        self._folder.close()

    def open_entry(self, status: os.stat_result) -> DigestEntry | None:
        """Return the entry of a file, made if there is none, not locked; None, said once, if that cannot be."""
        try:
            return self._open_entry(status)
        except OSError as error:
            if not self._complained:
                logger.warning("digests of weights are not remembered, each start reads all files: %s", error)
            self._complained = True
            return None

    def _open_entry(self, status: os.stat_result) -> DigestEntry:
        name = f"{status.st_dev:x}-{status.st_ino:x}"
        descriptor = self._folder.open_file(name, os.O_RDWR | os.O_CREAT)
        try:
            _check_private(stat.S_IMODE(os.fstat(descriptor).st_mode), self._folder.path / name)
        except BaseException:
            os.close(descriptor)
            raise
        return DigestEntry(descriptor)

    def _forget_oldest(self, max_entries: int) -> None:
        names = self._folder.names()
        if len(names) <= max_entries:
            return
        ages = []
        for name in names:
            with suppress(OSError):  # another process forgets the same ones
                ages.append((self._folder.status(name).st_mtime, name))
        for _, name in sorted(ages)[: len(names) - max_entries]:
            with suppress(OSError):  # or somebody made a folder here
                self._folder.unlink(name)


@dataclass(frozen=True)
class DigestEntry:
    """One remembered digest: version, device, inode, size, times and digest in one line, a checksum in the next."""

    descriptor: int

    def try_to_lock(self) -> bool:
        """Return whether nobody else has the entry's lock, and this one has it now, until `close`."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def read(self, status: os.stat_result) -> str | None:
        """Return what is remembered of exactly this file; None if nothing is, or the entry is damaged."""
        raw = os.pread(self.descriptor, _MAX_ENTRY_BYTES, 0)
        text, _, checksum = raw.rpartition(b"\n")
        digest = text[-_DIGEST_DIGITS:]
        # What an intact entry of this file would be, compared as a whole: nothing in it has to be understood.
        expected = _entry_text(status, digest)
        return digest.decode() if text == expected and checksum == _checksum(text) else None

    def write(self, status: os.stat_result, digest: str) -> None:
        """Remember; an entry half written has a wrong checksum."""
        text = _entry_text(status, digest.encode())
        with suppress(OSError):  # a full disk: it is hashed again next time
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, text + b"\n" + _checksum(text), 0)

    def close(self) -> None:
        """Let go of the entry and its lock, which a forked child would hold on to."""
        with suppress(OSError):
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)


@contextmanager
def _claimed(
    memory: DigestMemory | None, status: os.stat_result, stop: threading.Event
) -> Iterator[DigestEntry | None]:
    """Yield the file's entry, locked; None where there is no memory, or another process has it for too long."""
    entry = memory.open_entry(status) if memory else None
    if memory is None or entry is None:
        yield None
        return
    try:
        yield entry if _wait_for_lock(entry, stop, memory.patience_seconds) else None
    finally:
        entry.close()


def _wait_for_lock(entry: DigestEntry, stop: threading.Event, patience_seconds: float) -> bool:
    deadline = time.monotonic() + patience_seconds
    try:
        while not entry.try_to_lock():
            if stop.wait(_PAUSE_SECONDS):
                raise StoppedError
            if time.monotonic() > deadline:
                return False
    except OSError:  # a filesystem without locks
        return False
    return True


def _check_private(mode: int, path: Path) -> None:
    if mode & 0o077:
        raise PermissionError(f"{path} is open to other users (mode {mode:o})")


def _entry_text(status: os.stat_result, digest: bytes) -> bytes:
    return b"%d %s %s" % (_VERSION, " ".join(map(str, _marks(status))).encode(), digest)


def _checksum(text: bytes) -> bytes:
    return xxhash.xxh3_128(text).hexdigest().encode()
