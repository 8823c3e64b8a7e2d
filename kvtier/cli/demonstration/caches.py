"""Opens a prefix cache for the demonstration: a tier that is not up is an error here, not silent misses."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kvtier.adapters.transformers import PrefixCache
from kvtier.errors import StoreUnavailableError
from kvtier.events import TierState

PATIENCE = {"load_deadline": 15.0, "prefill_rate": 1.0}
"""Defaults of the demonstration: requests wait long for tiers. With kvtier's own defaults a busy machine gives up early
and recomputes. The demonstration shows that blocks come back, and its table shows how long that took."""
VOLATILE_TIERS = frozenset({"memory", "example"})
"""Tiers that lose their blocks when the process ends."""


def default_tiers(folder: Path) -> dict[str, Any]:
    """Return host memory and a disk tier below `folder`."""
    disk = {"type": "disk", "path": str(folder / "blocks"), "capacity": "512MiB"}
    return {"cpu_bytes_to_use": "512MiB", "secondary_tiers": [disk]}


def outlives_process(tiers: Mapping[str, Any]) -> bool:
    """Return whether a second process can load what the first one stored."""
    return any(tier.get("type") not in VOLATILE_TIERS for tier in tiers.get("secondary_tiers", ()))


@contextmanager
def open_cache(model: Any, tiers: Mapping[str, Any]) -> Iterator[PrefixCache]:
    """Open a prefix cache with the defaults of `PATIENCE`, and check that all of its tiers are up.

    Raises:
        StoreUnavailableError: a tier is not up; the message says which and why.
        KVTierError: as `PrefixCache` and `PrefixCache.open`.
    """
    cache = PrefixCache(model, tiers if "spec_name" in tiers else {**PATIENCE, **tiers})
    with ExitStack() as stack:
        with _silenced_log():
            stack.enter_context(cache)
        for name, (state, reason) in cache.tier_states().items():
            if state is not TierState.UP:
                raise StoreUnavailableError(f"tier {name} is {state.value}: {reason or 'no reason given'}")
        yield cache


@contextmanager
def _silenced_log() -> Iterator[None]:
    """Drop kvtier's log lines while a cache opens: `open_cache` raises the same faults as errors."""

    def refuse(record: logging.LogRecord) -> bool:
        return False

    logger = logging.getLogger("kvtier")
    logger.addFilter(refuse)
    try:
        yield
    finally:
        logger.removeFilter(refuse)
