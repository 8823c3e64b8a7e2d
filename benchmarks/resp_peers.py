"""The resp tier beside LMCache's native client and bare sockets, interleaved, on one server of this machine.

- raw: one socket, one block after the other, nothing summed.
- summed: a bare loop on so many sockets and threads that sums each payload; the best count shows what any client in
  Python with checksums could reach.

Each client is a process of its own, which stores and later loads all blocks of its arena, under new keys in each round.
After each load all bytes are compared. A client moves nothing while another one is measured.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peer_host import PEERS_PYTHON, PeerProcess
from resp_peer import PEERS, PeerOrder
from rich.console import Console
from rich.table import Table
from valkey_server import ValkeyServer

from kvtier.errors import KVTierError

_SCRIPT = Path(__file__).with_name("resp_peer.py")
TARGET_OF_LMCACHE = 0.9
SUMMED_SOCKETS = (1, 2, 4, 8)
FIGURES = ("gb_per_second", "cpu_per_gb", "server_cpu_per_gb")


def measure_peers(sizes: list[int], num_bytes: int, rounds: int, connections: int | None) -> dict[str, Any]:
    """Return the medians per block size, direction and client, and the medians of the ratios per round."""
    # Without these, the server's C library returns memory at some moments, and the next client to store has page
    # faults. A server that evicts for new blocks has none.
    os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(1 << 40))
    rows = []
    for block_bytes in sizes:
        server = ValkeyServer().start()
        try:
            with _started(server, block_bytes, num_bytes // block_bytes, connections) as peers:
                taken = [_round(server, peers, number) for number in range(rounds + 1)][1:]  # the first warms up
        finally:
            server.close()
        for way in ("store", "load"):
            row: dict[str, Any] = {"block_bytes": block_bytes, "way": way}
            for peer in peers:
                for figure in FIGURES:
                    row[f"{peer.name} {figure}"] = statistics.median(each[peer.name, way][figure] for each in taken)
                for base in ("raw", "LMCache"):
                    if (base, way) in taken[0]:
                        row[f"{peer.name} to {base}"] = statistics.median(
                            each[peer.name, way]["gb_per_second"] / each[base, way]["gb_per_second"] for each in taken
                        )
            rows.append(row)
    return {"rows": rows}


@contextlib.contextmanager
def _started(
    server: ValkeyServer, block_bytes: int, num_blocks: int, connections: int | None
) -> Iterator[list[PeerProcess]]:
    with contextlib.ExitStack() as stack:
        peers = []
        for name, kind, sockets in _clients(connections):
            python = PEERS_PYTHON if kind == "LMCache" else Path(sys.executable)
            why = "" if python.exists() else f"there is no {python}"
            if not why:
                order = PeerOrder(kind, server.host, server.port, block_bytes, num_blocks, sockets)
                peer = PeerProcess(name, python, _SCRIPT, asdict(order))
                stack.callback(peer.close)
                why = peer.ready.get("missing", "")
            if why:
                print(f"NOT MEASURED: {name}: {why}. This brings it: make peers-environment", file=sys.stderr)
            else:
                peers.append(peer)
        yield peers


def _clients(connections: int | None) -> list[tuple[str, str, int | None]]:
    """Return name, kind and connections of each client; args: connections: of the tier, None for its default."""
    others = [(kind, kind, connections if kind == "kvtier" else None) for kind in PEERS if kind != "summed"]
    return others + [(f"summed, {sockets}", "summed", sockets) for sockets in SUMMED_SOCKETS]


def _round(server: ValkeyServer, peers: list[PeerProcess], number: int) -> dict[tuple[str, str], dict[str, float]]:
    """Measure every client once, beginning with another one in each round. Each finds an empty server."""
    first = number % len(peers)
    taken = {}
    for peer in peers[first:] + peers[:first]:
        server.command("FLUSHALL", "SYNC")
        for way in ("store", "load"):
            before = _cpu_seconds(server)
            figures = peer.move(way == "load", number)
            figures["server_cpu_per_gb"] = (_cpu_seconds(server) - before) / figures["gigabytes"]
            taken[peer.name, way] = figures
    return taken


def _cpu_seconds(server: ValkeyServer) -> float:
    if server.process is None:
        raise KVTierError("the server has ended")
    # Linux numbers a process's CPU clock so, see clock_getcpuclockid(3)
    return time.clock_gettime((~server.process.pid << 3) | 2)


def report_peers(figures: dict[str, Any]) -> None:
    """Print the table, and mark figures that miss the target."""
    title = (
        "Whole tier with checksums, LMCache's client without: GB/s, processor seconds per GB, ratios paired by round"
    )
    table = Table(title=title)
    for column in ("block", "", "client", "GB/s", "client s/GB", "server s/GB", "to raw", "to LMCache"):
        table.add_column(column, justify="left" if column == "client" else "right")
    for row in figures["rows"]:
        for name, _, _ in _clients(None):
            if f"{name} gb_per_second" not in row:
                continue
            of_raw, of_other = row[f"{name} to raw"], row.get(f"{name} to LMCache")
            missed = name == "kvtier" and of_other is not None and of_other < TARGET_OF_LMCACHE
            table.add_row(
                f"{row['block_bytes'] // 1024} KiB",
                row["way"],
                name,
                *(f"{row[f'{name} {figure}']:.2f}" for figure in FIGURES),
                f"{of_raw:.2f}",
                "" if of_other is None else f"{of_other:.2f}{' !' if missed else ''}",
            )
    Console(width=140).print(table)
