"""The store of tier type `filesystem`: each block is a file that holds its payload and then its header of 128 bytes.

A file gets its final name by a rename when it is complete, and never changes. A reader that has opened it can read it
even after it was deleted. There is no fsync: a host that crashes may leave a file with a hole, which fails its
checksum.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from kvtier.abc import StoreContext
from kvtier.errors import StoreError, StoreUnavailableError, describe
from kvtier.keys import OffloadKey
from kvtier.stores.failures import UNREADABLE, SystemErrors, fitting_buffers
from kvtier.stores.filesystem.directory import SharedDirectory, is_block, shard_names, shard_of
from kvtier.stores.filesystem.janitor import Janitor
from kvtier.stores.filesystem.options import SharedDirectoryOptions
from kvtier.stores.integrity import open_sealer
from kvtier.stores.integrity.header import HEADER_BYTES
from kvtier.stores.integrity.sealing import Sealer
from kvtier.stores.mounts import check_size
from kvtier.stores.own_files import Folder, StrangerError
from kvtier.stores.varied import VariedStore
from kvtier.stores.vectored import NO_SPACE_ERRORS, read_fully, write_fully
from kvtier.types import FailureCause, KeyPage, StoreUsage

_ABSENT_ERRORS = frozenset({errno.ENOENT, errno.ESTALE, errno.ENOTDIR})
"""ESTALE is NFS's error when another host has deleted the file meanwhile."""
_SECONDS_FRESH = 300.0
"""A read renews the file's modification time if it is older than this, since the janitor deletes the oldest files."""
_PROBES_FIRST = 32
"""Probes that are made one after the other, to measure the filesystem's latency."""
_PROBES_AT_ONCE = 16
_SECONDS_BETWEEN_STATFS = 0.5
_SECONDS_BETWEEN_RELIEFS = 1.0


