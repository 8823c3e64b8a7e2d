"""`kvtier bench disk`: measures the disk tier on the user's device, beside the device's own speed."""

from __future__ import annotations

import mmap
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from kvtier.cli.disk_speed.measure import BLOCK_SIZES, ROUND_BYTES, Figures, measure_case
from kvtier.cli.slabs import AsJson, make_console, print_json, refusing
from kvtier.cli.tables import folding_table
from kvtier.errors import ConfigError, KVTierError
from kvtier.sizes import format_size, parse_size
from kvtier.stores.slab.layout import LOCK_NAME

GOOD_SHARE = 0.9
"""Share of the device's speed from which a block size is recommended."""
_JOB_BLOCKS = 16
_QUICK_BYTES = 256 << 20
"""Bytes per round with --quick."""
_MAX_BLOCK_BYTES = 256 << 20
_END_SECONDS = 10.0
_SPACE_NEEDED = 4
"""Free space needed, as a multiple of a round's bytes: the raw limit's file, the tier's files, and a reserve of 2."""

bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure how fast kvtier is on this machine.")


@bench.command()
def disk(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A folder on the device to measure.")],
    block: Annotated[list[str] | None, typer.Option(help="Bytes per block, for example 2MiB; may be repeated.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Per size, one round of 256 MiB instead of five of 1 GiB.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a disk tier beside the raw limit of its device, and recommend a block size.

    The command writes to a folder of its own below DIR and removes it. Exit code 2: DIR cannot be used; one line says
    why.
    """
    with refusing(as_json), ended_by_sigterm():
        sizes = [_block_size(text) for text in block] if block else list(BLOCK_SIZES)
        num_bytes, rounds = (_QUICK_BYTES, 1) if quick else (ROUND_BYTES, 5)
        _check(directory, _SPACE_NEEDED * max(num_bytes, *sizes))
        folder = Path(tempfile.mkdtemp(prefix="kvtier-bench-", dir=directory))
        try:
            figures = _measure(folder, sizes, num_bytes, rounds)
        finally:
            _remove(folder)
    advice = advise(figures)
    if as_json:
        print_json({"rows": [row.to_json() for row in figures], "advice": advice})
    else:
        _show(make_console(), figures, advice)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does, so that its files are removed."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _remove(folder: Path) -> None:
    """Remove the measurement's folder. Try again for a while: an I/O process may still write for a moment."""
    deadline = time.monotonic() + _END_SECONDS
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        raise KVTierError(f"{folder}: cannot be removed, something still writes there")


def _block_size(text: str) -> int:
    """Return the bytes per block that `--block` names.

    Raises:
        ConfigError: not a multiple of a page, zero, or more than `_MAX_BLOCK_BYTES`.
    """
    size = parse_size("block", text)
    if size % mmap.PAGESIZE or not 0 < size <= _MAX_BLOCK_BYTES:
        allowed = f"a multiple of {mmap.PAGESIZE} bytes, up to {format_size(_MAX_BLOCK_BYTES)}"
        raise ConfigError("block", text, allowed)
    return size


def _check(directory: Path, needed: int) -> None:
    """Refuse a directory that does not exist, belongs to a disk tier, or has too little space."""
    if not directory.is_dir():
        raise ConfigError("DIR", str(directory), "a directory that exists")
    if (directory / LOCK_NAME).exists() or (directory.parent / LOCK_NAME).exists():
        raise ConfigError("DIR", str(directory), "another directory on the device: this one belongs to a disk tier")
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ConfigError("DIR", f"{format_size(free)} free", f"at least {format_size(needed)} for the measurement")


def _measure(folder: Path, sizes: Sequence[int], num_bytes: int, rounds: int) -> list[Figures]:
    figures: list[Figures] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=None)

        def tell(what: str) -> None:
            progress.update(task, description=what)

        for size in sizes:
            figures += measure_case(folder, size, _JOB_BLOCKS, num_bytes, rounds, tell)
    return figures


def advise(figures: Sequence[Figures]) -> dict[str, Any]:
    """Return the recommended block size and its speeds; sizes in bytes, speeds in GB/s.

    `block_bytes` is the smallest block size whose stores and loads reach `GOOD_SHARE` of the device's speed, else the
    size that comes closest.
    """
    worst: dict[int, float] = {}
    for row in figures:
        worst[row.block_bytes] = min(worst.get(row.block_bytes, row.ratio), row.ratio)
    good = [size for size, ratio in sorted(worst.items()) if ratio >= GOOD_SHARE]
    block_bytes = good[0] if good else max(worst, key=lambda size: worst[size])
    speeds = {"load" if row.load else "store": row.tier for row in figures if row.block_bytes == block_bytes}
    return {
        "block_bytes": block_bytes,
        "share_of_the_device": worst[block_bytes],
        "store_gb_per_second": speeds["store"],
        "load_gb_per_second": speeds["load"],
        "direct": all(row.direct for row in figures),
    }


def _show(console: Console, figures: Sequence[Figures], advice: dict[str, Any]) -> None:
    headings = ("block", "", "raw GB/s", "raw, 4 KiB pages", "tier GB/s", "ratio")
    title = "blocks to and from the disk beside a busy scheduler (medians)"
    table = folding_table(headings, left=("",), title=title)
    for row in figures:
        speeds = (f"{row.raw:.2f}", f"{row.raw_small:.2f}", f"{row.tier:.2f}", f"{row.ratio:.2f}")
        table.add_row(format_size(row.block_bytes), "load" if row.load else "store", *speeds)
    console.print(table)
    gain = statistics.median(row.raw / row.raw_small for row in figures)
    console.print(f"The tier had {figures[-1].memory}.")
    console.print(f"From huge pages the device moved {gain:.1f} times as much as from pages of 4 KiB.")
    size, share = format_size(advice["block_bytes"]), advice["share_of_the_device"]
    console.print(
        f"Recommended: blocks of {size} or more. Stores reach {advice['store_gb_per_second']:.2f} GB/s, loads"
        f" {advice['load_gb_per_second']:.2f} GB/s, both at least {share:.0%} of the device. Set block_size, in tokens,"
        f" to {size} / (bytes of KV cache per token)."
    )
    if not advice["direct"]:
        console.print("This filesystem has no direct I/O: all figures, the raw limit included, measure its page cache.")
