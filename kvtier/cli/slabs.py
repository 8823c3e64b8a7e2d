"""Shared by `inspect`, `verify` and `purge`: arguments, finding slabs, describing their users, errors, JSON."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvtier.cli.edge import EXIT_INTERRUPTED, EXIT_UNUSABLE, describe
from kvtier.cli.result_files import json_text
from kvtier.errors import KVTierError
from kvtier.foreign_text import one_line
from kvtier.stores.slab.inspection import NamespaceSurvey, find_slabs
from kvtier.stores.slab.lock import Holder

EXIT_WRONG = 1
SHORT_ID = 12
"""Digits of a namespace's fingerprint that are shown. Commands accept any unique prefix of it."""
_MAX_COMMAND_CHARACTERS = 60

Directories = Annotated[
    list[Path], typer.Argument(metavar="DIR", help="The `path` of a disk tier. Includes folders dpN below it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@contextmanager
def refusing(as_json: bool) -> Iterator[None]:
    """Turn an error into one line on stderr and exit code 2; with `as_json`, also print `{"error": ...}` on stdout."""
    try:
        yield
    except (KVTierError, OSError) as error:
        _refuse(as_json, describe(error))
        raise typer.Exit(EXIT_UNUSABLE) from None
    except KeyboardInterrupt:
        _refuse(as_json, "interrupted")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def find_all(directories: Sequence[Path]) -> dict[Path, list[Path]]:
    """Return the slabs of each directory, each slab once. For an empty directory, say so on stderr.

    Raises:
        StoreUnavailableError: a directory cannot be read, or belongs to no disk tier.
    """
    found: dict[Path, list[Path]] = {}
    seen: set[str] = set()
    for directory in directories:
        path = Path(os.path.abspath(directory))
        slabs = find_slabs(path)
        if not slabs:
            typer.echo(one_line(f"{path}: empty, no blocks were stored here"), err=True)
        found[path] = [slab for slab in slabs if os.path.realpath(slab) not in seen]
        seen.update(map(os.path.realpath, slabs))
    return found


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout."""
    typer.echo(json_text(value, indent=2))


def make_console() -> Console:
    """Return the console for results: stdout. Names in them are no markup."""
    return Console(highlight=False, soft_wrap=False, markup=False, emoji=False)


def describe_holder(holder: Holder) -> str:
    """Return the process that uses a directory, in words."""
    if holder.pid is None:
        return "another process"
    command = f" ({_shortened(holder.command)})" if holder.command else ""
    parent = ""
    if holder.parent_pid is not None and holder.parent_pid > 1:
        parent = f", started by pid {holder.parent_pid}"
        parent += f" ({_shortened(holder.parent_command)})" if holder.parent_command else ""
    return f"pid {holder.pid}{command}{parent}"


def holder_as_json(holder: Holder | None) -> dict[str, Any] | None:
    """Return the process that uses a directory as JSON values; None if there is none."""
    return None if holder is None else holder._asdict()


def namespace_as_json(survey: NamespaceSurvey) -> dict[str, Any]:
    """Return a namespace as JSON values: bytes and seconds as numbers, times in UTC."""
    description = survey.description
    return {
        "id": survey.folder.name,
        "identity": None if description is None else dict(description.identity),
        "epoch": None if description is None else description.epoch,
        "format": None if description is None else description.format_version,
        "block_bytes": survey.block_bytes,
        "blocks": survey.num_blocks,
        "capacity_blocks": survey.num_slots,
        "disk_bytes": survey.disk_bytes,
        "last_use": _as_date(survey.last_use),
        "age_seconds": round(time.time() - survey.last_use, 1),
        "broken_records": {cause.value: count for cause, count in survey.broken.items()},
        "problems": list(survey.problems),
        "remarks": list(survey.remarks),
    }


def _as_date(seconds: float) -> str | None:
    """Return a file's time in UTC; None if it is outside the range of `datetime`."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return None


def describe_identity(survey: NamespaceSurvey) -> str:
    """Return what a namespace stands for, in one line."""
    if survey.description is None:
        return "unknown"
    pairs = [f"{key} {value}" for key, value in sorted(survey.description.identity.items()) if value != ""]
    return one_line(", ".join(pairs)) or "nothing in particular"


def _refuse(as_json: bool, text: str) -> None:
    if as_json:
        print_json({"error": text})
    sys.stdout.flush()
    typer.echo(f"kvtier: {text}", err=True)


def _shortened(command: str) -> str:
    return one_line(" ".join(command.split()), _MAX_COMMAND_CHARACTERS)
