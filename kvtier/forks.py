"""Keeps a forked child from using its parent's caches.

A fork copies kvtier's tables, but parent and child share the arena, sockets and I/O processes. If both used one arena,
they would overwrite each other's blocks. So every object that holds an arena, a socket or a process registers here. In
the child, it lets go of them: its lookups miss, it stores nothing, and its shutdown does nothing. The parent goes on.

After a fork by the interpreter, a hook runs in the child. A server that forks in C (uWSGI) runs no hook, so each call
of a cache checks `mark`. `os.getpid` would take 0.25 to 1 us on virtual machines, as long as 2 to 8 lookups.
"""

from __future__ import annotations

import mmap
import os
import weakref
from typing import NoReturn, Protocol, SupportsIndex

from kvtier.log import logger

_ADVICE = (
    "kvtier: process %d is a fork of the one that made this cache, so it finds nothing and stores nothing here. "
    "Make the cache after the fork: gunicorn without --preload or in its post_fork hook, uWSGI with lazy-apps, "
    'multiprocessing with the start method "spawn".'
)


class Owner(Protocol):
    """An object with a descriptor, a process or memory that a forked child shares with its parent."""

    def leave_to_parent(self) -> None:
        """Let go of it, in a forked child, and serve nothing from now on; called once.

        Implementer must: wait for no lock, since the thread that holds it does not exist in the child; close the
        child's copies of descriptors, but change nothing that the parent sees, such as a socket's state; not rely on
        other owners, which may already have let go.
        """
        ...


class Mark(Protocol):
    """A sequence whose item 0 is 0 in a forked child until the child has left its caches to the parent."""

    def __getitem__(self, index: int, /) -> int: ...
    def __setitem__(self, index: int, value: int, /) -> None: ...


class _AskedMark:
    """Compares process ids, for kernels that cannot wipe a page at a fork."""

    def __getitem__(self, index: int, /) -> int:
        return os.getpid() == _pid

    def __setitem__(self, index: int, value: int, /) -> None:
        return


_MADV_WIPEONFORK = 18
"""Since Linux 4.14, the kernel zeroes the page in every forked child (madvise(2)). Python 3.11 has no name for it."""


def _make_mark() -> Mark:
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        page.madvise(_MADV_WIPEONFORK)
    except (AttributeError, OSError):  # an old kernel, another system, or a sandbox (gVisor) that does not know it
        page.close()
        return _AskedMark()
    page[0] = 1
    return page


class ProcessBound:
    """Holds what another process, or a copy, cannot have: it is neither pickled nor copied."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse.

        Raises:
            TypeError: always.
        """
        name = type(self).__name__
        raise TypeError(f"a {name} belongs to the process that made it: make one there, of the same configuration")


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()
_left: list[Owner] = []
"""The parent's objects, never destroyed in the child: the destructor of a client library might send to a server."""
_pid = os.getpid()
_advised_pid = 0
mark = _make_mark()
"""The mark of this process; every call that changes a cache checks it."""


def register(owner: Owner) -> None:
    """Call `owner.leave_to_parent` in each forked child. This does not keep `owner` alive."""
    _owners.add(owner)


def advise() -> None:
    """Log, once per process, why a cache from before the fork is empty, and what to do.

    A cache calls this when it finds that it is in a forked child. In servers that fork without the interpreter (uWSGI),
    this call also leaves the caches to the parent.
    """
    global _advised_pid
    notice()
    if _advised_pid != _pid:
        _advised_pid = _pid
        logger.warning(_ADVICE, _pid)


def notice() -> None:
    """Leave all caches to the parent if this is a forked child whose hook did not run."""
    if not mark[0]:
        _leave_to_parent()


def _leave_to_parent() -> None:
    global _pid
    _pid = os.getpid()
    mark[0] = 1
    owners = list(_owners)
    _owners.clear()
    _left.extend(owners)
    for owner in owners:
        try:
            owner.leave_to_parent()
        except Exception:  # logged: the other owners must let go, too
            logger.exception("kvtier: %s could not be left to the parent process", type(owner).__name__)


os.register_at_fork(after_in_child=_leave_to_parent)
