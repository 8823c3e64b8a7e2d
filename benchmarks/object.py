"""How fast the object tier's store moves blocks, and how many requests and bytes each block costs.

Every figure is the median of several rounds. A round measures every case before the next one begins. The raw limit is
one large object, which the same client writes and reads with one request each: no client gets more from this server.
`single` is the same store with packs of one block, that is, one request per block. `scattered` reads one block of four
neighbours: its time as a share of the time for all of them, and its requests per block.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import obstore
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvtier.abc import StoreContext
from kvtier.namespace import Namespace
from kvtier.primary.arena import Arena
from kvtier.stores.object.client import connect
from kvtier.stores.object.options import ObjectOptions
from kvtier.stores.object.store import ObjectStore
from kvtier.testing.stores import make_key

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "servers"))
import swift_server
from moto_server import MotoServer

BUCKET = "kvtier"
CALL_BYTES = 4 << 20
CALL_BLOCKS = 64
SCATTER = 4
"""Scattered reads want one block of so many neighbours."""
Sample = dict[str, float]


class Case:
    """Blocks of one size in an arena, with a store of packs and a store of single blocks."""

    def __init__(self, endpoint: str, block_bytes: int, total_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.count = max(2, total_bytes // block_bytes)
        self.few = min(self.count, 32)
        self.step = max(1, min(CALL_BLOCKS, CALL_BYTES // block_bytes))
        self.arena = Arena.create(self.count, block_bytes)
        random = np.random.default_rng(block_bytes)
        np.asarray(self.arena.view)[:] = random.integers(0, 256, (self.count, block_bytes), dtype=np.uint8)
        self.rows = [self.arena.row(slot) for slot in range(self.count)]
        self.keys = [make_key(number) for number in range(self.count)]
        self.packed = self._open(endpoint, "packed", CALL_BYTES)
        self.single = self._open(endpoint, "single", 4096)
        self.bucket = connect(self._settings(endpoint, "raw", CALL_BYTES))
        self.whole = bytes(np.asarray(self.arena.view).data)

    def close(self) -> None:
        """Close the stores and release the arena."""
        self.packed.close()
        self.single.close()
        self.rows.clear()
        self.arena.close()

    def round(self) -> Sample:
        """Write and read every block once; return GB/s, and requests and bytes per block."""
        sample = {
            "raw write": self._rate(lambda: obstore.put(self.bucket, "raw/big", self.whole, use_multipart=False)),
            "raw read": self._rate(lambda: obstore.get(self.bucket, "raw/big").bytes()),
        }
        for name, store, count in (("packed", self.packed, self.count), ("single", self.single, self.few)):
            for way, move in (("write", store.write), ("read", store.read_into)):
                store.client.requests.clear()
                store.client.moved_bytes.clear()
                sample[f"{name} {way}"] = self._rate(lambda move=move, count=count: self._move(move, count), count)  # type: ignore[misc] # mypy cannot infer a lambda's default
                kind = "put" if way == "write" else "get"
                sample[f"{name} {way} requests"] = store.client.requests[kind] / count
                sample[f"{name} {way} bytes"] = store.client.moved_bytes[kind] / count
        scattered = [number for number in range(self.count) if number % SCATTER == 0]
        self.packed.client.requests.clear()
        whole = self._seconds(lambda: self._move(self.packed.read_into, self.count))
        self.packed.client.requests.clear()
        sample["scattered seconds"] = self._seconds(lambda: self._read_some(scattered)) / whole
        sample["scattered requests"] = self.packed.client.requests["get"] / len(scattered)
        return sample

    def _read_some(self, numbers: list[int]) -> None:
        """Read some blocks, in calls that cover as many packs as those of `_move`."""
        per_call = max(1, self.step // SCATTER)
        for start in range(0, len(numbers), per_call):
            some = numbers[start : start + per_call]
            if not all(self.packed.read_into([self.keys[i] for i in some], [self.rows[i] for i in some])):
                raise RuntimeError("a block was not moved")

    def _move(self, move: Callable[..., list[bool]], count: int) -> None:
        for start in range(0, count, self.step):
            stop = min(count, start + self.step)
            if not all(move(self.keys[start:stop], self.rows[start:stop])):
                raise RuntimeError("a block was not moved")

    def _rate(self, move: Callable[[], Any], count: int | None = None) -> float:
        return (self.count if count is None else count) * self.block_bytes / 1e9 / self._seconds(move)

    @staticmethod
    def _seconds(move: Callable[[], Any]) -> float:
        started = time.perf_counter()
        move()
        return time.perf_counter() - started

    def _settings(self, endpoint: str, name: str, pack_bytes: int) -> ObjectOptions:
        return ObjectOptions.read(
            {
                "url": f"s3://{BUCKET}/{name}-{self.block_bytes}",
                "capacity": "8GiB",
                "endpoint": endpoint,
                "region": "us-east-1",
                "allow_http": True,
                "path_style": True,
                "pack_size": pack_bytes,
                "refresh": 3600.0,
                "timeout": 120.0,
            }
        )

    def _open(self, endpoint: str, name: str, pack_bytes: int) -> ObjectStore:
        context = StoreContext(Namespace({"model": "bench"}), self.block_bytes)
        return ObjectStore.open(self._settings(endpoint, name, pack_bytes).to_json(), context)


@contextlib.contextmanager
def serving(kind: str) -> Iterator[str]:
    """Run a server on this machine and yield its endpoint; put its credentials into the environment."""
    server: Any = swift_server.SwiftServer() if kind == "swift" else MotoServer()
    try:
        server.start().make_bucket(BUCKET)
        os.environ["AWS_ACCESS_KEY_ID"] = swift_server.ACCESS_KEY if kind == "swift" else "kvtier"
        os.environ["AWS_SECRET_ACCESS_KEY"] = swift_server.SECRET_KEY if kind == "swift" else "kvtier-secret"
        yield server.endpoint
    finally:
        server.close()


def lookup_figures(store: ObjectStore, rounds: int) -> dict[str, float]:
    """Return the median milliseconds and all requests of `contains` with 8,192 missing keys, over all rounds."""
    keys = [make_key(1_000_000 + number) for number in range(8192)]
    store.client.requests.clear()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        store.contains(keys)
        times.append((time.perf_counter() - started) * 1e3)
    return {"ms": statistics.median(times), "requests": sum(store.client.requests.values())}


def index_figures(num_packs: int, values: int) -> dict[str, float]:
    """Return the costs of an index of packs of `values` blocks.

    They are bytes of memory per block, bytes of names per block, and seconds per million blocks.
    """
    import tracemalloc

    from kvtier.stores.object.catalogue import Catalogue
    from kvtier.stores.object.names import PackName, Stamps, digest_of

    stamps, fingerprint = Stamps(), "0" * 32
    names = [
        PackName(
            stamps.make(), fingerprint, tuple(digest_of(make_key(values * pack + place)) for place in range(values))
        )
        for pack in range(num_packs)
    ]
    paths = [name.path("bench/v1") for name in names]
    started = time.perf_counter()
    catalogue = Catalogue("bench/v1", fingerprint, 1000)
    for path in paths:
        catalogue.add(path, 1000 * values)
    seconds = time.perf_counter() - started
    tracemalloc.start()
    again = Catalogue("bench/v1", fingerprint, 1000)
    for name in names:
        again.add(name.path("bench/v1"), 1000 * values)
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    blocks = values * num_packs
    return {
        "memory_bytes": memory / blocks,
        "name_bytes": sum(map(len, paths)) / blocks,
        "seconds_a_million": seconds / blocks * 1e6,
    }


def measure(kind: str, sizes: list[int], total_bytes: int, rounds: int) -> dict[str, Any]:
    """Return the figures of all block sizes, of lookups and of indexes."""
    with serving(kind) as endpoint:
        cases = [Case(endpoint, size, total_bytes) for size in sizes]
        samples: dict[int, list[Sample]] = {case.block_bytes: [] for case in cases}
        for case in track([case for _ in range(rounds) for case in cases], description="measuring", transient=True):
            samples[case.block_bytes].append(case.round())
        lookups = lookup_figures(cases[0].packed, rounds)
        for case in cases:
            case.close()
    rows = []
    for size, taken in samples.items():
        row: dict[str, float] = {name: statistics.median(sample[name] for sample in taken) for name in taken[0]}
        for way in ("write", "read"):
            row[f"ratio {way}"] = statistics.median(sample[f"packed {way}"] / sample[f"raw {way}"] for sample in taken)
        rows.append({"block_bytes": size, **row})
    packs = 200 if total_bytes < 32 << 20 else 4000
    indexes = [{"values": values, **index_figures(packs, values)} for values in (2, 8, 64)]
    return {"server": kind, "rows": rows, "lookups": lookups, "index": indexes}


def report(figures: dict[str, Any]) -> None:
    """Print the tables."""
    table = Table(
        title=f"{figures['server']}: GB/s and requests a block, write / read; ratio: packed to one big object"
    )
    for column in (
        "block",
        "raw GB/s",
        "packed GB/s",
        "single GB/s",
        "ratio",
        "requests a block",
        "bytes a block",
        "scattered",
    ):
        table.add_column(column, justify="right")
    for row in figures["rows"]:
        cells = [f"{row[f'{name} write']:.3f} / {row[f'{name} read']:.3f}" for name in ("raw", "packed", "single")]
        cells.append(f"{row['ratio write']:.2f} / {row['ratio read']:.2f}")
        cells.append(f"{row['packed write requests']:.3f} / {row['packed read requests']:.3f}")
        cells.append(f"{row['packed write bytes']:,.0f} / {row['packed read bytes']:,.0f}")
        cells.append(f"{row['scattered seconds']:.2f}, {row['scattered requests']:.2f}")
        table.add_row(f"{row['block_bytes'] // 1024} KiB", *cells)
    console = Console(width=120)
    console.print(table)
    lookups = figures["lookups"]
    console.print(f"existence of 8,192 keys: {lookups['ms']:.1f} ms, {lookups['requests']} requests")
    for index in figures["index"]:
        console.print(
            f"index of packs of {index['values']}, a block: {index['memory_bytes']:.0f} bytes of memory,"
            f" {index['name_bytes']:.0f} of names; {index['seconds_a_million']:.1f} s for the names of a million"
        )


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of less data")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--server", choices=("swift", "moto"), default="swift")
    options = parser.parse_args()
    sizes = [size * 1024 for size in ((64, 512) if options.quick else (64, 256, 1024, 4096))]
    total = (4 if options.quick else 32) << 20
    figures = measure(options.server, sizes, total, 1 if options.quick else options.rounds)
    report(figures)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
