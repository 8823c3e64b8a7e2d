"""Says in the log, once per cause, why blocks are computed that a tier has, or had."""

from __future__ import annotations

import logging

from kvtier.events import BlocksRecomputed, Event, RequestGaveUp
from kvtier.log import logger

_GAVE_UP = {
    "slower": (
        logging.INFO,
        "the engine computes some blocks sooner than a tier would load them, so they are not loaded",
    ),
    "deadline": (
        logging.WARNING,
        "a tier took longer to load blocks than expected, or than load_deadline; the engine computes them",
    ),
    "probe": (
        logging.WARNING,
        "a tier did not say within its probe_deadline whether it has blocks; the engine computes them",
    ),
}
"""Level and text by the reason why a request stops waiting. `RoomWarnings` speaks of the reason "budget"."""


class MissCauses:
    """An observer that logs each cause the first time; the metrics count how often it comes again."""

    def __init__(self, num_blocks: int) -> None:
        """Args: num_blocks: of host memory."""
        self._num_blocks = num_blocks
        self._num_recomputed = 0
        self._said: set[str] = set()

    def on_event(self, event: Event) -> None:
        """Take in that a request goes on without blocks, or that blocks were computed again."""
        if isinstance(event, RequestGaveUp):
            if event.reason in _GAVE_UP and event.reason not in self._said:
                self._said.add(event.reason)
                level, text = _GAVE_UP[event.reason]
                logger.log(level, "%s (%s; said once, kvtier_requests_gave_up counts)", text, event.reason)
        elif isinstance(event, BlocksRecomputed):
            self._num_recomputed += event.num_blocks
            if self._num_recomputed >= self._num_blocks and "evicted" not in self._said:
                self._said.add("evicted")
                logger.warning(
                    "%d blocks were computed again after they had been evicted, as many as host memory holds: with "
                    "more of it, or a larger or faster tier below, they would have been loaded (said once, "
                    "kvtier_recomputed_blocks counts)",
                    self._num_recomputed,
                )
