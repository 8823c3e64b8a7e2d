"""Says in the log how much host memory prompts would need to come back whole from the tiers below it."""

from __future__ import annotations

import math

from kvtier.events import Event, RequestGaveUp
from kvtier.log import logger
from kvtier.sizes import format_size
from kvtier.tiering.settings import TieringSettings


class RoomWarnings:
    """An observer that warns when blocks find no room on their way up, and again when twice as many do.

    An engine loads once per admission: what has no room then is computed, whatever a disk holds.
    """

    def __init__(self, settings: TieringSettings, num_blocks: int, block_bytes: int) -> None:
        """Args: num_blocks, block_bytes: of host memory."""
        self._budget, self._block_bytes = settings.promotion_budget, block_bytes
        self._memory = num_blocks * block_bytes
        self._most = settings.most_promoted(num_blocks)
        self._next = 1

    def on_event(self, event: Event) -> None:
        """Take in that a request goes on without some blocks."""
        if not isinstance(event, RequestGaveUp) or event.reason != "budget" or event.num_blocks < self._next:
            return
        self._next = 2 * event.num_blocks
        wanted = math.ceil((self._most + event.num_blocks) / self._budget) * self._block_bytes
        logger.warning(
            "kvtier: a request computes %d blocks that a tier has: with %s of host memory at most %d blocks are on "
            "their way up or held for requests at once (promotion_budget %g); with cpu_bytes_to_use of %s these would "
            "have had room, too",
            event.num_blocks,
            format_size(self._memory),
            self._most,
            self._budget,
            format_size(wanted),
        )
