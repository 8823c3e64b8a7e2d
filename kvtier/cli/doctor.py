"""`kvtier doctor`: says what an engine with kvtier would meet on this machine, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.text import Text

from kvtier.cli.checks.findings import Finding, Level
from kvtier.cli.checks.machine import check_machine
from kvtier.cli.checks.tiers import check_tiers
from kvtier.cli.json_argument import read_json
from kvtier.cli.slabs import AsJson, make_console, print_json, refusing
from kvtier.errors import ConfigError
from kvtier.sizes import parse_size

EXIT_ERROR = 1
_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.ERROR: "bold red"}

ConfigArgument = Annotated[
    str | None,
    typer.Argument(help="What `kvtier vllm-config --format json` prints: JSON text, a path, or @path. Default: none."),
]


def doctor(config: ConfigArgument = None, as_json: AsJson = False) -> None:
    """Say what an engine would meet on this machine, and with this configuration, and what to do about it.

    Each tier is started, stores some blocks and reads them back: on a disk in a folder of its own beside the tier's, in
    a shared store under an identity that no engine has. Exit code 0: an engine would work. 1: there is an error. 2: the
    configuration is wrong; one line says why.
    """
    with refusing(as_json):
        extra = None if config is None else extra_of(read_json("config", config))
        findings = []
        for finding in examine(extra):
            findings.append(finding)
            if not as_json:
                show(finding)
    if as_json:
        print_json({"findings": [finding._asdict() for finding in findings]})
    if any(finding.level is Level.ERROR for finding in findings):
        raise typer.Exit(EXIT_ERROR)


def extra_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return kvtier's own configuration, from it or from vLLM's transfer configuration around it.

    Raises:
        ConfigError: the transfer configuration holds no configuration of kvtier.
    """
    inner = config.get("kv_connector_extra_config", config)
    if not isinstance(inner, dict):
        raise ConfigError("kv_connector_extra_config", type(inner).__name__, "a JSON object expected")
    return {"spec_name": "TieringOffloadingSpec", **inner}


def examine(extra: dict[str, Any] | None) -> Iterator[Finding]:
    """Yield all findings."""
    host_bytes = None
    if extra is not None and "cpu_bytes_to_use" in extra:
        host_bytes = parse_size("cpu_bytes_to_use", extra["cpu_bytes_to_use"])
    yield from check_machine(host_bytes)
    if extra is not None:
        yield from check_tiers(extra)


def show(finding: Finding) -> None:
    """Print a finding, its remedy below it."""
    console = make_console()
    line = Text.assemble((f"{finding.level.value:<8}", _STYLES[finding.level]), f"{finding.subject}: {finding.text}")
    console.print(line, soft_wrap=True)
    if finding.remedy:
        console.print(Text(f"{'':8}-> {finding.remedy}"), soft_wrap=True)
