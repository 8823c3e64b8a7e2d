"""How fast the resp tier's store moves blocks, beside a raw socket and redis-py, on one server of this machine.

Every figure is the median of several rounds. A round measures every case before the next round begins. Within a round
all clients move the same 8 MiB before the next 8 MiB, each time in another order, so that other work of the machine
affects all of them. Each client has its own keys, so that all replace values of the same age.

- raw: a socket that asks the same server for the same sizes with `sendall` and `recv_into`. It checks and parses
  nothing: no client gets more from this server on one connection.
- summed: the raw socket with an XXH3-128 of each payload, after it was sent or received. No client with checksums that
  works one value at a time can be faster.
- plain: a socket to a thread of this process instead of a server, the limit of loopback.
- kvtier: the resp store, which seals, verifies and moves batches of about 4 MiB on two connections, as a thread of the
  I/O process does.
- redis-py: `get` and `set`, one value at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import redis
import xxhash
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvtier.abc import StoreContext
from kvtier.executors.loop import blocks_per_call
from kvtier.namespace import Namespace
from kvtier.primary.arena import Arena
from kvtier.stores.resp.store import RespStore
from kvtier.testing.stores import make_key

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "servers"))
from resp_peer import receive
from resp_peers import measure_peers, report_peers
from valkey_server import ValkeyServer

TARGET_RATIO = 0.8
TARGET_FROM_BYTES = 512 * 1024
TARGET_PROBE_MILLISECONDS = 30.0
PROBED_KEYS = 8192
SLICE_BYTES = 8 << 20
PEER_KIBIBYTES = (128, 512, 2048)
Sample = dict[str, float]
Move = Callable[[range], Any]
"""Moves the blocks with these numbers."""


class Case:
    """Blocks of one size in an arena, and all clients that move them."""

    def __init__(self, server: ValkeyServer, block_bytes: int, total_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.count = max(2, total_bytes // block_bytes)
        self.arena = Arena.create(self.count, block_bytes)
        random = np.random.default_rng(block_bytes)
        np.asarray(self.arena.view)[:] = random.integers(0, 256, (self.count, block_bytes), dtype=np.uint8)
        self.rows = [self.arena.row(slot) for slot in range(self.count)]
        self.keys = [make_key(number) for number in range(self.count)]
        self.store = RespStore.open({"url": server.url}, StoreContext(Namespace({"model": "bench"}), block_bytes))
        self.client = redis.Redis(host=server.host, port=server.port)
        self.raw = socket.create_connection(server.address)
        self.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.step = blocks_per_call(block_bytes)
        self._small = memoryview(bytearray(64))

    def close(self) -> None:
        """Close all connections and release the arena."""
        self.store.close()
        self.client.close()
        self.raw.close()
        self.rows.clear()
        self.arena.close()

    def round(self) -> Sample:
        """Write and read every block once with each client; return GB/s by client and direction."""
        movers: dict[str, tuple[Move, Move]] = {
            "raw": (self._raw_write, self._raw_read),
            "summed": (self._summed_write, self._summed_read),
            "kvtier": (self._our_write, self._our_read),
            "redis-py": (self._client_write, self._client_read),
        }
        seconds = dict.fromkeys((f"{name} {way}" for name in movers for way in ("write", "read")), 0.0)
        per_slice = max(1, SLICE_BYTES // self.block_bytes)
        for start in range(0, self.count, per_slice):
            numbers = range(start, min(start + per_slice, self.count))
            first = start // per_slice % len(movers)
            order = [*movers.items()][first:] + [*movers.items()][:first]
            for name, (write, read) in order:
                seconds[f"{name} write"] += elapsed(lambda write=write, numbers=numbers: write(numbers))
                seconds[f"{name} read"] += elapsed(lambda read=read, numbers=numbers: read(numbers))
        seconds["plain write"], seconds["plain read"] = elapsed(self._plain_write), elapsed(self._plain_read)
        return {name: self.count * self.block_bytes / 1e9 / taken for name, taken in seconds.items()}

    def _our_write(self, numbers: range) -> None:
        for start in range(numbers.start, numbers.stop, self.step):
            stop = min(start + self.step, numbers.stop)
            if not all(self.store.write(self.keys[start:stop], self.rows[start:stop])):
                raise RuntimeError("a block was not stored")

    def _our_read(self, numbers: range) -> None:
        for start in range(numbers.start, numbers.stop, self.step):
            stop = min(start + self.step, numbers.stop)
            if not all(self.store.read_into(self.keys[start:stop], self.rows[start:stop])):
                raise RuntimeError("a block was not loaded")

    def _client_write(self, numbers: range) -> None:
        for number in numbers:
            self.client.set(b"pyc%06d" % number, self.rows[number])

    def _client_read(self, numbers: range) -> None:
        for number in numbers:
            self.rows[number][:] = self.client.get(b"pyc%06d" % number)

    def _summed_write(self, numbers: range) -> None:
        self._raw_write(numbers, b"sum", xxhash.xxh3_128_digest)

    def _summed_read(self, numbers: range) -> None:
        self._raw_read(numbers, b"sum", xxhash.xxh3_128_digest)

    def _raw_write(self, numbers: range, name: bytes = b"raw", note: Callable[[memoryview], Any] | None = None) -> None:
        for number in numbers:
            row = self.rows[number]
            self.raw.sendall(b"*3\r\n$3\r\nSET\r\n$9\r\n%b%06d\r\n$%d\r\n" % (name, number, self.block_bytes))
            self.raw.sendall(row)
            if note is not None:
                note(row)
            self.raw.sendall(b"\r\n")
            receive(self.raw, self._small[:5])

    def _raw_read(self, numbers: range, name: bytes = b"raw", note: Callable[[memoryview], Any] | None = None) -> None:
        head = self._small[: len(b"$%d\r\n" % self.block_bytes)]
        for number in numbers:
            self.raw.sendall(b"*2\r\n$3\r\nGET\r\n$9\r\n%b%06d\r\n" % (name, number))
            receive(self.raw, head)
            receive(self.raw, self.rows[number])
            receive(self.raw, self._small[:2])
            if note is not None:
                note(self.rows[number])

    def _plain_write(self) -> None:
        with peer(self._swallow) as connection:
            for row in self.rows:
                connection.sendall(row)
            receive(connection, self._small[:1])

    def _plain_read(self) -> None:
        with peer(self._pour) as connection:
            for row in self.rows:
                receive(connection, row)

    def _swallow(self, connection: socket.socket) -> None:
        memory = memoryview(bytearray(self.block_bytes))
        for _ in range(self.count):
            receive(connection, memory)
        connection.sendall(b"!")

    def _pour(self, connection: socket.socket) -> None:
        memory = bytes(self.block_bytes)
        for _ in range(self.count):
            connection.sendall(memory)


def elapsed(work: Callable[[], Any]) -> float:
    """Return the wall seconds of `work`."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@contextlib.contextmanager
