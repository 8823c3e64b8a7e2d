"""One caller at a time: a call that changes the manager's state while another thread is in one gets an error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from os import getpid
from threading import get_ident
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from kvtier import forks
from kvtier.errors import OverlappingCallError


class HasTurns(Protocol):
    """Notes which thread is in one of its calls.

    Attributes:
        pid: process that made it.
        thread_inside: that thread's identifier; None while there is none.
    """

    pid: int
    thread_inside: int | None


Self = TypeVar("Self", bound=HasTurns)
Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


def in_turn(
    method: Callable[Concatenate[Self, Arguments], Answer],
) -> Callable[Concatenate[Self, Arguments], Answer]:
    """Return `method`, which raises OverlappingCallError, and does nothing, while another thread is in a call.

    Threads may change between calls, and a call may come from within another one of its thread. No lock is taken: one
    that an exception of a signal handler left locked would stop the cache for good.
    """

    @functools.wraps(method)
    def call(self: Self, /, *args: Arguments.args, **keywords: Arguments.kwargs) -> Answer:
        me = get_ident()
        if self.thread_inside == me:
            return method(self, *args, **keywords)
        if getpid() != self.pid:
            forks.notice()
        # From the look to the mark there is no call and no jump back: CPython lets no other thread in between.
        if self.thread_inside is not None:
            raise OverlappingCallError
        self.thread_inside = me
        try:
            return method(self, *args, **keywords)
        finally:
            self.thread_inside = None

    return call
