"""The command line. The module of a command is imported when the command is used."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer

from kvtier import __version__
from kvtier.cli.edge import Commands, prepare_streams

COMMANDS = {
    "demo": "Answer questions about one long document over several turns, with kvtier and without, side by side.",
    "inspect": "Show namespaces, blocks, bytes, last use and health of a disk tier's directory, also while an engine"
    " uses it.",
    "verify": "Read every block and compare it with its checksum, also while an engine uses the directory.",
    "purge": "Delete the namespaces of a disk tier, or some of them. Their files are unlinked, not overwritten.",
    "vllm-config": "Print the option to add to `vllm serve`.",
    "simulate": "Replay a trace through kvtier's own manager, policies and admission, in simulated time.",
    "plan": "Find the cheapest configuration that meets a target, and print the option that makes vLLM use it.",
    "schema": "Print the JSON schema of the configuration, with every option of every tier.",
    "bench": "Measure what kvtier gets out of this machine.",
}
"""The commands, in the order of `--help`, and the first line of each one's own help: `--help` imports none of them."""


def load_command(name: str) -> Any:
    """Return one of `COMMANDS`, of the module that has its name."""
    attribute = name.replace("-", "_")
    found = getattr(import_module(f"kvtier.cli.{attribute}"), attribute)
    if isinstance(found, typer.Typer):
        return typer.main.get_group(found)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name)(found)
    return typer.main.get_command(single)


class _LazyCommands(Commands):
    """Imports a command when it is invoked; until then, only its name and its first line of help are known."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        ctx.invoked_subcommand = name  # so that an interrupted import is told under the command's name
        return name, load_command(name) if name in COMMANDS else command, rest


app = typer.Typer(
    cls=_LazyCommands,
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


def _known_by_name() -> None:
    """Stand for a command in `--help`."""


for _name, _help in COMMANDS.items():
    app.command(_name, help=_help)(_known_by_name)


def main() -> None:
    """Run the command line; the console script's entry point."""
    prepare_streams()
    app()
