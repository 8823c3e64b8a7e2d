"""`kvtier schema`: the JSON schema of the configuration."""

from __future__ import annotations

import msgspec
import typer

from kvtier.spec.schema import configuration_schema


def schema() -> None:
    """Print the JSON schema of the configuration, with every option of every tier."""
    typer.echo(msgspec.json.format(msgspec.json.encode(configuration_schema()), indent=2).decode())
