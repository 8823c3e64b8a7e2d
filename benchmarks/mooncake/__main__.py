"""How fast the mooncake tier's store moves blocks, beside Mooncake's own calls, a raw socket and a copy in memory.

One host is its own peer: a master, a process that lends memory, and this one. Every figure is the median of several
rounds; within a round all cases move the same blocks, in an order that changes from round to round.

- copy: from one part of memory to another, with numpy.
- socket: through one TCP connection between two threads of this process, the limit of loopback.
- bare: `batch_put_from` and `batch_get_into`, one registered buffer per block; nothing is summed or verified.
- summed: the same, and an XXH3-128 of each payload.
- sealed: the same with 128 more bytes per value, as kvtier has them: joined with the payload in private memory, or from
  1 MiB on in a second buffer. No client that sums in one thread and keeps a header with each value can be faster.
- kvtier: the store, which seals, verifies and moves payload and header.

Bare, sealed and kvtier make their calls on so many threads, and all is measured with one, and with as many as a tier
has.
"""

from __future__ import annotations

import argparse
import itertools
import queue
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash
from rich.console import Console
from rich.table import Table

from kvtier.abc import StoreContext
from kvtier.executors.loop import blocks_per_call
from kvtier.namespace import Namespace
from kvtier.primary.arena import Arena
from kvtier.stores.mooncake.client import join
from kvtier.stores.mooncake.options import MooncakeOptions
from kvtier.stores.mooncake.store import MooncakeStore
from kvtier.testing.stores import make_key

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "servers"))
from mooncake_server import MooncakePool

TARGET_RATIO = 0.85
SEAL_BYTES, JOINED_BYTES = 128, 512 << 10
MOVED_BYTES = 32 << 20


