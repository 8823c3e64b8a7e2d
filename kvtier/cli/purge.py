"""`kvtier purge`: deletes namespaces of a disk tier that no engine uses."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from kvtier.cli.ages import format_age, parse_age
from kvtier.cli.slabs import (
    EXIT_WRONG,
    SHORT_ID,
    AsJson,
    Directories,
    describe_identity,
    find_all,
    namespace_as_json,
    print_json,
    refusing,
)
from kvtier.errors import ConfigError, KVTierError
from kvtier.foreign_text import one_line
from kvtier.sizes import format_size
from kvtier.stores.slab.inspection import NamespaceSurvey, survey_slab
from kvtier.stores.slab.lock import hold
from kvtier.stores.slab.namespaces import delete_namespace

_Chosen = Mapping[Path, Sequence[NamespaceSurvey]]


def purge(
    directories: Directories,
    namespace: Annotated[
        list[str] | None, typer.Option(help="Delete only this one: its id or a unique prefix of it; may be repeated.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(help="Delete only namespaces not used for this long, for example 7d.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete all or some namespaces of a disk tier. Files are unlinked, not overwritten.

    Exit code 0: deleted, or nothing to delete. 1: you answered no. 2: a directory cannot be read, belongs to no disk
    tier or is used by an engine, or a namespace is unknown. With 1 and 2, nothing was deleted.
    """
    with refusing(as_json):
        least_age = 0.0 if older_than is None else parse_age("older_than", older_than)
        slabs = [slab for found in find_all(directories).values() for slab in found]
        with ExitStack() as held:
            for slab in slabs:
                held.enter_context(hold(slab))
            chosen = choose({slab: survey_slab(slab).namespaces for slab in slabs}, namespace, least_age)
            if not as_json:
                _show(chosen)
            if not yes and any(chosen.values()):
                _ask(as_json)
            left = {survey.folder: delete_namespace(survey.folder) for survey in _all_of(chosen)}
    freed = sum(survey.disk_bytes for survey in _all_of(chosen))
    if as_json:
        directories_json = [
            {
                "path": str(slab),
                "deleted": [namespace_as_json(survey) | {"left": left[survey.folder]} for survey in found],
            }
            for slab, found in chosen.items()
        ]
        print_json({"freed_bytes": freed, "directories": directories_json})
    else:
        count = len(_all_of(chosen))
        for folder, names in left.items():
            if names:
                text = f"{folder}: folder kept, it holds files that are not kvtier's: {', '.join(names)}"
                typer.echo(one_line(text), err=True)
        typer.echo(f"deleted {count} namespace{'' if count == 1 else 's'}, {format_size(freed)} freed")


def choose(found: _Chosen, ids: Sequence[str] | None, least_age: float) -> _Chosen:
    """Return the namespaces to delete.

    Args:
        found: the namespaces of each slab.
        ids: only namespaces whose id begins with one of these; None or empty for all.
        least_age: only namespaces not used for so many seconds.

    Raises:
        ConfigError: one of `ids` matches no namespace, or several.
    """
    names = {survey.folder.name for survey in _all_of(found)}
    wanted = names if not ids else {_only_one(text, names) for text in ids}
    oldest = time.time() - least_age
    return {
        slab: [survey for survey in surveys if survey.folder.name in wanted and survey.last_use <= oldest]
        for slab, surveys in found.items()
    }


def _ask(as_json: bool) -> None:
    """Ask at the terminal whether to delete.

    Raises:
        KVTierError: there is no terminal to ask at.
        typer.Exit: the answer was no.
    """
    if as_json or not sys.stdin.isatty():
        raise KVTierError("--yes is needed with --json and without a terminal: nobody can be asked")
    while True:
        typer.echo("Delete? [y/N]: ", nl=False, err=True)
        answer = sys.stdin.readline()  # Ctrl-C interrupts it, as everything; typer.confirm would take it for a no
        if answer.strip().lower() in ("y", "yes"):
            return
        if not answer.endswith("\n"):  # the end of the input
            typer.echo(err=True)
        if answer.strip().lower() in ("", "n", "no"):
            raise typer.Exit(EXIT_WRONG)


def _only_one(text: str, names: set[str]) -> str:
    matching = sorted(name for name in names if text and name.startswith(text.lower()))
    if len(matching) == 1:
        return matching[0]
    known = ", ".join(name[:SHORT_ID] for name in matching or sorted(names)) or "none"
    wrong = "several namespaces begin with this" if matching else "no such namespace; known are"
    raise ConfigError("namespace", text, f"{wrong}: {known}")


def _all_of(chosen: _Chosen) -> list[NamespaceSurvey]:
    return [survey for surveys in chosen.values() for survey in surveys]


def _show(chosen: _Chosen) -> None:
    """Print the namespaces that are about to be deleted."""
    for slab, surveys in chosen.items():
        for survey in surveys:
            size = f"{survey.num_blocks:,} blocks, {format_size(survey.disk_bytes)}"
            age = format_age(time.time() - survey.last_use)
            place = one_line(slab)
            typer.echo(f"{place} {survey.folder.name[:SHORT_ID]}: {size}, last used {age}: {describe_identity(survey)}")
