"""Tables of the figures; "!" marks a missed target."""

from __future__ import annotations

from collections.abc import Sequence

from cases import CPU_BLOCK_BYTES, CPU_TARGET, STEP_TARGET_MS, CaseFigures
from index import IndexFigures
from peers import KVTIER, PeerFigures
from rich.table import Table

from kvtier.primary.huge_pages import MemoryKind
from kvtier.sizes import format_size


def speed_table(figures: Sequence[CaseFigures]) -> Table:
    """Return a table of throughput and CPU time, one row per case."""
    table = Table(title="blocks to and from the disk, the scheduler's thread busy (medians; ! misses its target)")
    columns = ("block", "job", "", "raw GB/s", "4 KiB pages", "tier GB/s", "ratio", "target", "CPU s/GB", "raw CPU")
    for column in (*columns, "raw summed GB/s", "ratio", "CPU"):
        table.add_column(column, justify="right" if column else "left")
    for row in figures:
        cpu_late = row.block_bytes >= CPU_BLOCK_BYTES and row.cpu > CPU_TARGET
        table.add_row(
            format_size(row.block_bytes),
            str(row.job_blocks),
            "load" if row.load else "store",
            f"{row.raw:.2f}",
            f"{row.raw_small:.2f}",
            f"{row.tier:.2f}",
            _marked(f"{row.ratio:.2f}", row.target is not None and row.ratio < row.target),
            "" if row.target is None else f"{row.target:.2f}",
            _marked(f"{row.cpu:.3f}", cpu_late),
            f"{row.raw_cpu:.3f}",
            f"{row.summed:.2f}",
            f"{row.summed_ratio:.2f}",
            f"{row.summed_cpu:.3f}",
        )
    return table


def scheduler_table(figures: Sequence[CaseFigures]) -> Table:
    """Return a table of times on the scheduler's thread, one row per case."""
    table = Table(title="the scheduler's thread (p50 / p99 / max of a step in ms; microseconds; lookups a second)")
    columns = (
        "block",
        "job",
        "",
        "tier idle",
        "raw at work",
        "tier at work",
        "job us",
        "target",
        "least us",
        "hits/s",
        "misses/s",
    )
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for row in figures:
        grown = row.steps_ms["tier"]["p99"] - row.steps_ms["idle"]["p99"]
        idle, raw, tier = (" / ".join(f"{value:.2f}" for value in row.steps_ms[name].values()) for name in row.steps_ms)
        table.add_row(
            format_size(row.block_bytes),
            str(row.job_blocks),
            "load" if row.load else "store",
            idle,
            raw,
            _marked(tier, grown > STEP_TARGET_MS),
            _marked(f"{row.job_us:.0f}", row.job_us > row.job_target_us),
            f"{row.job_target_us:.0f}",
            f"{row.least_us:.0f}",
            f"{row.lookups['present'] / 1e6:.1f}M",
            f"{row.lookups['absent'] / 1e6:.1f}M",
        )
    return table


def index_table(figures: IndexFigures) -> Table:
    """Return a table of the start with a large index."""
    table = Table(title=f"a start with {figures.num_blocks:,} blocks in the index")
    for column in ("", "measured", "target"):
        table.add_column(column, justify="right" if column else "left")
    rate, disk, memory = figures.records_per_second, figures.disk_bytes, figures.memory_bytes
    for name, shown, target, late in (
        ("records a second, process start included", f"{rate:,.0f}", "500,000", rate < 500_000),
        ("keys a second into two bare dictionaries", f"{figures.bare_per_second:,.0f}", "", False),
        ("longest call meanwhile, ms", f"{figures.longest_call_ms:.1f}", "", False),
        ("bytes a block on disk beside the payload", f"{disk:.1f}", "150", disk > 150),
        ("bytes a block in the scheduler's memory", f"{memory:.0f}", "250", memory > 250),
        ("bytes a key in two bare dictionaries", f"{figures.bare_bytes:.0f}", "", False),
    ):
        table.add_row(name, _marked(shown, late), target)
    return table


PEER_TARGETS = {128 << 10: (0.60, 0.70, 0.30), 512 << 10: (0.85, 0.90, 0.20), 2 << 20: (0.90, 0.95, 0.16)}
"""Least ratios of kvtier's stores and loads to the raw limit with checksums, and most CPU seconds per GB, by bytes per
block; larger blocks have the last one's."""


def peer_table(figures: Sequence[PeerFigures], job_blocks: int) -> Table:
    """Return a table of kvtier, its peers and the raw limits, one row per block size and each of them."""
    table = Table(
        title=f"blocks to and from the disk in jobs of {job_blocks}, the scheduler busy (medians; ! misses its target)",
        caption="of summed: speed / the raw limit with checksums from huge pages just before and after. CPU: beside the"
        " scheduler's thread, whose time in the store's calls is us/block. times: kvtier's speed / this one's.",
    )
    for column in ("block", "", "pages"):
        table.add_column(column)
    for direction in ("store", "load"):
        for column in ("GB/s", "of summed", "CPU s/GB", "us/block", "times"):
            table.add_column(f"{direction} {column}", justify="right")
    for row in figures:
        own = next(other for other in figures if (other.name, other.block_bytes) == (KVTIER, row.block_bytes))
        cells = [cell for load in (False, True) for cell in _peer_cells(row, own, load)]
        pages = "4 KiB" if row.memory == MemoryKind.SMALL.value else "huge"
        table.add_row(format_size(row.block_bytes), row.name, pages, *cells)
    return table


def _peer_cells(row: PeerFigures, own: PeerFigures, load: bool) -> list[str]:
    speed, ratio, cpu, thread = (
        row.median(load, name) for name in ("gb_per_second", "ratio", "cpu_per_gb", "thread_us")
    )
    targets = PEER_TARGETS.get(min(row.block_bytes, max(PEER_TARGETS))) if row is own else None
    slow = targets is not None and ratio < targets[load]
    costly = targets is not None and cpu > targets[2]
    return [
        f"{speed:.2f}",
        "" if ratio is None else _marked(f"{ratio:.2f}", slow),
        _marked(f"{cpu:.3f}", costly),
        "" if thread is None else f"{thread:.1f}",
        "" if row is own else f"{own.median(load, 'gb_per_second') / speed:.2f}",
    ]


def _marked(text: str, late: bool) -> str:
    return f"{text} !" if late else text
