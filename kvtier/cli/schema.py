"""`kvtier schema`: the JSON schema of a whole configuration, with the options of every tier type."""

from __future__ import annotations

from typing import Any

import msgspec
import typer

from kvtier.config import TieringConfig
from kvtier.options import options_type_of, schema_of
from kvtier.registry import POLICIES, TIERS
from kvtier.tier_config import TIER_KEYS


def schema() -> None:
    """Print the JSON schema of the configuration, with every option of every tier."""
    typer.echo(msgspec.json.format(msgspec.json.encode(configuration_schema()), indent=2).decode())


def configuration_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of `TieringConfig`, with the options of all registered tiers.

    Raises:
        ConfigError: a registered tier cannot be loaded.
    """
    schema = schema_of(TieringConfig)
    keys, shared = msgspec.json.schema_components(TIER_KEYS.values(), ref_template="#/$defs/{name}")
    schema["$defs"] |= shared
    common = dict(zip(TIER_KEYS, keys, strict=True))
    tiers = [_tier_schema(name, common) for name in TIERS.names()]
    own = {"type": "object", "properties": common, "required": ["type", "module_path"]}
    properties = schema["$defs"][TieringConfig.__name__]["properties"]
    properties["secondary_tiers"]["items"] = {"anyOf": [*tiers, own]}
    for options in (properties, *(tier["properties"] for tier in tiers)):
        if "eviction_policy" in options:
            options["eviction_policy"]["enum"] = list(POLICIES.names())
    return schema


def _tier_schema(name: str, common: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of one tier type; only the keys of all tiers if the type has no struct."""
    keys = {**common, "type": {**common["type"], "const": name}}
    del keys["module_path"]  # with it, the tier's class comes from that module, whatever the type
    options_type = options_type_of(TIERS.load(name))
    if options_type is None:
        return {"type": "object", "properties": keys, "required": ["type"], "not": {"required": ["module_path"]}}
    struct = schema_of(options_type)["$defs"][options_type.__name__]
    return {
        "type": "object",
        "title": name,
        "properties": {**keys, **struct["properties"]},
        "required": ["type", *struct["required"]],
        "additionalProperties": False,
    }
