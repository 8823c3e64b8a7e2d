"""What vLLM calls the KV transfer configuration: its value, and the forms in which a user needs it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any

from kvtier.cli.schema import configuration_schema

CONNECTOR_MODULE = "kvtier.adapters.vllm.connector"
CONNECTOR_CLASS = "KVTierConnector"


class Connector(StrEnum):
    """What connects vLLM with kvtier's spec."""

    OFFLOADING = "offloading"
    """vLLM's own OffloadingConnector."""
    KVTIER = "kvtier"
    """KVTierConnector, which is the same, except that a load that fails does not stop the engine."""


class Format(StrEnum):
    """How the configuration is printed."""

    CLI = "cli"
    """The option of `vllm serve`, for a shell."""
    JSON = "json"
    """The option's value."""
    YAML = "yaml"
    """A file for `vllm serve --config`."""
    PYTHON = "python"
    """What `vllm.LLM` takes."""


def transfer_config(extra: Mapping[str, Any], connector: Connector = Connector.OFFLOADING) -> dict[str, Any]:
    """Return the value of vLLM's `--kv-transfer-config`."""
    chosen = {"kv_connector": "OffloadingConnector"}
    if connector is Connector.KVTIER:
        chosen = {
            "kv_connector": CONNECTOR_CLASS,
            "kv_connector_module_path": CONNECTOR_MODULE,
            "kv_load_failure_policy": "recompute",
        }
    return {**chosen, "kv_role": "kv_both", "kv_connector_extra_config": dict(extra)}


def printed(config: Mapping[str, Any], form: Format = Format.CLI) -> str:
    """Return a configuration in a form that a user can paste."""
    value = json.dumps(config, separators=(",", ":"))
    match form:
        case Format.CLI:
            return f"--kv-transfer-config {shlex.quote(value)}"
        case Format.JSON:
            return value
        case Format.YAML:
            quoted = value.replace("'", "''")
            return f"kv-transfer-config: '{quoted}'"
        case Format.PYTHON:
            arguments = "".join(f"    {name}={value!r},\n" for name, value in config.items())
            return (
                "from vllm.config import KVTransferConfig\n\n"
                f"kv_transfer_config = KVTransferConfig(\n{arguments})  # LLM(model, kv_transfer_config=...)"
            )


def explanation(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each key of a configuration: where it stands, its value, and what it means."""
    schema = configuration_schema()["$defs"]["TieringConfig"]["properties"]
    extra = config["kv_connector_extra_config"]
    yield from _explain("", {key: value for key, value in extra.items() if key != "secondary_tiers"}, schema)
    for index, tier in enumerate(extra.get("secondary_tiers", ())):
        yield from _explain(
            f"secondary_tiers[{index}].", tier, _options_of(tier, schema["secondary_tiers"]["items"]["anyOf"])
        )


def _explain(where: str, values: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        meaning = options.get(key, {}).get("description", "")
        yield f"{where}{key} = {json.dumps(value)}" + (f": {meaning}" if meaning else "")


def _options_of(tier: Mapping[str, Any], known: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    found = (one["properties"] for one in known if one["properties"]["type"].get("const") == tier["type"])
    return next(found, {})
