"""What one server, or one directory, of each shared tier gives to 1, 10, 100 and 1,000 engines on this machine.

Each engine is a store of the tier with clients and connections of its own; all are opened in this process, and eight
threads let them work in turn. Together they store 1,024 blocks, one or more per engine, load them, and ask for them.
Servers run on this machine, too: the figures compare numbers of engines and kinds of tiers, not networks. The bucket is
moto, a server in Python: its figures say what requests cost the engines, and nothing of a provider's speed. A second
one is in this process's memory, for numbers of engines that moto cannot answer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kvtier.abc import BlockStore, StoreContext
from kvtier.errors import KVTierError
from kvtier.namespace import Namespace
from kvtier.primary.arena import Arena
from kvtier.testing.stores import make_key

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "servers"))

BLOCK_BYTES = 128 << 10
NUM_BLOCKS = 1024
THREADS = 8
LOOKED_UP = 64
"""Keys per question."""


@dataclass
class Place:
    """Where engines share blocks: how to open a store there, and the processes that serve it."""

    open: Callable[[StoreContext], BlockStore]
    pids: list[int]


@contextlib.contextmanager
def resp(engines: int) -> Iterator[Place]:
    """One Valkey server."""
    from valkey_server import ValkeyServer

    from kvtier.stores.resp.store import RespStore

    server = ValkeyServer(maxclients="20000").start()
    try:
        yield Place(lambda context: RespStore.open({"url": server.url}, context), _pids(server.process))
    finally:
        server.close()


@contextlib.contextmanager
def filesystem(engines: int) -> Iterator[Place]:
    """A directory on this machine's disk."""
    from kvtier.stores.filesystem.store import FilesystemStore

    with tempfile.TemporaryDirectory() as folder:
        # A small capacity would make every engine list folders all the time.
        options = {"path": f"{folder}/kv", "capacity": shutil.disk_usage(folder).total // 2}
        yield Place(lambda context: FilesystemStore.open(options, context), [])


@contextlib.contextmanager
def bucket(engines: int) -> Iterator[Place]:
    """A bucket of moto's, listed as often as docs/scale.md advises for so many engines."""
    from moto_server import ACCESS_KEY, SECRET_KEY, MotoServer

    from kvtier.stores.object.store import ObjectStore

    os.environ.update(AWS_ACCESS_KEY_ID=ACCESS_KEY, AWS_SECRET_ACCESS_KEY=SECRET_KEY)
    server = MotoServer().start()
    options = {"url": "s3://kvtier/scale", "capacity": 1 << 32, "endpoint": server.endpoint, "region": "us-east-1"}
    options |= {"path_style": True, "allow_http": True, "refresh": _refresh(engines)}
    options |= {"timeout": 60.0, "connect_timeout": 60.0}  # moto is slow
    try:
        server.make_bucket("kvtier")
        yield Place(lambda context: ObjectStore.open(options, context), _pids(server.process))
    finally:
        server.close()


@contextlib.contextmanager
def bucket_in_memory(engines: int) -> Iterator[Place]:
    """A bucket in this process's memory: what engines cost, however many requests a server could answer."""
    from obstore.store import MemoryStore

    from kvtier.stores.object.client import Client
    from kvtier.stores.object.options import ObjectOptions
    from kvtier.stores.object.store import ObjectStore

    shared = MemoryStore()
    settings = ObjectOptions.read({"url": "s3://kvtier/scale", "capacity": 1 << 32, "refresh": _refresh(engines)})

    def open_store(context: StoreContext) -> ObjectStore:
        store = ObjectStore(Client(shared, settings.where), settings, context)
        store.start()
        return store

    yield Place(open_store, [])


def _refresh(engines: int) -> float:
    """Return the seconds that docs/scale.md advises."""
    return 2.0 if engines <= 10 else 10.0 if engines <= 100 else 30.0


@contextlib.contextmanager
def mooncake(engines: int) -> Iterator[Place]:
    """A Mooncake master, and one process that lends memory."""
    from mooncake_server import MooncakePool

    from kvtier.stores.mooncake.store import MooncakeStore

    # A master of the tests forgets clients after two seconds, and this many are late on a busy machine.
    pool = MooncakePool(lent_bytes=512 << 20, client_ttl=60)
    try:
        pool.start()
        options = {"master": pool.address}
        yield Place(lambda context: MooncakeStore.open(options, context), _pids(pool.master, pool.lender))
    finally:
        pool.close()


PLACES = {
    "resp": resp,
    "filesystem": filesystem,
    "object": bucket,
    "object-in-memory": bucket_in_memory,
    "mooncake": mooncake,
}


def measure(kind: str, engines: int, rounds: int, num_blocks: int) -> dict[str, Any]:
    """Return the figures of one kind with so many engines."""
    with PLACES[kind](engines) as place, ThreadPoolExecutor(THREADS) as threads:
        before = _resources(place)
        context = StoreContext(Namespace({"model": "scale"}), BLOCK_BYTES)
        started = time.perf_counter()
        stores = list(threads.map(lambda _: place.open(context), range(engines)))
        opened = time.perf_counter() - started
        list(threads.map(lambda store: store.contains([make_key(0)]), stores))
        after = _resources(place)
        figures = {name: (after[name] - before[name]) / engines for name in after}
        arenas = [Arena.create(max(1, num_blocks // engines), BLOCK_BYTES) for _ in range(THREADS)]
        try:
            taken = [_round(stores, arenas, threads, number) for number in range(rounds + 1)][1:]
        except KVTierError as error:
            causes = {cause.value: count for cause, count in context.failures.take().items()}
            raise KVTierError(f"{error} {causes}") from None
        finally:
            list(threads.map(lambda store: store.close(), stores))
            for arena in arenas:
                arena.close()
    return {
        "kind": kind,
        "engines": engines,
        "open_ms": opened / engines * 1e3,
        **figures,
        **{name: statistics.median(row[name] for row in taken) for name in taken[0]},
    }


def _round(stores: list[BlockStore], arenas: list[Arena], threads: ThreadPoolExecutor, number: int) -> dict[str, float]:
    """Let every engine store its blocks, then load them and look them up; all under new keys.

    Args:
        arenas: one per thread, the same in each round, since an engine's arena never changes.
    """
    per_engine = arenas[0].num_blocks
    for arena in arenas:
        np.asarray(arena.view)[:] = number
    shares = [range(first, len(stores), THREADS) for first in range(THREADS)]
    lookups: list[float] = []

    def keys_of(engine: int) -> list[Any]:
        first = (number * len(stores) + engine) * per_engine
        return [make_key(key) for key in range(first, first + per_engine)]

    def work(way: str, thread: int) -> None:
        rows = [arenas[thread].row(slot) for slot in range(per_engine)]
        for engine in shares[thread]:
            store, keys = stores[engine], keys_of(engine)
            if way == "look":
                start = time.perf_counter()
                store.contains((keys * LOOKED_UP)[:LOOKED_UP])
                lookups.append(time.perf_counter() - start)
                continue
            for start_at in range(0, per_engine, 32):
                part = slice(start_at, start_at + 32)
                done = (store.write if way == "store" else store.read_into)(keys[part], rows[part])
                if not all(done):
                    raise KVTierError(f"a block was not moved: {way}")

    figures = {}
    for way in ("store", "load", "look"):
        start = time.perf_counter()
        list(threads.map(lambda thread, way=way: work(way, thread), range(THREADS)))
        if way != "look":
            figures[f"{way}_gb"] = len(stores) * per_engine * BLOCK_BYTES / 1e9 / (time.perf_counter() - start)
    figures["look_p50_ms"], figures["look_p99_ms"] = np.percentile(np.array(lookups) * 1e3, (50, 99)).tolist()
    return figures


def _pids(*processes: Any) -> list[int]:
    return [process.pid for process in processes if process is not None]


def _resources(place: Place) -> dict[str, float]:
    """Return what this process and the servers hold at the moment."""
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "kib": _resident_kib(os.getpid()),
        "server_kib": sum(map(_resident_kib, place.pids)),
    }


def _resident_kib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def main() -> None:
    """Print a table as it is measured, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=NUM_BLOCKS, help="of all engines together, at least one each")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    table = Table(title=f"{BLOCK_BYTES >> 10} KiB blocks; all engines together, and what each engine costs")
    names = ("store_gb", "load_gb", "look_p50_ms", "look_p99_ms", "open_ms", "descriptors", "threads", "kib")
    for column in ("tier", "engines", *names, "server_kib"):
        table.add_column(column, justify="right")
    rows = []
    for kind in arguments.kinds:
        for engines in arguments.engines:
            try:
                row = measure(kind, engines, arguments.rounds, arguments.blocks)
            except (KVTierError, OSError) as error:
                print(f"NOT MEASURED: {kind}, {engines} engines: {error}", file=sys.stderr)
                continue
            rows.append(row)
            table.add_row(kind, str(engines), *(f"{row[name]:.2f}" for name in (*names, "server_kib")))
            print(json.dumps(row), file=sys.stderr)
    Console(width=150).print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
