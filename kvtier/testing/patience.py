"""How long a test waits for what must happen: one patience for all waits, generous, and scaled for slow machines."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

_SCALE = float(os.environ.get("KVTIER_TEST_PATIENCE", "1"))
PATIENCE_SECONDS = 300.0 * _SCALE
"""Only a test that fails waits so long. `KVTIER_TEST_PATIENCE` multiplies it."""
TEST_SECONDS = 3 * PATIENCE_SECONDS
"""How long one whole test may take, with the start of a server or the making of a model that it is the first to use."""
_POLL_SECONDS = 0.001

Answer = TypeVar("Answer")


def wait_for(condition: Callable[[], Answer], what: str = "the condition") -> Answer:
    """Ask `condition` until its answer is true, and return that; fail with `what` when the patience ends."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_SECONDS:g} s"
        time.sleep(_POLL_SECONDS)
    return answer
