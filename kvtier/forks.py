"""What a forked child does with the caches of its parent: nothing.

A fork copies kvtier's tables and shares its arena, sockets and processes. Two processes that decide over one arena
would overwrite each other's blocks. So every object that holds one of these registers here, and lets go of it in the
child: its lookups miss, it stores nothing, and its end touches nothing. The parent goes on as if nothing had happened.

The interpreter's fork calls a hook in the child. A server that forks in C (uWSGI) calls none, so each call of a cache
looks at `mark`: to ask the kernel for the process took 0.25 to 1 us on virtual machines, as long as 2 to 8 lookups.
"""

from __future__ import annotations

import mmap
import os
import weakref
from typing import Protocol

from kvtier.log import logger

_ADVICE = (
    "kvtier: process %d is a fork of the one that made this cache, so it finds nothing and stores nothing here. "
    "Make the cache after the fork: gunicorn without --preload or in its post_fork hook, uWSGI with lazy-apps, "
    'multiprocessing with the start method "spawn".'
)


class Owner(Protocol):
    """Holds a descriptor, a process or memory that a forked child shares with its parent."""

    def leave_to_parent(self) -> None:
        """Let go of it, in a forked child, and serve nothing from now on; called once.

        Implementer must: wait for no lock, since the thread that holds it is not there; change nothing that the parent
        sees, such as the state of a socket, but close the child's own copies of descriptors; rely on no other owner.
        """
        ...


class Mark(Protocol):
    """A place whose item 0 is 0 in a forked child that has not left its parent's caches yet."""

    def __getitem__(self, index: int, /) -> int: ...
    def __setitem__(self, index: int, value: int, /) -> None: ...


class _AskedMark:
    """For kernels that cannot wipe a page: asks which process this is."""

    def __getitem__(self, index: int, /) -> int:
        return os.getpid() == _pid

    def __setitem__(self, index: int, value: int, /) -> None:
        return


_MADV_WIPEONFORK = 18
"""Linux 4.14: a child finds zeros in the page, however it was forked (madvise(2)); Python 3.11 has no name for it."""


def _make_mark() -> Mark:
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        page.madvise(_MADV_WIPEONFORK)
    except (AttributeError, OSError):  # an old kernel, another system, or a sandbox that stands for a kernel
        page.close()
        return _AskedMark()
    page[0] = 1
    return page


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()
_left: list[Owner] = []
"""Kept as long as the child lives: a destructor of a client library might speak to a server."""
_pid = os.getpid()
_advised_pid = 0
mark = _make_mark()
"""The mark of this process: looked at by each call that changes a cache."""


def register(owner: Owner) -> None:
    """Let `owner` know when it is in a forked child; it is not kept alive by this."""
    _owners.add(owner)


def advise() -> None:
    """Say, once per process, why a cache from before the fork is empty, and what to do.

    To be called by a cache that finds itself in another process than the one that made it. Servers that fork without
    the interpreter (uWSGI) have the caches left to the parent here.
    """
    global _advised_pid
    notice()
    if _advised_pid != _pid:
        _advised_pid = _pid
        logger.warning(_ADVICE, _pid)


def notice() -> None:
    """Leave everything to the parent if this is a child that the interpreter was not told of."""
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
        except Exception:  # the others must let go, too
            logger.exception("kvtier: %s could not be left to the parent process", type(owner).__name__)


os.register_at_fork(after_in_child=_leave_to_parent)
