"""`kvtier verify`: reads every block of a disk tier and compares it with its checksum."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

from kvtier.cli.edge import EXIT_UNUSABLE
from kvtier.cli.slabs import (
    EXIT_WRONG,
    SHORT_ID,
    AsJson,
    Directories,
    find_all,
    make_console,
    print_json,
    refusing,
)
from kvtier.foreign_text import one_line
from kvtier.sizes import format_size, parse_size
from kvtier.stores.integrity.secrets import SecretPlace
from kvtier.stores.slab.inspection import NamespaceSurvey, read_records, survey_slab
from kvtier.stores.slab.lock import find_holder, hold
from kvtier.stores.slab.namespaces import empty_records
from kvtier.stores.slab.verification import Pace, Verification, causes_of, verify_namespace

_LOCKED = "a secret guards them: name it with --secret-env or --secret-file"
_LOCKED_TO_IT = "a different secret guards them"
_UNKNOWN = "the namespace's description cannot be read, so a secret may guard them"


@dataclass(frozen=True)
class Finding:
    """The result of verifying one namespace.

    Attributes:
        num_superseded: records that a newer copy of the same block replaces.
        emptied: bad records that were emptied; lookups of their blocks miss from now on.
        locked: why the blocks could not be verified (a secret is missing or wrong); "" if they were.
    """

    survey: NamespaceSurvey
    verification: Verification
    num_superseded: int
    emptied: int
    locked: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether a block or the namespace itself is damaged."""
        return bool(self.verification.bad or self.survey.problems)


@dataclass(frozen=True)
class _Job:
    """The options of the command; `repr` hides the secret."""

    repair: bool
    threads: int
    bytes_per_second: int | None
    secret: bytes | None = field(repr=False)


