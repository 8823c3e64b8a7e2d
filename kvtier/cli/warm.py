"""`kvtier warm`: copies the blocks of a namespace from one tier to another, so that a new node starts warm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

from kvtier.abc import TierContext
from kvtier.cli.bench import ended_by_sigterm
from kvtier.cli.checks.tiers import TrialSpec
from kvtier.cli.slabs import EXIT_WRONG, SHORT_ID, AsJson, print_json, refusing
from kvtier.cli.warming import places
from kvtier.cli.warming.copier import Copied, Copier, Failures, Tier
from kvtier.errors import ConfigError
from kvtier.events import Observers
from kvtier.foreign_text import one_line
from kvtier.primary.arena import Arena
from kvtier.registry import construct_tier
from kvtier.sizes import format_size, parse_size
from kvtier.tier_config import TierConfig

ARENA_BYTES = 64 << 20
"""Memory for blocks on their way; at least one block."""
_MAX_SLOTS = 256

ConfigFile = Annotated[
    str,
    typer.Option(metavar="FILE", help="Configuration with the tiers, as an engine has it: YAML or JSON, or JSON text."),
]


def warm(
    config: ConfigFile,
    source: Annotated[str, typer.Option("--from", metavar="TIER", help="Name of the tier to copy from.")],
    target: Annotated[str, typer.Option("--to", metavar="TIER", help="Name of the tier to copy to.")],
    to_config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Configuration with the tier to copy to, if it is not in --config."),
    ] = None,
    namespace: Annotated[
        str | None,
        typer.Option(help="Whose blocks: the id that `kvtier inspect` shows, or its beginning. Default: the only one."),
    ] = None,
    identity: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What `kvtier inspect --json` prints of an engine's disk, if none of the tiers is a disk that knows"
            " the namespace.",
        ),
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Copy at most so many bytes per second, for example 200MiB. Default: no limit.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy a namespace's blocks from one tier to another, so that a new node starts warm.

    Every block is verified before it is copied, with its secret if there is one; a damaged one is counted and left out.
    Blocks that are there are skipped, so a copy that was interrupted goes on where it ended. Nothing in the destination
    gives way: what has no room is counted. A disk that an engine uses is refused. Exit code 0: all blocks are there. 1:
    some could not be copied. 2: a tier cannot be used; one line says why.
    """
    with refusing(as_json), ended_by_sigterm(), ExitStack() as stack:
        limit = None if rate is None else parse_size("rate", rate)
        given, to_given = places.read_configs(config, to_config)
        tiers = places.find_tier(given, source, "from"), places.find_tier(to_given, target, "to")
        if (given, source) == (to_given, target):
            raise ConfigError("to", target, "another tier than --from")
        for tier in tiers:
            places.refuse_ranks(tier)
        known = known_namespace(tiers, namespace, identity)
        for tier in tiers:
            places.check_free(tier, known, is_source=tier is tiers[0])
        slots = min(_MAX_SLOTS, max(1, ARENA_BYTES // known.block_bytes))
        arena = stack.enter_context(Arena.create(slots, known.block_bytes))
        begin, end = (
            [stack.enter_context(_started(part, known, arena)) for part in places.parts_of(tier)] for tier in tiers
        )
        progress = stack.enter_context(_shown(f"{source} to {target}", as_json))
        copied = Copier(begin, end, arena.view, limit).run(progress)
    _tell(copied, known, as_json)
    if copied.num_failed or copied.no_room:
        raise typer.Exit(EXIT_WRONG)


def known_namespace(tiers: tuple[TierConfig, TierConfig], wanted: str | None, identity: Path | None) -> places.Known:
    """Return the namespace to copy: from a file, else from the source's disk, else from the destination's.

    Raises:
        KVTierError: the source cannot list its blocks, or the namespace is not known.
    """
    source, target = tiers
    places.check_lists(source)
    if identity is not None:
        return places.choose(places.read_identity(identity), wanted)
    return places.choose(places.known_namespaces(source) or places.known_namespaces(target), wanted)


@contextmanager
def _started(tier: TierConfig, known: places.Known, arena: Arena) -> Iterator[Tier]:
    failures = Failures()
    foreign = places.foreign_bytes(tier, places.fingerprint_in(tier, known))
    context = TierContext(known.namespace, arena.fd, observer=Observers([failures]))
    manager = construct_tier(tier, arena.view, TrialSpec(context))
    try:
        opened = Tier(tier.name, manager, failures, foreign)
        opened.start()
        yield opened
    finally:
        manager.shutdown()


@contextmanager
def _shown(what: str, as_json: bool) -> Iterator[Callable[[Copied], None]]:
    """Show progress on stderr, if it is a terminal; yield what is called with the state of the copy."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        DownloadColumn(True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=as_json or not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def show(copied: Copied) -> None:
            text = one_line(f"{what}: {copied.blocks:,} blocks, {copied.present:,} were there")
            bar.update(task, completed=copied.bytes, description=text)

        yield show


def _tell(copied: Copied, known: places.Known, as_json: bool) -> None:
    if as_json:
        values = {
            "namespace": known.fingerprint,
            "copied": copied.blocks,
            "bytes": copied.bytes,
            "present": copied.present,
            "no_room": copied.no_room,
            "failed": dict(copied.failed),
            "seconds": round(copied.seconds, 3),
        }
        print_json(values)
        return
    speed = format_size(copied.bytes / max(copied.seconds, 1e-9))
    size = f"{format_size(copied.bytes)} in {copied.seconds:.1f} s, {speed}/s"
    typer.echo(
        f"{known.fingerprint[:SHORT_ID]}: {copied.blocks:,} blocks copied ({size}), {copied.present:,} were there"
    )
    if copied.no_room:
        typer.echo(f"  {copied.no_room:,} left out: the destination has no room for them")
    for cause, count in copied.failed.items():
        typer.echo(one_line(f"  {count:,} failed: {cause}"))
