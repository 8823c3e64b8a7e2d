"""KV events for engines that publish them: which blocks entered and left host memory."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace

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

    def failed(self, keys: Sequence[OffloadKey]) -> None:
        """Note blocks that did not become ready, since their stores failed."""
        if keys:
            self._append(keys, removed=True, metadata_only=True)

    def _append(self, keys: Sequence[OffloadKey], removed: bool, *, metadata_only: bool = False) -> None:
        event = OffloadingEvent(list(keys), Medium.CPU, removed, Locality.LOCAL, metadata_only=metadata_only)
        self._events.append(event)

    def take(self, held: Container[OffloadKey]) -> list[OffloadingEvent]:
        """Return the events since the last call.

        Args:
            held: keys in the primary tier. A failed store that was begun again since is no news.
        """
        events, self._events = self._events, []
        return [event for event in (_without(event, held) for event in events) if event.keys]


def _without(event: OffloadingEvent, held: Container[OffloadKey]) -> OffloadingEvent:
    if not event.metadata_only:
        return event
    return replace(event, keys=[key for key in event.keys if key not in held])