class Case:
    """Blocks of one size, and all ways to move them."""

    def __init__(self, pool: MooncakePool, block_bytes: int, threads: int) -> None:
        self.block_bytes, self.count = block_bytes, MOVED_BYTES // block_bytes
        self.arena = Arena.create(2 * self.count, block_bytes)
        rows = np.asarray(self.arena.view)
        rows[:] = np.random.default_rng(1).integers(0, 256, rows.shape, dtype=np.uint8)
        self.source, self.target = rows[: self.count], rows[self.count :]
        self.rows = [self.arena.row(slot) for slot in range(2 * self.count)]
        self.keys = [make_key(number) for number in range(self.count)]
        self.names = [f"bare:{block_bytes}:{number}" for number in range(self.count)]
        self.store = MooncakeStore.open(
            {"master": pool.address}, StoreContext(Namespace({"bench": block_bytes}), block_bytes)
        )
        self.bare = join(MooncakeOptions(master=pool.address))
        self.bare.register_buffer(rows.ctypes.data, rows.nbytes)
        self.left, self.right = socket.socketpair()
        self.steps = blocks_per_call(block_bytes)
        self.threads = ThreadPoolExecutor(threads)
        self.private: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        for _ in range(threads):
            private = np.zeros((self.steps, block_bytes + SEAL_BYTES), np.uint8)
            self.bare.register_buffer(private.ctypes.data, private.nbytes)
            self.private.put(private)

    def parts(self) -> list[range]:
        """Return the blocks of each call, as many as an I/O process would give it."""
        return [range(first, min(first + self.steps, self.count)) for first in range(0, self.count, self.steps)]

    def each(self, move: Callable[[range], None]) -> None:
        """Move all parts, on all threads."""
        for _ in self.threads.map(move, self.parts()):
            pass

    def copy(self) -> None:
        """Copy all blocks in memory."""
        np.copyto(self.target, self.source)

    def through_a_socket(self) -> None:
        """Send all blocks to another thread."""
        sender = threading.Thread(target=self.left.sendall, args=(self.source.reshape(-1).data,))
        sender.start()
        view = memoryview(self.target.reshape(-1).data)
        while view:
            view = view[self.right.recv_into(view) :]
        sender.join()

    def _bare(self, move: Callable[..., list[int]], base: np.ndarray) -> None:
        def move_part(part: range) -> None:
            addresses = [base.ctypes.data + index * self.block_bytes for index in part]
            codes = move([self.names[index] for index in part], addresses, [self.block_bytes] * len(part))
            assert all(code in (0, self.block_bytes) for code in codes), codes

        self.each(move_part)

    def bare_put(self) -> None:
        """Store with Mooncake's own call."""
        self._bare(self.bare.batch_put_from, self.source)

    def bare_get(self) -> None:
        """Load with Mooncake's own call."""
        self._bare(self.bare.batch_get_into, self.target)

    def summed_put(self) -> None:
        """Sum, and store with Mooncake's own call."""
        for row in self.rows[: self.count]:
            xxhash.xxh3_128_digest(row)
        self.bare_put()

    def summed_get(self) -> None:
        """Load with Mooncake's own call, and sum."""
        self.bare_get()
        for row in self.rows[self.count :]:
            xxhash.xxh3_128_digest(row)

    def sealed_put(self) -> None:
        """Sum, and store with 128 more bytes per value."""

        def put(part: range) -> None:
            private = self.private.get()
            for index in part:
                xxhash.xxh3_128_digest(self.rows[index])
            if self.block_bytes <= JOINED_BYTES:
                for room, index in zip(private, part, strict=False):
                    np.copyto(room[: self.block_bytes], self.source[index])
            self._sealed(self.bare.batch_put_from, self.bare.batch_put_from_multi_buffers, part, self.source, private)
            self.private.put(private)

        self.each(put)

    def sealed_get(self) -> None:
        """Load with 128 more bytes per value, and sum."""

        def get(part: range) -> None:
            private = self.private.get()
            self._sealed(self.bare.batch_get_into, self.bare.batch_get_into_multi_buffers, part, self.target, private)
            if self.block_bytes <= JOINED_BYTES:
                for room, index in zip(private, part, strict=False):
                    xxhash.xxh3_128_digest(room)
                    np.copyto(self.target[index], room[: self.block_bytes])
            else:
                for index in part:
                    xxhash.xxh3_128_digest(self.rows[self.count + index])
            self.private.put(private)

        self.each(get)

    def _sealed(
        self,
        move: Callable[..., list[int]],
        move_two: Callable[..., list[int]],
        part: range,
        base: np.ndarray,
        private: np.ndarray,
    ) -> None:
        names = [f"sealed:{self.block_bytes}:{index}" for index in part]
        whole = self.block_bytes + SEAL_BYTES
        rooms = [private.ctypes.data + number * whole for number in range(len(part))]
        if self.block_bytes <= JOINED_BYTES:
            codes = move(names, rooms, [whole] * len(part))
        else:
            rows = [base.ctypes.data + index * self.block_bytes for index in part]
            places = [list(pair) for pair in zip(rows, rooms, strict=True)]
            codes = move_two(names, places, [[self.block_bytes, SEAL_BYTES]] * len(part))
        assert all(code in (0, whole) for code in codes), codes

    def put(self) -> None:
        """Store with kvtier."""

        def put(part: range) -> None:
            assert all(self.store.write([self.keys[i] for i in part], [self.rows[i] for i in part]))

        self.each(put)

    def get(self) -> None:
        """Load with kvtier."""

        def get(part: range) -> None:
            into = [self.rows[self.count + i] for i in part]
            assert all(self.store.read_into([self.keys[i] for i in part], into))

        self.each(get)

    def forget(self) -> None:
        """Delete all blocks, so that the next round stores new ones."""
        sealed = [f"sealed:{self.block_bytes}:{index}" for index in range(self.count)]
        self.bare.batch_remove([*self.names, *sealed], force=True)
        self.store.delete(self.keys)

    def measure(self, turn: int) -> dict[str, float]:
        """Return seconds by case."""
        self.forget()
        puts = {"put bare": self.bare_put, "put sealed": self.sealed_put, "put kvtier": self.put}
        gets = {
            "get bare": self.bare_get,
            "get summed": self.summed_get,
            "get sealed": self.sealed_get,
            "get kvtier": self.get,
        }
        others = {"copy": self.copy, "socket": self.through_a_socket}
        seconds = {}
        for cases in (puts, gets, others):
            names = list(cases)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                seconds[name] = timed(cases[name])
        self.bare.batch_remove(self.names, force=True)
        seconds["put summed"] = timed(self.summed_put)
        self.get()
        assert np.array_equal(self.source, self.target)
        return seconds

    def close(self) -> None:
        """Leave the pool."""
        self.threads.shutdown()
        self.store.close()
        self.bare.close()


def timed(call: Callable[[], None]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 512, 2048], help="KiB per block")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, MooncakeOptions(master="").threads])
    arguments = parser.parse_args()
    ways = [f"{way} {client}" for way in ("put", "get") for client in ("bare", "summed", "sealed", "kvtier")]
    columns = ("copy", "socket", *ways)
    ratios = [(way, client) for client in ("sealed", "kvtier") for way in ("put", "get")]
    title = "GB/s; ratios to bare, paired by round; wanted for kvtier: 0.85"
    table = Table("KiB", "threads", *columns, *(f"{way} {client} / bare" for way, client in ratios), title=title)
    pool = MooncakePool(lent_bytes=512 << 20)
    try:
        pool.start()
        for size, threads in itertools.product(arguments.sizes, arguments.threads):
            case = Case(pool, size << 10, threads)
            case.measure(0)
            rounds = [case.measure(turn) for turn in range(arguments.rounds)]
            median = {name: statistics.median(each[name] for each in rounds) for name in columns}
            reached = [
                statistics.median(each[f"{way} bare"] / each[f"{way} {client}"] for each in rounds)
                for way, client in ratios
            ]
            marks = [" !" if client == "kvtier" else "" for _, client in ratios]
            table.add_row(
                str(size),
                str(threads),
                *(f"{MOVED_BYTES / median[name] / 1e9:.2f}" for name in columns),
                *(
                    f"{ratio:.2f}{mark if ratio < TARGET_RATIO else ''}"
                    for ratio, mark in zip(reached, marks, strict=True)
                ),
            )
            case.close()
    finally:
        pool.close()
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
