"""KV events for engines that publish them: which blocks entered and left host memory."""

from __future__ import annotations

from collections.abc import Sequence

from kvtier.events import BlocksEvicted, BlocksStored, Event, LoadFailed
from kvtier.keys import OffloadKey
from kvtier.types import Locality, Medium, OffloadingEvent


class KVEventLog:
    """Collects events of the primary tier until they are taken."""

    def __init__(self) -> None:
        self._events: list[OffloadingEvent] = []

    def on_event(self, event: Event) -> None:
        """Note blocks that entered or left the primary tier."""
        match event:
            case BlocksStored(keys, _):
                self._append(keys, removed=False)
            case BlocksEvicted("primary", keys) | LoadFailed(_, keys) if keys:
                self._append(keys, removed=True)
            case _:
                pass

    def cleared(self, keys: Sequence[OffloadKey]) -> None:
        """Note blocks that a reset removed."""
        if keys:
            self._append(keys, removed=True)

    def _append(self, keys: Sequence[OffloadKey], removed: bool) -> None:
        self._events.append(OffloadingEvent(list(keys), Medium.CPU, removed, Locality.LOCAL))

    def take(self) -> list[OffloadingEvent]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events
