"""Keeps a shared directory within its capacity, without locks, a leader or an index.

The shards form groups. Each group has an equal share of the capacity; keys are hashed, so groups fill evenly. To look
into a group is to list its files, of all namespaces, and to delete the oldest until the group is within its share. If
two hosts look at the same time, they choose the same files, and one of them finds the files gone.

A writer looks into a group after it has written to it: with a probability that grows with the bytes, and certainly
after a part of the group's free room. So a thousand writers together look about as often as one that writes as many
bytes. In
addition, hosts sweep: once per hour, the first host that finds a group's turn come looks into it, for files that dead
writers have left, and in case the capacity is smaller now.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from kvtier.log import logger
from kvtier.stores.filesystem.directory import SHARD_DIGITS, SharedDirectory, is_block, is_unfinished, shard_names
from kvtier.stores.own_files import Folder, StrangerError
from kvtier.types import StoreUsage

MIN_GROUP_BLOCKS = 64
_USUAL_BLOCK_BYTES = 2 << 20
_KEEP = 7 / 8
"""A full group is cut down to this part of its share; the rest is room for writes until the next look."""
_LOOK_EACH = 32
"""Number of looks into a full group while its whole share is written once."""
SECONDS_TO_LEAVE = 600.0
"""Age of an unfinished file at which its writer is taken for dead."""
_LEAVE_NS = int(SECONDS_TO_LEAVE * 1e9)
SWEEP_SECONDS = 3600.0
"""Time in which the hosts together look into every group."""
_BETWEEN_SWEEPS = (30.0, 60.0)
_RELIEF = 1 / 16
"""Part of a group that is deleted at once because the filesystem is full."""


class Held(NamedTuple):
    """A file. Sorted, files come in the order in which they are deleted: oldest first."""

    changed: int
    shard: _Shard
    name: str
    size: int


class _Shard(NamedTuple):
    """The folder of a file."""

    namespace: str
    name: str


@dataclass
class _Group:
    """What this process knows about a group.

    Attributes:
        written: bytes that it has written since its last look into the group.
        room: free bytes of the group's share at that look.
        held: files and bytes in the group after that look; None before the first look.
    """

    written: int = 0
    room: float = 0.0
    held: tuple[int, int] | None = None


def group_digits(capacity: int, block_bytes: int) -> int:
    """Return how many leading digits of a shard name its group: as many as leave room for enough blocks per group."""
    least = MIN_GROUP_BLOCKS * max(block_bytes, _USUAL_BLOCK_BYTES)
    return next((digits for digits in range(SHARD_DIGITS, 0, -1) if capacity >> 4 * digits >= least), 0)


class Janitor:
    """Deletes the oldest blocks of a directory. Threads may share it; any number of processes may each run one.

    Attributes:
        usage: estimate of what the directory holds, made after each look; before the first one, only the capacity.
    """

    def __init__(self, directory: SharedDirectory, capacity: int, min_free: int, block_bytes: int) -> None:
        """Args: capacity: most bytes of all files; min_free: bytes of the filesystem that must stay free."""
        self._directory = directory
        self._min_free = min_free
        self._digits = group_digits(capacity, block_bytes)
        self.num_groups = 1 << 4 * self._digits
        self._capacity = capacity
        self._share = capacity / self.num_groups
        self._groups: dict[str, _Group] = {}
        self.usage = StoreUsage(capacity_bytes=capacity)
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._complained: set[type[OSError]] = set()
        self._thread = threading.Thread(target=self._run, name="kvtier-janitor", daemon=True)

    def start(self) -> None:
        """Start the thread that sweeps."""
        self._thread.start()

    def close(self) -> bool:
        """Stop the thread; return False if it has not ended within a second, as when the filesystem hangs."""
        self._ending.set()
        if self._thread.ident is not None:
            self._thread.join(1.0)
        return not self._thread.is_alive()

    def wrote(self, shard: str, num_bytes: int) -> None:
        """Count a written block, and look into its group if it is time to."""
        name = shard[: self._digits]
        with self._lock:
            group = self._groups.setdefault(name, _Group())
            group.written += num_bytes
            enough = max(self._share / _LOOK_EACH, group.room / 4)
            due = group.written >= enough or random.random() * enough < num_bytes
            if due:
                group.written = 0
        if due:
            self._guarded(lambda: self.look(name))

    def relieve(self, shard: str) -> None:
        """Delete a few of the oldest blocks of a group, because the filesystem or a quota is full."""
        self._guarded(lambda: self.look(shard[: self._digits], give_up=_RELIEF))

    def look(self, group: str, give_up: float = 0.0) -> None:
        """Delete unfinished files of dead writers in a group, and its oldest blocks if it exceeds its share.

        Args:
            give_up: part of the group to delete in any case.

        Raises:
            OSError: the directory cannot be read.
        """
        group_of_files = _Contents(self._directory)
        now = int(self._directory.now() * 1e9)
        for name in self._directory.namespace_names():
            self._enter(name, group, now, group_of_files)
        used = group_of_files.num_bytes
        share = max(0.0, (self._capacity - group_of_files.shared_bytes) / self.num_groups - self._shortage())
        most = used * (1 - give_up) if give_up else share * (_KEEP if used > share * (_KEEP + 1) / 2 else 1)
        group_of_files.shrink(most)
        with self._lock:
            seen = self._groups.setdefault(group, _Group())
            seen.room = max(0.0, share - group_of_files.num_bytes)
            seen.held = group_of_files.num_files, group_of_files.num_bytes
            self.usage = self._estimate(group_of_files.shared_bytes)

    def _estimate(self, shared_bytes: int) -> StoreUsage:
        """Return the usage under the assumption that all groups are as full as those that this process has seen."""
        held = [group.held for group in self._groups.values() if group.held is not None]
        files, num_bytes = (sum(column) * self.num_groups // len(held) for column in zip(*held, strict=True))
        return StoreUsage(files, num_bytes + shared_bytes, self._capacity)

    def _enter(self, name: str, group: str, now: int, found: _Contents) -> None:
        """Add a group's files of one namespace; leave strangers alone."""
        try:
            with self._directory.folder.folder(name) as namespace:
                found.shared_bytes += namespace.own_bytes
                for shard in shard_names(namespace, group):
                    try:
                        with namespace.folder(shard) as folder:
                            found.add(_Shard(name, shard), folder, now)
                    except StrangerError as error:
                        self._complain(error)
                    except FileNotFoundError:
                        continue
                    found.drop_if_empty(_Shard(name, shard))
        except StrangerError as error:
            self._complain(error)
        except FileNotFoundError:
            return

    def sweep(self) -> int:
        """Look into the groups whose turn it is; return their number, 0 if another host has done so."""
        now = self._directory.now()
        step = SWEEP_SECONDS / self.num_groups
        turn = int(now / step)
        last = self._directory.last_swept()
        # A time to come is of a clock that was set back since: by it, nobody would sweep until then.
        count = min(self.num_groups, turn - int(last / step)) if last < now + SWEEP_SECONDS else self.num_groups
        if count <= 0:
            return 0
        self._directory.note_sweep()
        for number in range(turn - count, turn):
            if self._ending.is_set():
                break
            digits = self._digits
            self.look(f"{number % self.num_groups:0{digits}x}" if digits else "")
        for name in self._directory.namespace_names():
            if name != self._directory.namespace_name:
                self._directory.folder.remove_empty(name)
        return count

    def _shortage(self) -> float:
        """Return this group's part of the bytes that the filesystem lacks to `min_free`."""
        if not self._min_free:
            return 0.0
        status = os.statvfs(self._directory.folder.descriptor)
        missing = self._min_free - status.f_bavail * status.f_frsize if status.f_blocks else 0
        return max(0, missing) / self.num_groups

    def _run(self) -> None:
        pause = 0.0
        while not self._ending.wait(pause):
            self._guarded(self.sweep)
            pause = random.uniform(*_BETWEEN_SWEEPS)

    def _guarded(self, work: Callable[[], object]) -> None:
        """Do `work`; log an OSError once. The next turn tries again."""
        try:
            work()
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        """Log the first error of each type."""
        with self._lock:
            is_new = type(error) not in self._complained
            self._complained.add(type(error))
        if is_new:
            what = "left alone, it is not kvtier's" if isinstance(error, StrangerError) else "cannot delete old blocks"
            logger.warning("%s: %s: %s", error.filename or self._directory.path, what, error.strerror)


