"""Counters fed by events, for `get_stats`."""

from __future__ import annotations

from kvtier.events import (
    BlocksEvicted,
    BlocksFailed,
    BlocksLoaded,
    BlocksStored,
    CacheReset,
    CascadeRefused,
    Event,
    JobFinished,
    RequestGaveUp,
    TierStateChanged,
    UnexpectedCall,
)


class StatsObserver:
    """Counts blocks, bytes and seconds by tier; names are `what` or `what.tier` or `what.tier.cause`."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = {}

    def _add(self, name: str, value: float) -> None:
        self._counts[name] = self._counts.get(name, 0) + value

    def on_event(self, event: Event) -> None:
        """Count one event."""
        match event:
            case BlocksStored(keys, source):
                self._add(f"stored_blocks.{source or 'device'}", len(keys))
            case BlocksEvicted(tier, keys):
                self._add(f"evicted_blocks.{tier}", len(keys))
            case BlocksLoaded(_, by_source):
                for source, count in by_source.items():
                    self._add(f"loaded_blocks.{source}", count)
            case JobFinished():
                direction = "promoted" if event.is_promotion else "cascaded"
                self._add(f"{direction}_blocks.{event.tier}", event.num_successful)
                self._add(f"{direction}_bytes.{event.tier}", event.num_bytes)
                self._add(f"{direction}_seconds.{event.tier}", event.seconds)
            case BlocksFailed(tier, cause, count):
                self._add(f"failed_blocks.{tier}.{cause.value}", count)
            case CascadeRefused(tier, num_blocks, reason):
                self._add(f"refused_blocks.{tier}.{reason}", num_blocks)
            case TierStateChanged(tier, state, _):
                self._add(f"times_{state.value}.{tier}", 1)
            case RequestGaveUp(_, reason, num_blocks):
                self._add(f"gave_up.{reason}", 1)
                self._add(f"gave_up_blocks.{reason}", num_blocks)
            case CacheReset():
                self._add("resets", 1)
            case UnexpectedCall(what, count):
                self._add(f"unexpected.{what}", count)

    def snapshot(self) -> dict[str, float]:
        """Return all counts since the beginning."""
        return dict(self._counts)
