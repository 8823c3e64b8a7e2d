"""Lets one thread at a time change the manager's state. A call that overlaps another thread's call raises an error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import get_ident
from types import FunctionType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

from kvtier.errors import OverlappingCallError
from kvtier.forks import mark, notice


class HasTurns(Protocol):
    """An object that knows which thread is in one of its calls.

    Attributes:
        thread_inside: identifier of that thread; None if there is none.
    """

    thread_inside: int | None


Self = TypeVar("Self", bound=HasTurns)
Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


_CALL = """
def call(self{parameters}):
    if not mark[0]:
        notice()
    me = get_ident()
    # From the look to the mark there is no call and no jump back: CPython lets no other thread in between.
    if self.thread_inside is None:
        self.thread_inside = me
        try:
            return method(self{parameters})
        finally:
            self.thread_inside = None
    if self.thread_inside == me:
        return method(self{parameters})
    raise OverlappingCallError
"""
_NAMES = {"get_ident": get_ident, "mark": mark, "notice": notice, "OverlappingCallError": OverlappingCallError}


def in_turn(
    method: Callable[Concatenate[Self, Arguments], Answer],
) -> Callable[Concatenate[Self, Arguments], Answer]:
    """Wrap `method` so that it does nothing but raise OverlappingCallError while another thread is in a call.

    Different threads may call one after the other, and a thread may call from within its own call. No lock is taken:
    an exception from a signal handler could leave it locked, and the cache would stop for good.
    """
    # Compiled with the method's own parameters, as dataclasses compile `__init__`: passing on `*args` and `**keywords`
    # took 0.2 us more per call, as long as two lookups.
    function = cast(FunctionType, method)
    code = function.__code__
    parameters = "".join(f", {name}" for name in code.co_varnames[1 : code.co_argcount])
    scope: dict[str, Any] = {**_NAMES, "method": method}
    exec(_CALL.format(parameters=parameters), scope)
    call: Callable[Concatenate[Self, Arguments], Answer] = functools.update_wrapper(scope["call"], method)
    scope["call"].__defaults__ = function.__defaults__
    return call
