"""The command line."""

from __future__ import annotations

from typing import Annotated

import typer

from kvtier import __version__
from kvtier.cli.bench import bench
from kvtier.cli.demo import demo
from kvtier.cli.edge import Commands, prepare_streams
from kvtier.cli.inspect import inspect
from kvtier.cli.plan import plan
from kvtier.cli.purge import purge
from kvtier.cli.schema import schema
from kvtier.cli.simulate import simulate
from kvtier.cli.verify import verify
from kvtier.cli.vllm_config import vllm_config

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Keeps the KV cache of language models alive in host memory, on disk and beyond.",
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"kvtier {__version__}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the command line itself; its commands keep their names."""


app.command()(demo)
app.command()(inspect)
app.command()(verify)
app.command()(purge)
app.command()(vllm_config)
app.command()(simulate)
app.command()(plan)
app.command()(schema)
app.add_typer(bench, name="bench")


def main() -> None:
    """Run the command line; the console script's entry point."""
    prepare_streams()
    app()