class _Contents:
    """The files of one group, and the bytes that they and their folders take.

    Attributes:
        num_files: blocks, including unfinished ones.
        num_bytes: of the files and their folders.
        shared_bytes: of the directory itself and of the namespaces' folders, which belong to no group.
    """

    def __init__(self, directory: SharedDirectory) -> None:
        self.num_files = self.num_bytes = 0
        self.shared_bytes = directory.own_bytes()
        self._directory = directory
        self._held: list[Held] = []
        self._folders: dict[_Shard, tuple[int, int]] = {}

    def add(self, shard: _Shard, folder: Folder, now: int) -> None:
        """Add the files of a shard; delete unfinished files of dead writers, and leave strangers alone; now: in ns."""
        before = len(self._held)
        for name in folder.names():
            unfinished = is_unfinished(name)
            if not (unfinished or is_block(name)) or not folder.is_own_file(name):
                continue
            try:
                status = folder.status(name)
            except FileNotFoundError:
                continue
            # What is younger than now was written by a clock that was set back since: it is taken for the oldest.
            changed = status.st_mtime_ns if status.st_mtime_ns < now + _LEAVE_NS else 0
            if unfinished and changed < now - _LEAVE_NS:
                with contextlib.suppress(OSError):
                    folder.unlink(name)
                    continue
            self._held.append(Held(changed, shard, name, max(status.st_size, status.st_blocks * 512)))
            self.num_files += 1
            self.num_bytes += self._held[-1].size
        self._folders[shard] = folder.own_bytes, len(self._held) - before
        self.num_bytes += folder.own_bytes

    def drop_if_empty(self, shard: _Shard) -> None:
        """Remove the folder of a shard that has no files; a writer creates it again when needed."""
        num_bytes, count = self._folders.get(shard, (0, 1))
        if not count and self._is_gone(shard.namespace, lambda namespace: namespace.remove_empty(shard.name)):
            self.num_bytes -= num_bytes

    def shrink(self, most: float) -> None:
        """Delete the oldest files until at most `most` bytes are left, and the folders that this leaves empty."""
        for file in sorted(self._held):
            if self.num_bytes <= most:
                break
            if self._is_gone(file.shard.namespace, partial(_delete_in, file.shard.name, file.name)):
                self.num_files -= 1
                self.num_bytes -= file.size
                num_bytes, count = self._folders[file.shard]
                self._folders[file.shard] = num_bytes, count - 1
                self.drop_if_empty(file.shard)

    def _is_gone(self, namespace: str, remove: Callable[[Folder], bool]) -> bool:
        """Remove something from a namespace's folder; return whether it is gone, whoever removed it."""
        try:
            with self._directory.folder.folder(namespace) as folder:
                return remove(folder)
        except FileNotFoundError:
            return True
        except OSError:
            return False


def _delete_in(shard: str, name: str, namespace: Folder) -> bool:
    """Delete a file of a shard; return True if its name is gone."""
    with namespace.folder(shard) as folder:
        return folder.unlink(name)
