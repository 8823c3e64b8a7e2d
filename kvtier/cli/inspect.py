"""`kvtier inspect`: shows what a disk tier's directory holds, without reading the blocks."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kvtier.cli.ages import format_age
from kvtier.cli.slabs import (
    SHORT_ID,
    AsJson,
    Directories,
    describe_holder,
    describe_identity,
    find_all,
    holder_as_json,
    make_console,
    namespace_as_json,
    print_json,
    refusing,
)
from kvtier.cli.tables import folding_table
from kvtier.foreign_text import one_line
from kvtier.sizes import format_size
from kvtier.stores.slab.inspection import NamespaceSurvey, SlabSurvey, survey_slab


def inspect(directories: Directories, as_json: AsJson = False) -> None:
    """Show namespaces, blocks, bytes, last use and health of a disk tier's directory, also while an engine uses it.

    It reads the records, not the blocks; `kvtier verify` reads the blocks. Exit code 0: shown. 2: a directory cannot be
    read or belongs to no disk tier; one line says why.
    """
    with refusing(as_json):
        surveys = [survey_slab(slab) for slabs in find_all(directories).values() for slab in slabs]
    if as_json:
        print_json({"directories": [slab_as_json(survey) for survey in surveys]})
        return
    console = make_console()
    for survey in surveys:
        show(console, survey)


def slab_as_json(survey: SlabSurvey) -> dict[str, Any]:
    """Return one directory as JSON values."""
    return {
        "path": str(survey.path),
        "used_by": holder_as_json(survey.holder),
        "disk_bytes": survey.disk_bytes,
        "free_bytes": survey.free_bytes,
        "namespaces": [namespace_as_json(namespace) for namespace in survey.namespaces],
    }


def show(console: Console, survey: SlabSurvey) -> None:
    """Print one directory for a person."""
    use = "not in use" if survey.holder is None else f"in use by {describe_holder(survey.holder)}"
    console.print(Text(one_line(f"{survey.path}: {use}")), soft_wrap=True)
    sizes = f"{format_size(survey.disk_bytes)} on disk; {format_size(survey.free_bytes)} of the filesystem are free"
    console.print(Text(sizes))
    if not survey.namespaces:
        console.print("no namespaces")
        return
    console.print(_table(survey))
    for namespace in survey.namespaces:
        _show_details(console, namespace)


def _table(survey: SlabSurvey) -> Table:
    headings = ("namespace", "blocks", "each", "on disk", "fill", "last use", "health")
    table = folding_table(headings, left=("namespace", "last use", "health"))
    for namespace in survey.namespaces:
        fill = namespace.num_blocks / namespace.num_slots if namespace.num_slots else 0.0
        table.add_row(
            namespace.folder.name[:SHORT_ID],
            f"{namespace.num_blocks:,}",
            "-" if namespace.block_bytes is None else format_size(namespace.block_bytes),
            format_size(namespace.disk_bytes),
            f"{fill:.1%}",
            format_age(time.time() - namespace.last_use),
            Text("see below", "red") if namespace.problems or namespace.broken else "ok",
        )
    return table


def _show_details(console: Console, namespace: NamespaceSurvey) -> None:
    console.print(Text(f"{namespace.folder.name[:SHORT_ID]} stands for"))
    console.print(Padding(Text(describe_identity(namespace)), (0, 0, 0, 2), expand=False))
    broken = [f"{count:,} records {cause.value}" for cause, count in namespace.broken.items()]
    for problem in [*namespace.problems, *broken]:
        console.print(Padding(Text(one_line(f"wrong: {problem}"), style="red"), (0, 0, 0, 2), expand=False))
    for remark in namespace.remarks:
        console.print(Padding(Text(one_line(remark)), (0, 0, 0, 2), expand=False))
