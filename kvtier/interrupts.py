"""Keeps Ctrl-C from ending a thread in the middle of a lock's code."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_noted() -> Iterator[Callable[[], None]]:
    """Let SIGINT only be noted; yield a function that raises KeyboardInterrupt if it came. So does the end.

    `concurrent.futures` acquires and releases locks in Python code. A KeyboardInterrupt between the two leaves one
    held, and the threads that need it wait for ever. So whoever waits for futures does it here, for a moment at a time,
    and calls the function in between.

    Where KeyboardInterrupt would not be raised, because this is not the main thread or the program handles SIGINT in
    its own way, nothing changes.
    """
    seen: list[int] = []
    notes = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )

    def check() -> None:
        if seen:
            raise KeyboardInterrupt

    if notes:
        signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        yield check
    finally:
        if notes:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # after the one above, if it has just come
    check()