def verify(
    directories: Directories,
    repair: Annotated[
        bool, typer.Option("--repair", help="Empty the records of bad blocks; refused while an engine uses them.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, max=64, help="Number of parallel reads.")] = 4,
    rate: Annotated[
        str | None, typer.Option(help="Read at most so many bytes per second, for example 200MiB. Default: no limit.")
    ] = None,
    secret_env: Annotated[
        str | None, typer.Option(help="Environment variable with the secret that guards the blocks.")
    ] = None,
    secret_file: Annotated[str | None, typer.Option(help="File with the secret that guards the blocks.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read every block and compare it with its checksum, also while an engine uses the directory.

    Exit code 0: every block is intact. 1: something is damaged, or was and is repaired. 2: a directory cannot be read,
    belongs to no disk tier, is in use (with --repair), or the secret that guards blocks is missing or wrong; one line
    says why.
    """
    with refusing(as_json):
        place = SecretPlace.checked(secret_env, secret_file)
        secret = None if place is None else place.read()
        job = _Job(repair, threads, None if rate is None else parse_size("rate", rate), secret)
        slabs = [slab for found in find_all(directories).values() for slab in found]
        _allow_many_files()
        with ExitStack() as held:
            for slab in slabs if repair else ():
                held.enter_context(hold(slab))
            with _progress() as progress:
                findings = {slab: _verify_slab(slab, job, progress) for slab in slabs}
    wrong = any(finding.is_wrong for found in findings.values() for finding in found)
    locked = any(finding.locked for found in findings.values() for finding in found)
    if as_json:
        ok = not (wrong or locked)
        print_json({"ok": ok, "directories": [_slab_as_json(*item) for item in findings.items()]})
    else:
        _show(make_console(), findings)
    if wrong or locked:
        raise typer.Exit(EXIT_WRONG if wrong else EXIT_UNUSABLE)


def _verify_slab(slab: Path, job: _Job, progress: Progress) -> list[Finding]:
    """Verify every namespace of one slab; skip a namespace that an engine deletes meanwhile."""
    findings = []
    for survey in survey_slab(slab).namespaces:
        if not survey.is_readable:
            findings.append(Finding(survey, Verification(), 0, 0))
            continue
        task = progress.add_task(survey.folder.name[:SHORT_ID], total=None)
        pace = Pace(job.threads, job.bytes_per_second, on_bytes=partial(progress.advance, task))
        try:
            records = read_records(survey.folder, survey.description, job.secret)
            if records.sealer is None:
                locked = _LOCKED if job.secret is None else _LOCKED_TO_IT
                is_empty = not (survey.num_blocks or survey.broken)
                findings.append(Finding(survey, Verification(), 0, 0, "" if is_empty else locked))
                continue
            progress.update(task, total=len(records.inventory) * (survey.block_bytes or 0))
            is_used = partial(_is_used, slab, job)
            found = verify_namespace(survey.folder, records, is_used, pace)
        except FileNotFoundError:
            continue
        if survey.description is None and found.bad and not found.num_good:
            findings.append(Finding(survey, Verification(), 0, 0, _UNKNOWN))
            continue
        if job.repair and found.bad:
            empty_records(survey.folder, found.bad)
        emptied = len(found.bad) if job.repair else 0
        findings.append(Finding(survey, found, records.inventory.num_superseded, emptied))
    return findings


def _allow_many_files() -> None:
    """Raise the limit of open files as far as allowed: a slab has one file per GiB."""
    with suppress(OSError, ValueError):
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _is_used(slab: Path, job: _Job) -> bool:
    """Return whether an engine may be writing. With --repair none is, since this process holds the lock."""
    return not job.repair and find_holder(slab) is not None


def _progress() -> Progress:
    """Return the progress display on stderr: a bar, the speed and the time left; nothing without a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _slab_as_json(slab: Path, findings: Sequence[Finding]) -> dict[str, Any]:
    return {"path": str(slab), "namespaces": [_finding_as_json(finding) for finding in findings]}


def _finding_as_json(finding: Finding) -> dict[str, Any]:
    found = finding.verification
    return {
        "id": finding.survey.folder.name,
        "good": found.num_good,
        "bad": causes_of(found.bad),
        "changed_while_reading": found.num_changed,
        "unverified": finding.survey.num_blocks if finding.locked else 0,
        "superseded": finding.num_superseded,
        "emptied": finding.emptied,
        "problems": list(finding.survey.problems),
        "bytes": found.num_bytes,
        "seconds": round(found.seconds, 3),
        "direct": found.direct,
    }


def _show(console: Console, findings: Mapping[Path, Sequence[Finding]]) -> None:
    for slab, found in findings.items():
        if not found:
            console.print(_said(f"{slab}: no namespaces"))
        for finding in found:
            for line in _lines_of(slab, finding):
                console.print(line, soft_wrap=True)


def _lines_of(slab: Path, finding: Finding) -> list[Text]:
    """Return the result for one namespace as lines for a terminal."""
    found = finding.verification
    name = f"{slab} {finding.survey.folder.name[:SHORT_ID]}"
    if finding.locked:
        lines = [_said(f"{name}: {finding.survey.num_blocks:,} blocks not verified: {finding.locked}", style="yellow")]
        return lines + [_said(f"  wrong: {problem}", style="red") for problem in finding.survey.problems]
    speed = found.num_bytes / found.seconds if found.seconds else 0.0
    size = f"{format_size(found.num_bytes)} in {found.seconds:.1f} s, {format_size(speed)}/s"
    lines = [_said(f"{name}: {found.num_good:,} blocks good ({size})")]
    for cause, count in causes_of(found.bad).items():
        lines.append(_said(f"  wrong: {count:,} {cause}", style="red"))
    lines += [_said(f"  wrong: {problem}", style="red") for problem in finding.survey.problems]
    if finding.emptied:
        lines.append(_said(f"  repaired: {finding.emptied:,} bad records emptied, their blocks are misses from now on"))
    if found.num_changed:
        lines.append(_said(f"  {found.num_changed:,} skipped: an engine replaced them during the read"))
    return lines + [_said(f"  {remark}") for remark in finding.survey.remarks]


def _said(text: str, style: str = "") -> Text:
    """Return a line for a terminal; control characters in file names and contents are escaped."""
    return Text(one_line(text), style)
