"""Opening a prefix cache for a person: a tier that cannot be used is an error, not a silent miss."""

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
"""How long a demonstration waits for blocks that a tier holds, where the configuration does not say: engines on a busy
machine give up sooner and compute, and here it is to be seen that blocks come back. The table shows what it cost."""
VOLATILE_TIERS = frozenset({"memory", "example"})
"""Tiers whose blocks end with the process that stored them."""


def default_tiers(folder: Path) -> dict[str, Any]:
    """Return host memory and a disk tier below `folder`."""
    disk = {"type": "disk", "path": str(folder / "blocks"), "capacity": "512MiB"}
    return {"cpu_bytes_to_use": "512MiB", "secondary_tiers": [disk]}


def outlives_process(tiers: Mapping[str, Any]) -> bool:
    """Return whether a second process can find what a first one stored."""
    return any(tier.get("type") not in VOLATILE_TIERS for tier in tiers.get("secondary_tiers", ()))


@contextmanager
def open_cache(model: Any, tiers: Mapping[str, Any]) -> Iterator[PrefixCache]:
    """Open a prefix cache whose tiers are all up, and which has `PATIENCE` with them.

    Raises:
        StoreUnavailableError: a tier is not; the message says which and why.
        KVTierError: as `PrefixCache` and `PrefixCache.open`.
    """
    cache = PrefixCache(model, tiers if "spec_name" in tiers else {**PATIENCE, **tiers})
    with ExitStack() as stack:
        with _said_once():
            stack.enter_context(cache)
        for name, (state, reason) in cache.tier_states().items():
            if state is not TierState.UP:
                raise StoreUnavailableError(f"tier {name} is {state.value}: {reason or 'no reason given'}")
        yield cache


@contextmanager
def _said_once() -> Iterator[None]:
    """Keep the log quiet while a cache opens: what goes wrong is an error of its own here."""

    def refuse(record: logging.LogRecord) -> bool:
        return False

    logger = logging.getLogger("kvtier")
    logger.addFilter(refuse)
    try:
        yield
    finally:
        logger.removeFilter(refuse)
