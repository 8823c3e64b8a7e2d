"""How long tests wait for something that must happen: one long limit for all waits, which can be scaled."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

_SCALE = float(os.environ.get("KVTIER_TEST_PATIENCE", "1"))
PATIENCE_SECONDS = 300.0 * _SCALE
"""Only a failing test waits so long. The environment variable `KVTIER_TEST_PATIENCE` multiplies it."""
TEST_SECONDS = 3 * PATIENCE_SECONDS
"""How long a whole test may take, including the start of a server or the making of a model."""
_POLL_SECONDS = 0.001

Answer = TypeVar("Answer")


def wait_for(condition: Callable[[], Answer], what: str = "the condition", seconds: float = PATIENCE_SECONDS) -> Answer:
    """Call `condition` until its answer is true, and return the answer; after `seconds`, fail with `what`."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(_POLL_SECONDS)
    return answer
