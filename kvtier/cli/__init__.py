"""The command line. A command's module is imported only when that command runs."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer

from kvtier import __version__
from kvtier.cli.edge import Commands, prepare_streams
from kvtier.cli.help_pages import command_of_page

COMMANDS = {
    "demo": "Answer questions about one long document over several turns, with kvtier and without, side by side.",
    "inspect": "Show namespaces, blocks, bytes, last use and health of a disk tier's directory, also while an engine"
    " uses it.",
    "verify": "Read every block and compare it with its checksum, also while an engine uses the directory.",
    "purge": "Delete all or some namespaces of a disk tier. Files are unlinked, not overwritten.",
    "doctor": "Say what an engine would meet on this machine, and with this configuration, and what to do about it.",
    "top": "Show what an engine's cache does, live: hits by tier, bytes, waits, failures, capacity.",
    "vllm-config": "Print the option to add to `vllm serve`.",
    "simulate": "Replay a trace through kvtier's own manager, policies and admission, in simulated time.",
    "plan": "Find the cheapest configuration that meets a target, and print the option that makes vLLM use it.",
    "warm": "Copy a namespace's blocks from one tier to another, so that a new node starts warm.",
    "schema": "Print the JSON schema of the configuration, with every option of every tier.",
    "bench": "Measure how fast kvtier is on this machine.",
}
"""Each command and the first line of its help, in the order of `--help`, which therefore imports no command."""


def load_command(name: str) -> Any:
    """Import the module of one of `COMMANDS`, and return the command."""
    attribute = name.replace("-", "_")
    found = getattr(import_module(f"kvtier.cli.{attribute}"), attribute)
    if isinstance(found, typer.Typer):
        return typer.main.get_group(found)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    single.command(name)(found)
    return typer.main.get_command(single)


class _LazyCommands(Commands):
    """Imports a command when it is invoked."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        ctx.invoked_subcommand = name  # errors begin with it, also when the import below is interrupted
        if name in COMMANDS:
            command = command_of_page(name, rest) or load_command(name)
        return name, command, rest


app = typer.Typer(
    cls=_LazyCommands,
    no_args_is_help=True,
    rich_markup_mode=None,  # rich would cut the names of options at 80 columns, and make every help slower
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


def _placeholder() -> None:
    """Stand in `--help` for a command that is not imported yet."""


for _name, _help in COMMANDS.items():
    app.command(_name, help=_help)(_placeholder)


def main() -> None:
    """Run the command line; the console script's entry point."""
    prepare_streams()
    app()