def peer(serve: Callable[[socket.socket], None]) -> Iterator[socket.socket]:
    """Yield a loopback connection; a thread serves its other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = socket.create_connection(listener.getsockname())
        served, _ = listener.accept()
    thread = threading.Thread(target=serve, args=(served,))
    thread.start()
    with connection, served:
        yield connection
        thread.join()


def probe_milliseconds(server: ValkeyServer, rounds: int) -> dict[str, float]:
    """Return the milliseconds of `contains` with `PROBED_KEYS` keys: none, a prefix, or every other key held."""
    store = RespStore.open({"url": server.url}, StoreContext(Namespace({"model": "probe"}), 64))
    keys = [make_key(1_000_000 + number) for number in range(PROBED_KEYS)]
    half = PROBED_KEYS // 2 - 7
    cases = {"none held": [], "a prefix held": keys[:half], "every other one held": keys[::2]}
    figures = {}
    for name, held in cases.items():
        store.delete(keys)
        store.write(held, [memoryview(bytes(64))] * len(held))
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            found = store.contains(keys)
            times.append((time.perf_counter() - started) * 1e3)
            if sum(found) != len(held):
                raise RuntimeError("a wrong answer")
        figures[name] = statistics.median(times)
    store.close()
    return figures


def measure(sizes: list[int], total_bytes: int, rounds: int) -> dict[str, Any]:
    """Return the figures of all sizes, and of probes."""
    server = ValkeyServer().start()
    try:
        cases = [Case(server, size, total_bytes) for size in sizes]
        samples: dict[int, list[Sample]] = {case.block_bytes: [] for case in cases}
        for case in cases:
            case.round()  # warm-up: the first use of memory in both processes causes page faults
        for case in track([case for _ in range(rounds) for case in cases], description="measuring", transient=True):
            samples[case.block_bytes].append(case.round())
        probes = probe_milliseconds(server, rounds)
        for case in cases:
            case.close()
    finally:
        server.close()
    rows = []
    for size, taken in samples.items():
        row: dict[str, float] = {name: statistics.median(s[name] for s in taken) for name in taken[0]}
        for way in ("write", "read"):
            for base, ratio in (("raw", "ratio"), ("summed", "ratio to summed")):
                row[f"{ratio} {way}"] = statistics.median(s[f"kvtier {way}"] / s[f"{base} {way}"] for s in taken)
        rows.append({"block_bytes": size, **row})
    targets = {"ratio": TARGET_RATIO, "from_bytes": TARGET_FROM_BYTES, "probe_ms": TARGET_PROBE_MILLISECONDS}
    return {"rows": rows, "probes_ms": probes, "probed_keys": PROBED_KEYS, "targets": targets}


def report(figures: dict[str, Any]) -> None:
    """Print the tables, and mark figures that miss their targets."""
    table = Table(title="GB/s, write / read; ratio: kvtier to the raw socket on the same server, paired by round")
    columns = ("block", "plain socket", "raw socket", "raw, summed", "kvtier", "redis-py", f"ratio, >= {TARGET_RATIO}")
    for column in (*columns, "to summed"):
        table.add_column(column, justify="right")
    for row in figures["rows"]:
        names = ("plain", "raw", "summed", "kvtier", "redis-py")
        cells = [f"{row[f'{name} write']:.2f} / {row[f'{name} read']:.2f}" for name in names]
        counts = row["block_bytes"] >= TARGET_FROM_BYTES
        marks = ["!" if counts and row[f"ratio {way}"] < TARGET_RATIO else "" for way in ("write", "read")]
        cells.append(f"{row['ratio write']:.2f}{marks[0]} / {row['ratio read']:.2f}{marks[1]}")
        cells.append(f"{row['ratio to summed write']:.2f} / {row['ratio to summed read']:.2f}")
        table.add_row(f"{row['block_bytes'] // 1024} KiB", *cells)
    console = Console(width=140)
    console.print(table)
    for name, milliseconds in figures["probes_ms"].items():
        mark = "" if milliseconds < TARGET_PROBE_MILLISECONDS else " !"
        console.print(f"existence of {PROBED_KEYS:,} keys, {name}: {milliseconds:.1f} ms{mark}")


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of less data")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer", action="store_true", help="the whole tier beside LMCache's client instead")
    parser.add_argument("--connections", type=int, help="of the tier, with --peer; its default otherwise")
    options = parser.parse_args()
    total_bytes, rounds = (16 if options.quick else 128) << 20, 1 if options.quick else options.rounds
    if options.peer:
        figures = measure_peers([size * 1024 for size in PEER_KIBIBYTES], 2 * total_bytes, rounds, options.connections)
        report_peers(figures)
    else:
        figures = measure([size * 1024 for size in (*PEER_KIBIBYTES, 8192)], total_bytes, rounds)
        report(figures)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
