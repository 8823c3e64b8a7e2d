"""`kvtier doctor`: says what an engine with kvtier would meet on this machine, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer
from rich.text import Text

from kvtier.cli.checks.findings import Finding, Level
from kvtier.cli.checks.machine import check_machine
from kvtier.cli.checks.tiers import check_tiers
from kvtier.cli.configuration import ConfigOption, Given, errors_in, read_config
from kvtier.cli.slabs import AsJson, make_console, print_json, refusing
from kvtier.errors import ConfigError
from kvtier.sizes import parse_size

EXIT_ERROR = 1
_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.ERROR: "bold red"}

ConfigArgument = Annotated[str | None, typer.Argument(metavar="FILE", help="The same as --config, for short.")]


def doctor(file: ConfigArgument = None, config: ConfigOption = None, as_json: AsJson = False) -> None:
    """Say what an engine would meet on this machine, and with this configuration, and what to do about it.

    Each tier is started, stores some blocks and reads them back: on a disk in a folder of its own beside the tier's, in
    a shared store under an identity that no engine has. Exit code 0: an engine would work. 1: there is an error. 2: the
    configuration is wrong; one line says why.
    """
    with refusing(as_json):
        if file is not None and config is not None:
            raise ConfigError("config", config, "given once, with --config or without")
        text = config or file
        given = None if text is None else read_config("config", text)
        findings = []
        with errors_in("" if given is None else given.source):
            for finding in examine(given):
                findings.append(finding)
                if not as_json:
                    show(finding)
    if as_json:
        print_json({"findings": [finding._asdict() for finding in findings]})
    if any(finding.level is Level.ERROR for finding in findings):
        raise typer.Exit(EXIT_ERROR)


def examine(given: Given | None) -> Iterator[Finding]:
    """Yield all findings.

    Raises:
        ConfigError: the configuration is wrong.
    """
    extra = None if given is None else {"spec_name": "TieringOffloadingSpec", **given.values}
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
