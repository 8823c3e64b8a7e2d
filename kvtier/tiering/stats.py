"""Counters fed by events, for `get_stats`."""

from __future__ import annotations

from collections import defaultdict

from kvtier.events import (
    BlocksEvicted,
    BlocksFailed,
    BlocksLoaded,
    BlocksStored,
    CacheReset,
    CascadeRefused,
    Event,
    JobFinished,
    PolicySwitched,
    RequestGaveUp,
    TierStateChanged,
    UnexpectedCall,
)


class StatsObserver:
    """Counts blocks, bytes and seconds by tier; names are `what` or `what.tier` or `what.tier.cause`."""

    def __init__(self) -> None:
        self._counts: defaultdict[str, float] = defaultdict(float)

    def on_event(self, event: Event) -> None:
        """Count one event; the kinds of the hot path are tried first."""
        counts = self._counts
        if isinstance(event, BlocksStored):
            counts[f"stored_blocks.{event.source or 'device'}"] += len(event.keys)
        elif isinstance(event, BlocksLoaded):
            for source, num_blocks in event.by_source.items():
                counts[f"loaded_blocks.{source}"] += num_blocks
        elif isinstance(event, BlocksEvicted):
            counts[f"evicted_blocks.{event.tier}"] += len(event.keys)
        elif isinstance(event, JobFinished):
            tier, direction = event.tier, "promoted" if event.is_promotion else "cascaded"
            counts[f"{direction}_blocks.{tier}"] += event.num_successful
            counts[f"{direction}_bytes.{tier}"] += event.num_bytes
            counts[f"{direction}_seconds.{tier}"] += event.seconds
        elif isinstance(event, CascadeRefused):
            counts[f"refused_blocks.{event.tier}.{event.reason}"] += event.num_blocks
        else:
            self._count_rare(event)

    def _count_rare(self, event: Event) -> None:
        counts = self._counts
        match event:
            case BlocksFailed(tier, cause, num_blocks):
                counts[f"failed_blocks.{tier}.{cause.value}"] += num_blocks
            case TierStateChanged(tier, state, _):
                counts[f"times_{state.value}.{tier}"] += 1
            case RequestGaveUp(_, reason, num_blocks):
                counts[f"gave_up.{reason}"] += 1
                counts[f"gave_up_blocks.{reason}"] += num_blocks
            case UnexpectedCall(what, times):
                counts[f"unexpected.{what}"] += times
            case PolicySwitched(tier, former, chosen, _, _):
                counts[f"policy_switches.{tier}.{former}.{chosen}"] += 1
            case CacheReset():
                counts["resets"] += 1
            case _:
                pass

    def snapshot(self) -> dict[str, float]:
        """Return all counts since the beginning."""
        return dict(self._counts)
