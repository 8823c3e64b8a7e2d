"""The configuration of one secondary tier: the keys that all tiers have, and the tier's own options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from kvtier.config import Seconds, Text
from kvtier.errors import ConfigError
from kvtier.options import convert_option, join_key
from kvtier.types import Admission


@dataclass(frozen=True)
class TierConfig:
    """The configuration of one secondary tier.

    Attributes:
        where: full name of its entry, for errors, for example "secondary_tiers[0]".
        tier_type: registered name, or the name of a class in `module_path`.
        name: name of the tier in events, statistics and logs.
        probe_deadline: longest time that a request waits for it to say whether it has a block, seconds; None for the
            default of its type.
        options: keyword arguments of the tier's constructor.
        tier_class: the class, once it was loaded.
    """

    where: str
    tier_type: str
    module_path: str | None = None
    name: str = ""
    admission: Admission | None = None
    probe_deadline: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    tier_class: type | None = field(default=None, repr=False, compare=False)


def _option(kind: Any, description: str) -> Any:
    return Annotated[kind, msgspec.Meta(description=description)]


TIER_KEYS: dict[str, Any] = {
    "type": _option(Text, "registered name of the tier, or the name of its class in `module_path`"),
    "module_path": _option(Text, "module of a tier of your own"),
    "name": _option(Text, "name of the tier in events, statistics and logs; its type if absent"),
    "admission": _option(Admission, "which blocks the tier gets"),
    "probe_deadline": _option(
        Seconds, "longest time that a request waits for the tier to say whether it has a block, seconds"
    ),
}
"""Keys of every tier; all other keys are the tier's own options."""


def parse_tier(tier_config: Mapping[str, Any], where: str = "tier_config") -> TierConfig:
    """Split one tier's configuration into the common keys and its options, which are not checked yet.

    Raises:
        ConfigError: it is not a mapping, `type` is missing, or a common key has the wrong type.
    """
    if not isinstance(tier_config, Mapping):
        raise ConfigError(where, tier_config, 'a mapping with at least "type" expected')
    if "type" not in tier_config:
        raise ConfigError(join_key(where, "type"), None, "required, the type of the tier")
    common = {
        key: convert_option(tier_config[key], hint, join_key(where, key))
        for key, hint in TIER_KEYS.items()
        if key in tier_config
    }
    return TierConfig(
        where=where,
        tier_type=common["type"],
        module_path=common.get("module_path"),
        name=common.get("name", common["type"]),
        admission=common.get("admission"),
        probe_deadline=common.get("probe_deadline"),
        options={key: value for key, value in tier_config.items() if key not in TIER_KEYS},
    )
