"""Finds what is wrong with a tier's options before an engine starts, without starting the tier."""

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
    """Refuse, as `SecondaryTierManager.check_options` promises, what cannot work here.

    Raises:
        ConfigError: the struct of the options, or else the constructor, refuses an option.
    """
    if (options_type := options_type_of(tier_class)) is None:
        construct_on_trial(tier_class, options, block_bytes, policies)
    else:
        options_type.read(options).check(block_bytes, policies)


def construct_on_trial(
    tier_class: type[SecondaryTierManager],
    options: Mapping[str, Any],
    block_bytes: int,
    policies: Mapping[str, type[EvictionPolicy]],
) -> None:
    """Make a tier whose constructor has no side effects, over memory for one block, and forget it.

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
