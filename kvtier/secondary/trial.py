"""Makes a tier on trial, over memory for one block: its constructor finds what is wrong before an engine starts."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from kvtier.abc import EvictionPolicy, SecondaryTierManager, TierContext
from kvtier.namespace import Namespace


def construct_on_trial(
    tier_class: type[SecondaryTierManager],
    options: Mapping[str, Any],
    block_bytes: int,
    policies: Mapping[str, type[EvictionPolicy]],
) -> None:
    """Make a tier whose constructor has no side effects, and forget it.

    Raises:
        ConfigError: the constructor refuses an option.
    """
    context = TierContext(namespace=Namespace({"made": "on trial"}), policies=policies)
    view = memoryview(bytearray(block_bytes)).cast("B", (1, block_bytes))
    tier_class(
        offloading_spec=SimpleNamespace(tier_context=context),
        primary_kv_view=view,
        tier_type="trial",
        **options,
    )
