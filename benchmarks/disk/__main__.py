"""The disk tier beside the raw limit of its device, interleaved in one run.

The raw limit is direct I/O in requests of 1 MiB on 4 threads, over a file that was preallocated and written before.
The tier's bytes go through `submit_store` and `submit_load` of a real DiskTierManager with its I/O process. Meanwhile
the scheduler's thread does 2 ms of pure Python work between two polls of the tier; it does the same while the raw limit
is measured. A round's ratio is to the mean of the raw limits just before and just after it. Loads run in a new process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from functools import partial
from pathlib import Path

from cases import JOB_SIZES, CaseFigures, measure_cases
from index import NUM_BLOCKS, IndexFigures
from peers import measure_peers
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tables import index_table, peer_table, scheduler_table, speed_table

from kvtier.cli.disk_speed.measure import BLOCK_SIZES, ROUND_BYTES
from kvtier.sizes import parse_size

QUICK_BYTES = 64 << 20
QUICK_INDEX = 50_000
PEER_BYTES = 512 << 20
"""What a peer moves per round, and the size of its arena: there are five of them at once."""
PEER_JOB = 16


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round of two sizes: is everything alive?")
    parser.add_argument("--json", type=Path, help="write the figures to this file; an existing one's are kept")
    parser.add_argument("--folder", type=Path, help="where to write, on the device in question")
    parser.add_argument("--blocks", nargs="*", help="bytes of a block, for example 128KiB")
    parser.add_argument("--jobs", nargs="*", type=int, default=JOB_SIZES, help="blocks of a job")
    parser.add_argument("--bytes", help="what a round moves, at least, for example 1GiB")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--index", type=int, help="blocks in the index of the start that is measured; 0: none")
    parser.add_argument("--peers", action="store_true", help="compare with other stores of blocks, and only that")
    parser.add_argument("--arena-path", type=Path, help="with --peers: a tmpfs of huge pages for the arenas")
    options = parser.parse_args()
    console = Console(width=180 if options.peers else 140)
    default = [128 << 10, 2 << 20] if options.quick else list(BLOCK_SIZES)
    sizes = default if options.blocks is None else [parse_size("blocks", text) for text in options.blocks]
    num_bytes = parse_size("bytes", options.bytes or (QUICK_BYTES if options.quick else ROUND_BYTES))
    rounds = options.rounds or (1 if options.quick else 5)
    num_index = options.index if options.index is not None else (QUICK_INDEX if options.quick else NUM_BLOCKS)
    folder = Path(tempfile.mkdtemp(prefix="kvtier-disk-", dir=options.folder))
    if options.peers:
        num_bytes = (
            parse_size("bytes", options.bytes) if options.bytes else (QUICK_BYTES if options.quick else PEER_BYTES)
        )
        compare_with_peers(folder, sizes, num_bytes, rounds, options, console)
        return
    try:
        figures, index = measure(folder, sizes, options.jobs, num_bytes, rounds, num_index, console)
    finally:
        shutil.rmtree(folder)
    report(figures, index, options.json, console)


def measure(
    folder: Path, sizes: list[int], jobs: list[int], num_bytes: int, rounds: int, num_index: int, console: Console
) -> tuple[list[CaseFigures], IndexFigures | None]:
    """Measure every case, and show the progress in one line."""
    figures: list[CaseFigures] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)
        for size in sizes:
            for job in jobs:
                tell = lambda what: progress.update(task, description=what)  # noqa: E731 - used once, below
                figures += measure_cases(folder, size, job, num_bytes, rounds, tell)
        progress.update(task, description="a large index")
        index = IndexFigures.measure(folder, num_index) if num_index else None
    return figures, index


def compare_with_peers(
    folder: Path, sizes: list[int], num_bytes: int, rounds: int, options: argparse.Namespace, console: Console
) -> None:
    """Measure each size; print a table after each, and write JSON if asked."""
    found, columns = [], (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    try:
        for size in sizes:
            with Progress(*columns, console=console, transient=True) as progress:
                say = partial(console.print, soft_wrap=True)  # a command in a line shall be copied whole
                task = progress.add_task("starting", total=None)
                tell = lambda what: progress.update(task, description=what)  # noqa: B023, E731 - called in this turn only
                figures = measure_peers(folder, size, PEER_JOB, num_bytes, rounds, options.arena_path, tell, say)
            console.print(peer_table(figures, PEER_JOB))
            found += [row.to_json() for row in figures]
    finally:
        shutil.rmtree(folder)
    if options.json is not None:
        options.json.write_text(json.dumps({"peers": found}, indent=1))


def report(figures: list[CaseFigures], index: IndexFigures | None, path: Path | None, console: Console) -> None:
    """Print the tables; add the figures to those in the file, so that several runs can share a file."""
    if figures and not all(row.direct for row in figures):
        console.print("no direct I/O on this filesystem: both sides go through the page cache")
    if figures:
        console.print(speed_table(figures), scheduler_table(figures), f"The tier had {figures[-1].memory}.")
    if index is not None:
        console.print(index_table(index))
    if path is not None:
        known = json.loads(path.read_text()) if path.exists() else {"rows": [], "index": None}
        rows = [*known["rows"], *(row.to_json() for row in figures)]
        path.write_text(json.dumps({"rows": rows, "index": index.__dict__ if index else known["index"]}, indent=1))


if __name__ == "__main__":
    main()