class FilesystemStore(VariedStore):
    """Sealed blocks of one namespace in a shared directory. It counts and deletes blocks that do not verify."""

    slow_probe_seconds = 0.0001
    """From so long per probe on, the remaining probes of a call are made in parallel."""

    def __init__(
        self, directory: SharedDirectory, janitor: Janitor, sealer: Sealer, min_free: int, context: StoreContext
    ) -> None:
        """Args: min_free: bytes of the filesystem that must stay free."""
        self._directory = directory
        self._janitor = janitor
        self._min_free = min_free
        self._failures = context.failures
        self._block_bytes, self._compressed = context.block_bytes, context.compressed
        self._sealer = sealer
        self._lock = threading.Lock()
        self._free = (0.0, 0)
        self._relieved_at = -_SECONDS_BETWEEN_RELIEFS
        self._errors = SystemErrors(directory.path, context.failures)
        self._askers = ThreadPoolExecutor(_PROBES_AT_ONCE, "kvtier-probe")

    @classmethod
    def open(cls, options: Mapping[str, Any], context: StoreContext) -> Self:
        """Open a directory.

        Args:
            options: `SharedDirectoryOptions`.

        Raises:
            StoreUnavailableError: the secret cannot be read, the directory is not kvtier's or cannot be used, or its
                filesystem is smaller than the capacity.
        """
        _, sealer = open_sealer(options, context.namespace, context.whole_bytes)
        read = SharedDirectoryOptions.read(options)
        path, capacity, min_free = Path(read.path), read.capacity, read.min_free
        directory = SharedDirectory.open(path, sealer.namespace, read.mount_point)
        try:
            check_size(path, directory.folder.descriptor, capacity, min_free)
        except StoreUnavailableError:
            directory.close()
            raise
        janitor = Janitor(directory, capacity, min_free, context.block_bytes)
        janitor.start()
        return cls(directory, janitor, sealer, min_free, context)

    def path_of(self, key: OffloadKey) -> Path:
        """Return the path of a block's file."""
        return self._directory.path / self._directory.namespace_name / shard_of(key) / key.hex()

    def contains(self, keys: Sequence[OffloadKey]) -> list[bool]:
        """Return per key whether its file exists; on a slow filesystem, probe in parallel.

        Raises:
            StoreError: every probe failed.
        """
        return self._contained(keys, most_broken=max(0, len(keys) - 1))

    def _contained(self, keys: Sequence[OffloadKey], most_broken: int) -> list[bool]:
        self._directory.check_present()
        try:
            with self._directory.namespace() as namespace:
                answers = self._ask(namespace, keys)
        except FileNotFoundError:
            return [False] * len(keys)
        except OSError as error:
            raise StoreError(f"{error.filename or self._directory.path}: {describe(error)}") from error
        broken = [answer for answer in answers if isinstance(answer, OSError)]
        if len(broken) > most_broken:
            raise StoreError(f"{self._directory.path}: {describe(broken[0])}") from broken[0]
        return [answer is True for answer in answers]

    def ask_held(self, keys: Sequence[OffloadKey]) -> list[bool]:
        """As `contains`, but raise StoreError if one probe fails."""
        return self._contained(keys, most_broken=0)

    def _ask(self, namespace: Folder, keys: Sequence[OffloadKey]) -> list[bool | OSError]:
        """Return per key whether its file exists, or the error of the probe."""
        started = time.perf_counter()
        answers = [_exists(namespace, key) for key in keys[:_PROBES_FIRST]]
        rest = keys[_PROBES_FIRST:]
        if time.perf_counter() - started < self.slow_probe_seconds * len(answers):
            answers += [_exists(namespace, key) for key in rest]
        else:
            answers += self._askers.map(_exists, itertools.repeat(namespace), rest)
        return answers

    def write(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        """Store the blocks, the last one first. So a prefix's head has the newest file, and is deleted last.

        Raises:
            StoreUnavailableError: the directory is gone.
        """
        self._directory.check_present()
        fitting = fitting_buffers(keys, buffers, self._block_bytes, self._failures, self._compressed)
        results = [False] * len(keys)
        for done, index in enumerate(reversed(fitting)):
            shard = shard_of(keys[index])
            try:
                self._check_free()
                num_bytes = self._write_one(keys[index], shard, buffers[index])
            except OSError as error:
                if error.errno not in NO_SPACE_ERRORS:
                    self._errors.count(error)
                    continue
                self._errors.count(error, len(fitting) - done)
                self._relieve(shard)
                break
            results[index] = True
            self._janitor.wrote(shard, num_bytes)
        return results

    def read_varied(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[int]:
        """Fill and verify buffers; return the lengths of the payloads, 0 for a block that failed."""
        lengths = [0] * len(keys)
        fitting = fitting_buffers(keys, buffers, self._block_bytes, self._failures)
        try:
            namespace = self._directory.namespace()
        except OSError as error:
            if error.errno in _ABSENT_ERRORS:
                self._failures.count(FailureCause.ABSENT, len(fitting))
            else:
                self._errors.count(error, len(fitting))
            return lengths
        with namespace:
            self._read_all(namespace, fitting, keys, buffers, lengths)
        return lengths

    def _read_all(
        self,
        namespace: Folder,
        fitting: Sequence[int],
        keys: Sequence[OffloadKey],
        buffers: Sequence[memoryview],
        lengths: list[int],
    ) -> None:
        for index in reversed(fitting):
            cause: FailureCause | int
            try:
                cause = self._read_from_shard(namespace, keys[index], buffers[index])
            except StrangerError:
                cause = FailureCause.FOREIGN
            except OSError as error:
                if error.errno not in _ABSENT_ERRORS:
                    self._errors.count(error)
                    continue
                cause = FailureCause.ABSENT
            if isinstance(cause, FailureCause):
                self._failures.count(cause)
            else:
                lengths[index] = cause

    def delete(self, keys: Sequence[OffloadKey]) -> None:
        """Forget `keys`.

        Raises:
            StoreError: a file could not be deleted; the others were.
        """
        self._directory.check_present()
        broken: OSError | None = None
        for key in keys:
            try:
                with self._directory.namespace() as namespace, namespace.folder(shard_of(key)) as folder:
                    folder.unlink(key.hex())
            except OSError as error:
                if error.errno not in _ABSENT_ERRORS:
                    self._errors.log(error)
                    broken = error
        if broken is not None:
            raise StoreError(f"{broken.filename or self._directory.path}: {describe(broken)}") from broken

    def keep(self, keys: Sequence[OffloadKey], seconds: float) -> list[bool]:
        """Renew the files' times, since all hosts delete the oldest files first.

        Raises:
            StoreError: a file's folder cannot be used.
        """
        self._directory.check_present()
        try:
            with self._directory.namespace() as namespace:
                return [_renew(namespace, key) for key in keys]
        except OSError as error:
            if error.errno in _ABSENT_ERRORS:
                return [False] * len(keys)
            raise StoreError(f"{error.filename or self._directory.path}: {describe(error)}") from error

    def list_keys(self, cursor: bytes, most: int) -> KeyPage:
        """List the files, shard by shard, in order of their names.

        Raises:
            StoreError: a folder cannot be read.
        """
        self._directory.check_present()
        shard, _, after = cursor.decode(errors="replace").partition("/")
        found: list[OffloadKey] = []
        try:
            with self._directory.namespace() as namespace:
                for name in sorted(one for one in shard_names(namespace, "") if one >= shard):
                    left = _blocks_in(namespace, name, after if name == shard else "")
                    room = most - len(found)
                    found += [OffloadKey(bytes.fromhex(block)) for block in left[:room]]
                    if len(left) >= room:
                        return KeyPage(found, f"{name}/{found[-1].hex()}".encode())
        except OSError as error:
            if error.errno not in _ABSENT_ERRORS:
                raise StoreError(f"{error.filename or self._directory.path}: {describe(error)}") from error
        return KeyPage(found, None)

    def usage(self) -> StoreUsage:
        """Return the janitor's estimate of what the directory holds, of all namespaces and hosts."""
        return self._janitor.usage

    def close(self) -> None:
        """Stop the janitor and close the directory."""
        self._askers.shutdown(wait=False, cancel_futures=True)
        if self._janitor.close():
            self._directory.close()

    def _write_one(self, key: OffloadKey, shard: str, buffer: memoryview) -> int:
        """Store a block; return the bytes that it takes on the filesystem."""
        with self._directory.begin_file(shard) as new:
            try:
                try:
                    (stored,), (header,) = self._sealer.seal([key], [buffer])
                    written = write_fully(new.descriptor, [stored, memoryview(header)], 0)
                    taken = max(written, os.fstat(new.descriptor).st_blocks * 512)
                finally:
                    os.close(new.descriptor)  # NFS writes back on close, and may report only here that space is out
                if written < buffer.nbytes + HEADER_BYTES:
                    raise OSError(errno.EIO, "only a part was written")
                new.folder.rename(new.name, key.hex())
            except BaseException:
                with contextlib.suppress(OSError):
                    new.folder.unlink(new.name)
                raise
        return taken + new.folder_bytes

    def _read_from_shard(self, namespace: Folder, key: OffloadKey, buffer: memoryview) -> FailureCause | int:
        """Fill a buffer from a block's file; delete the file if the block is unreadable.

        Returns:
            The payload's length, or why it failed.
        """
        with namespace.folder(shard_of(key)) as folder:
            result = self._read_one(key, folder.open_file(key.hex()), buffer)
            if result in UNREADABLE:
                try:
                    folder.unlink(key.hex())
                except OSError as error:  # deleting is a favour: the block is unreadable all the same
                    if error.errno not in _ABSENT_ERRORS:
                        self._errors.log(error)
            return result

    def _read_one(self, key: OffloadKey, descriptor: int, buffer: memoryview) -> FailureCause | int:
        """Fill a buffer from an open file, and close the file. Return the payload's length, or why it failed."""
        try:
            status = os.fstat(descriptor)
            payload_bytes = status.st_size - HEADER_BYTES
            if not 0 < payload_bytes <= self._block_bytes:
                return FailureCause.CORRUPT
            into = [buffer[:payload_bytes]]
            header = memoryview(bytearray(HEADER_BYTES))
            rooms = self._sealer.rooms(into)
            if read_fully(descriptor, [*rooms, header], 0) != status.st_size:
                return FailureCause.CORRUPT
            (cause,) = self._sealer.open([header], [key], rooms, into)
            if cause is not None:
                return FailureCause.CORRUPT if cause is FailureCause.ABSENT else cause
            if payload_bytes < self._block_bytes and not self._compressed:
                return FailureCause.CORRUPT
            if status.st_mtime < self._directory.roughly_now() - _SECONDS_FRESH:
                with contextlib.suppress(OSError):
                    os.utime(descriptor)
            return payload_bytes
        finally:
            os.close(descriptor)

    def _check_free(self) -> None:
        """Raise OSError (ENOSPC) if another block would leave less than `min_free`."""
        if not self._min_free:
            return
        with self._lock:
            asked_at, free = self._free
            if (now := time.monotonic()) - asked_at > _SECONDS_BETWEEN_STATFS:
                status = os.statvfs(self._directory.folder.descriptor)
                asked_at, free = now, status.f_bavail * status.f_frsize if status.f_blocks else 1 << 62
            free -= self._block_bytes + HEADER_BYTES
            self._free = (asked_at, free)
        if free < self._min_free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _relieve(self, shard: str) -> None:
        """Delete some old blocks on a full filesystem, so that new blocks can replace them."""
        with self._lock:
            if (now := time.monotonic()) - self._relieved_at < _SECONDS_BETWEEN_RELIEFS:
                return
            self._relieved_at = now
        self._janitor.relieve(shard)


def _renew(namespace: Folder, key: OffloadKey) -> bool:
    """Set the time of a block's file to now; return whether there is one."""
    try:
        with namespace.folder(shard_of(key)) as folder:
            descriptor = folder.open_file(key.hex())
    except StrangerError:
        return False
    except OSError as error:
        if error.errno in _ABSENT_ERRORS:
            return False
        raise
    try:
        with contextlib.suppress(OSError):
            os.utime(descriptor)
        return True
    finally:
        os.close(descriptor)


def _blocks_in(namespace: Folder, shard: str, after: str) -> list[str]:
    """Return the names of a shard's blocks that come after one, in order; none if the shard is gone."""
    try:
        with namespace.folder(shard) as folder:
            return sorted(name for name in folder.names() if name > after and is_block(name))
    except FileNotFoundError:
        return []


def _exists(namespace: Folder, key: OffloadKey) -> bool | OSError:
    """Return whether a block's file exists, or the error of the probe."""
    try:
        return namespace.has_file(shard_of(key), key.hex())
    except OSError as error:
        return False if error.errno in _ABSENT_ERRORS else error
