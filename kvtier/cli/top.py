"""`kvtier top`: shows what an engine's cache does, live."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvtier.cli.slabs import AsJson, make_console, print_json, refusing
from kvtier.cli.tables import folding_table
from kvtier.cli.watching.exposition import Sample, fetch
from kvtier.cli.watching.figures import Figures, TierFigures, figures_of
from kvtier.cli.watching.recorded import samples
from kvtier.errors import TraceError
from kvtier.sizes import format_size

SourceArgument = Annotated[
    str, typer.Argument(metavar="URL|FILE", help="The address of an engine's metrics, or a recording of an engine.")
]
IntervalOption = Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")]
OnceOption = Annotated[
    bool, typer.Option("--once", help="Print what happens in one interval, or in a whole recording, and end.")
]


def top(
    source: SourceArgument = "http://localhost:8000/metrics",
    interval: IntervalOption = 2.0,
    once: OnceOption = False,
    as_json: AsJson = False,
) -> None:
    """Show what an engine's cache does, live: hits by tier, bytes, waits, failures, capacity.

    Ctrl-C ends it. With --json, JSON per interval. A recording (`record` in the configuration) is repeated call by
    call: what a person watches goes as fast as it went then, --json as fast as it can. Exit code 2: the engine does not
    answer, has no kvtier, or the file is no recording; one line says why.
    """
    with refusing(as_json):
        if "://" in source:
            looks = _looks_at_engine(source, interval)
        else:
            plays = not (once or as_json)
            looks = _looks_at_recording(Path(source), None if once else interval, plays)
        if once or as_json:
            for figures in looks:
                print_json(figures.to_json()) if as_json else make_console().print(view(figures))
                if once:
                    return
            return
        with Live(console=make_console(), screen=True, auto_refresh=False) as live:
            for figures in looks:
                live.update(view(figures), refresh=True)


def _looks_at_engine(url: str, interval: float) -> Iterator[Figures]:
    before = fetch(url)
    while True:
        time.sleep(interval)
        now = fetch(url)
        yield figures_of(before, now)
        before = now


def _looks_at_recording(path: Path, interval: float | None, plays: bool) -> Iterator[Figures]:
    """Yield what happened in each interval; with `plays`, as long after each other as they were then.

    Raises:
        TraceError: the file is no recording, or nothing happens in it.
    """
    before: Sample | None = None
    num_looks = 0
    for now in samples(path, interval):
        if before is not None:
            num_looks += 1
            if plays:
                time.sleep(now.seconds - before.seconds)
            yield figures_of(before, now)
        before = now
    if not num_looks:
        raise TraceError(f"{path}: a recording in which nothing happens")


def view(figures: Figures) -> RenderableType:
    """Return what is shown; 80 columns are enough."""
    if figures.off:
        return Text(f"kvtier is off: {figures.off}; the engine's log says why", style="bold red")
    saved, seconds = figures.saved_tokens_per_second, figures.saved_seconds_per_second
    wait = f", mean {figures.mean_wait:.3f} s" if figures.mean_wait else ""
    lines = [
        f"saved {saved:,.0f} tokens/s, about {seconds:.2f} s of computing per second",
        f"waited {_listed(figures.waits) or 'none'}{wait}",
    ]
    if gave_up := _listed(figures.gave_up):
        lines.append(f"stopped waiting {gave_up}")
    if figures.errors:
        lines.append(f"{figures.errors:.0f} faults inside kvtier: please report them with the log")
    return Group(Text("\n".join(lines)), _table(figures), *map(_troubles, figures.tiers))


def _table(figures: Figures) -> Table:
    headings = ("tier", "", "hits", "read/s", "written/s", "full", "of", "up/down", "again/s")
    table = folding_table(headings, left=("tier",))
    for tier in figures.tiers:
        table.add_row(
            Text(tier.name),
            {True: Text("up", "green"), False: Text("down", "bold red"), None: Text("")}[tier.is_up],
            _percent(tier.hit_share),
            format_size(tier.read_bytes_per_second),
            format_size(tier.written_bytes_per_second),
            _percent(tier.fill),
            "" if not tier.capacity_bytes else format_size(tier.capacity_bytes),
            "{:.0f}/{:.0f}".format(*tier.in_flight),
            f"{tier.wanted_again_per_second:.1f}",
        )
    return table


def _troubles(tier: TierFigures) -> Text:
    return Text(f"{tier.name} failed {_listed(tier.failed)}", "yellow") if tier.failed else Text("", end="")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def _listed(rates: dict[str, float]) -> str:
    return ", ".join(f"{rate:.1f}/s {name}" for name, rate in rates.items() if rate)
