"""What a forked child does with the caches of its parent: nothing.

A fork copies kvtier's tables and shares its arena, sockets and processes. Two processes that decide over one arena
would overwrite each other's blocks. So every object that holds one of these registers here, and lets go of it in the
child: its lookups miss, it stores nothing, and its end touches nothing. The parent goes on as if nothing had happened.

The kernel's fork calls no Python, but the interpreter's does, after it: no call of a cache has to ask where it runs.
"""

from __future__ import annotations

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


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()
_left: list[Owner] = []
"""Kept as long as the child lives: a destructor of a client library might speak to a server."""
_pid = os.getpid()
_advised_pid = 0


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
    if os.getpid() != _pid:
        _leave_to_parent()


def _leave_to_parent() -> None:
    global _pid
    _pid = os.getpid()
    owners = list(_owners)
    _owners.clear()
    _left.extend(owners)
    for owner in owners:
        try:
            owner.leave_to_parent()
        except Exception:  # the others must let go, too
            logger.exception("kvtier: %s could not be left to the parent process", type(owner).__name__)


os.register_at_fork(after_in_child=_leave_to_parent)
