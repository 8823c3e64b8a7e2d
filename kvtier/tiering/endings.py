"""Ends that are bounded in time, though what they wait for may never end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from kvtier.log import logger


def run_bounded(calls: Sequence[tuple[str, Callable[[], object]]], timeout: float) -> list[threading.Thread | None]:
    """Run all calls at once and wait for them together.

    Args:
        calls: (name for the log, what to call); a call that raises is logged and counts as ended.
        timeout: longest wait, in seconds of real time.

    Returns:
        Per call, None if it ended, else the (daemon) thread that is still in it.
    """
    threads = [threading.Thread(target=_logged, args=call, name=f"kvtier-end-{call[0]}", daemon=True) for call in calls]
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [thread if thread.is_alive() else None for thread in threads]


def _logged(name: str, call: Callable[[], object]) -> None:
    try:
        call()
    except Exception:
        logger.exception("tier %s failed at its end", name)
