"""XXH3-128 of whole files, computed on threads, and remembered in the user's cache folder.

A digest is remembered with device, inode, size, modification time and change time of its file. Programs cannot set a
file's change time, so a file with the same five values has the same bytes. There are two exceptions, which are hashed
again each time: a file that changed within the resolution of its filesystem's clock, and one that changed during the
read.

Each entry is a file, `<device>-<inode>`. The process that hashes holds its lock; other processes of the host wait for
the digest instead of reading the same bytes. The kernel releases the lock of a process that ends.
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
"""Threads hash leaves of this size; a file's digest is the digest of its leaves' digests, in order."""
PIECE_BYTES = 4 << 20
"""Bytes per read: few enough for the processor's cache, and enough work per acquisition of the interpreter lock."""
_MAX_THREADS = 4
"""Few, since the engine starts meanwhile."""
CLOCK_SECONDS = 2.0
"""Resolution of the coarsest clock of filesystems in use (FAT, ext3, some NFS servers)."""
PATIENCE_SECONDS = 120.0
"""Longest wait for another process that hashes the same file; that process may be stopped."""
_PAUSE_SECONDS = 0.05
MAX_ENTRIES = 1024
_MAX_ENTRY_BYTES = 4096
_VERSION = 1
_DIGEST_DIGITS = 32


class ChangedFileError(Exception):
    """A file changed during the read, or is no regular file; the message names it."""


class StoppedError(Exception):
    """The caller has asked to stop."""


@dataclass(frozen=True)
class FileDigest:
    """Attributes: digest: 32 hexadecimal digits; size: bytes of the file; remembered: the file was not read."""

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
        memory: the remembered digests; None to read the file in any case.
        stop: another thread sets it to stop the work.
        leaf_bytes: bytes that a thread hashes at a time; the digest depends on it.
        piece_bytes: bytes per read; the digest does not depend on it.

    Raises:
        ChangedFileError: the file changed meanwhile, or is no regular file.
        StoppedError: `stop` was set.
        OSError: the file cannot be read.
    """
    stop = stop or threading.Event()
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a FIFO must not block
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ChangedFileError(f"{path} is not a regular file")
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
    """Hashes the leaves of an open file on several threads."""

    descriptor: int
    size: int
    leaf_bytes: int
    piece_bytes: int
    stop: threading.Event

    def digest(self) -> str:
        leaves = -(-self.size // self.leaf_bytes)
        digests: list[bytes] = [b""] * leaves
        faults: list[Exception] = []
        numbers = itertools.count()  # next() of it is atomic: it runs in C under the interpreter lock

        def work() -> None:
            buffer = memoryview(bytearray(min(self.piece_bytes, self.size)))
            try:
                while not faults and (number := next(numbers)) < leaves:
                    digests[number] = self._leaf(number * self.leaf_bytes, buffer)
            except Exception as fault:  # noqa: BLE001 - the calling thread raises it
                faults.append(fault)

        # Daemon threads: Python does not wait for them at exit, where a read may hang on a network filesystem.
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
    """The folder of remembered digests, which only its owner can read and write."""

    def __init__(
        self,
        folder: Path,
        *,
        max_entries: int = MAX_ENTRIES,
        clock_seconds: float = CLOCK_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """Create the folder, or check it.

        Args:
            max_entries: most digests kept from earlier starts; the oldest are deleted.
            clock_seconds: see `CLOCK_SECONDS`. A file that changed less than this before the read is not remembered.
            patience_seconds: see `PATIENCE_SECONDS`.

        Raises:
            OSError: the folder cannot be created or written, is a link or another user's, or is open to other users.
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
        """Return the memory in the user's cache folder; log a line and return None if it cannot be used."""
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
        """Close the folder."""
        self._folder.close()

    def open_entry(self, status: os.stat_result) -> DigestEntry | None:
        """Open or create the entry of a file, without locking it; log once and return None if that fails."""
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
    """One remembered digest. A line has version, device, inode, size, times and digest, the next line a checksum."""

    descriptor: int

    def try_to_lock(self) -> bool:
        """Lock the entry until `close`; return False if another process holds the lock."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def read(self, status: os.stat_result) -> str | None:
        """Return the remembered digest of exactly this file; None if there is none, or the entry is damaged."""
        raw = os.pread(self.descriptor, _MAX_ENTRY_BYTES, 0)
        text, _, checksum = raw.rpartition(b"\n")
        digest = text[-_DIGEST_DIGITS:]
        # The entry is compared with the text that this file would have, so it need not be parsed.
        expected = _entry_text(status, digest)
        return digest.decode() if text == expected and checksum == _checksum(text) else None

    def write(self, status: os.stat_result, digest: str) -> None:
        """Write the entry. If it is written only in part, its checksum is wrong."""
        text = _entry_text(status, digest.encode())
        with suppress(OSError):  # on a full disk the file is hashed again next time
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, text + b"\n" + _checksum(text), 0)

    def close(self) -> None:
        """Unlock and close the entry. A flock belongs to the open file, which a forked child has open, too."""
        with suppress(OSError):
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)


@contextmanager
def _claimed(
    memory: DigestMemory | None, status: os.stat_result, stop: threading.Event
) -> Iterator[DigestEntry | None]:
    """Yield the file's entry, locked; None without a memory, or if another process holds the lock for too long."""
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
    except OSError:  # the filesystem has no locks
        return False
    return True


def _check_private(mode: int, path: Path) -> None:
    if mode & 0o077:
        raise PermissionError(f"{path} is open to other users (mode {mode:o})")


def _entry_text(status: os.stat_result, digest: bytes) -> bytes:
    return b"%d %s %s" % (_VERSION, " ".join(map(str, _marks(status))).encode(), digest)


def _checksum(text: bytes) -> bytes:
    return xxhash.xxh3_128(text).hexdigest().encode()
