"""Checks a tier's options before an engine starts, without starting the tier."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from kvtier.abc import EvictionPolicy, SecondaryTierManager, TierContext
from kvtier.namespace import Namespace
from kvtier.options import options_type_of


def check_or_try(
    tier_class: type[SecondaryTierManager],
    options: Mapping[str, Any],
    block_bytes: int,
    policies: Mapping[str, type[EvictionPolicy]],
) -> None:
    """Check options with their struct or, without one, by a trial construction; see `check_options` in `abc.py`.

    Raises:
        ConfigError: the struct or the constructor refuses an option.
    """
    if (options_type := options_type_of(tier_class)) is None:
        construct_on_trial(tier_class, options, block_bytes, policies)
    else:
        options_type(**options).check(block_bytes, policies)


def construct_on_trial(
    tier_class: type[SecondaryTierManager],
    options: Mapping[str, Any],
    block_bytes: int,
    policies: Mapping[str, type[EvictionPolicy]],
) -> None:
    """Construct a tier over memory for one block, and drop it. The constructor must have no side effects.

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
