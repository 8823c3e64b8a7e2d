"""What compression brings: how much smaller real keys and values become, and how much faster they move.

The keys and values are those of the packaged model (SmolLM2-135M) for kvtier's own documentation, in blocks of 64
tokens.

- Ratio and GB/s of one thread, per data type. Time is the thread's own processor time, so that others do not count.
- Links: a Valkey server in a network namespace of its own, behind a cable that `tc tbf` limits both ways. The tier
  `resp` stores and loads blocks of bfloat16 through its I/O process, new ones in each round, in turn without
  compression, with "zstd" and with "auto". *raw* is a plain socket over the same cable. Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kvtier.abc import TierContext
from kvtier.namespace import Namespace
from kvtier.secondary.resp import RespTierManager
from kvtier.stores.compression.codec import BlockCodec
from kvtier.stores.compression.planes import element_bytes
from kvtier.testing.stores import make_key
from kvtier.testing.tier_rig import TierRig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "servers"))
from valkey_server import ValkeyServer

TOKENS_PER_BLOCK = 64
LINKS = (50, 200, 1000)
"""MB/s."""
MODES = ("off", "zstd", "auto")
LEAST, FASTER, FASTER_UP_TO = 0.95, 1.4, 200
"""No link may be slower than this share of "off"; those up to 200 MB/s must be so many times as fast."""
_SINK = """
import socket
server = socket.create_server(("0.0.0.0", 7777))
print(flush=True)
while True:
    peer, _ = server.accept()
    while peer.recv_into(bytearray(1 << 20)): pass
    peer.close()
"""


def kv_blocks(dtype: str, num_tokens: int) -> np.ndarray:
    """Return the model's keys and values, an array of bytes of shape (blocks, block bytes)."""
    import torch

    from kvtier.cli.demonstration.loading import load_model
    from kvtier.cli.demonstration.progress import Narrator

    loaded = load_model(None, dtype, os.cpu_count() or 1, Narrator(Console(), quiet=True))
    text = Path(__file__).parents[1].joinpath("docs", "operations.md").read_text()
    ids = loaded.tokenizer(text)["input_ids"][:num_tokens]
    with torch.inference_mode():
        cache = loaded.model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    parts = [part[0] for layer in cache.layers for part in (layer.keys, layer.values)]
    blocks = []
    for start in range(0, len(ids) - TOKENS_PER_BLOCK + 1, TOKENS_PER_BLOCK):
        pages = [part[:, start : start + TOKENS_PER_BLOCK].contiguous().view(torch.uint8) for part in parts]
        blocks.append(np.concatenate([page.numpy().reshape(-1) for page in pages]))
    return np.stack(blocks)


def measure_codec(blocks: np.ndarray, dtype: str) -> dict[str, float]:
    """Return ratio, and GB of blocks per second of processor time, of one thread."""
    codec = BlockCodec(blocks.shape[1], element_bytes({"dtype": dtype}))
    room, restored = (memoryview(bytearray(blocks.shape[1])) for _ in range(2))
    stored, seconds, back = 0, 0.0, 0.0
    for block in (blocks[0], *blocks):  # the first one twice: it allocates memory
        payload = memoryview(np.ascontiguousarray(block)).cast("B")
        started = time.thread_time()
        length = codec.compress(payload, room)
        middle = time.thread_time()
        if length:
            restored[:length] = room[:length]
            middle_again = time.thread_time()
            assert codec.expand(restored, length)
            back += time.thread_time() - middle_again
            assert restored == payload
        stored, seconds = stored + (length or len(payload)), seconds + middle - started
    total = blocks.nbytes + blocks.shape[1]
    return {"ratio": total / stored, "compress": total / seconds / 1e9, "restore": total / back / 1e9 if back else 0.0}


class Cable:
    """A network namespace at the other end of a cable whose rate is limited."""

    near, far = "198.18.88.1", "198.18.88.2"

    def __init__(self) -> None:
        self.name = f"kvt-bench-{os.getpid()}"
        self._end = f"kvtb{os.getpid()}"
        _run("ip", "netns", "add", self.name)
        _run("ip", "link", "add", self._end, "type", "veth", "peer", "name", "cable", "netns", self.name)
        _run("ip", "addr", "add", f"{self.near}/30", "dev", self._end)
        _run("ip", "link", "set", self._end, "up")
        _run("ip", "-n", self.name, "addr", "add", f"{self.far}/30", "dev", "cable")
        for end in ("cable", "lo"):
            _run("ip", "-n", self.name, "link", "set", end, "up")

    def limit(self, megabytes: int) -> None:
        """Limit the rate in both directions, MB/s."""
        shape = ("root", "tbf", "rate", f"{8 * megabytes}mbit", "burst", "2mb", "latency", "50ms")
        _run("tc", "qdisc", "replace", "dev", self._end, *shape)
        _run("tc", "-n", self.name, "qdisc", "replace", "dev", "cable", *shape)

    def raw_rate(self, total_bytes: int) -> float:
        """Return the MB/s of a plain socket."""
        command = ["ip", "netns", "exec", self.name, sys.executable, "-c", _SINK]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as sink:
            try:
                assert sink.stdout is not None
                sink.stdout.readline()
                data = bytes(1 << 20)
                with socket.create_connection((self.far, 7777)) as connection:
                    started = time.perf_counter()
                    for _ in range(total_bytes >> 20):
                        connection.sendall(data)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(1)
                    return (total_bytes >> 20 << 20) / (time.perf_counter() - started) / 1e6
            finally:
                sink.kill()

    def close(self) -> None:
        """Remove the namespace, and the cable with it."""
        _run("ip", "netns", "del", self.name)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


class Engine:
    """A tier over an arena of its own."""

    def __init__(self, server: ValkeyServer, mode: str, blocks: np.ndarray, num_blocks: int) -> None:
        context = TierContext(namespace=Namespace({"model": "bench", "dtype": "torch.bfloat16"}))
        self.rig = TierRig(context, num_blocks, blocks.shape[1])
        self.server, self.view = server, np.asarray(self.rig.arena.view)
        self.expected = blocks[np.arange(num_blocks) % len(blocks)]
        options = {"url": server.url, "prefix": mode, "compress": mode, "timeout": 60.0}
        self.rig.attach(RespTierManager(self.rig.spec, self.rig.arena.view, "resp", **options))
        self.rig.tier.start()
        self.rig.wait_up()
        self._numbers = count()

    def round(self) -> tuple[float, float]:
        """Store and load new blocks; return MB/s of both."""
        slots = range(self.rig.num_blocks)
        keys = [make_key(next(self._numbers)) for _ in slots]
        self.view[:] = self.expected
        rates = []
        for is_load in (False, True):
            started = time.perf_counter()
            assert self.rig.finish(self.rig.submit(keys, slots, load=is_load)).success
            rates.append(self.expected.nbytes / (time.perf_counter() - started) / 1e6)
            if not is_load:
                self.view[:] = 0
        assert np.array_equal(self.view, self.expected), "wrong bytes"
        self.server.command("FLUSHALL")
        return rates[0], rates[1]


@contextlib.contextmanager
def engines(cable: Cable, blocks: np.ndarray, num_blocks: int) -> Iterator[dict[str, Engine]]:
    """Start a server at the far end of the cable, and an engine for each mode."""
    server = ValkeyServer(host=cable.far, namespace=cable.name, protected_mode="no").start()
    started: dict[str, Engine] = {}
    try:
        for mode in MODES:
            started[mode] = Engine(server, mode, blocks, num_blocks)
        yield started
    finally:
        for engine in started.values():
            engine.rig.close()
        server.close()


def measure_link(cable: Cable, megabytes: int, blocks: np.ndarray, rounds: int) -> dict[str, Any]:
    """Return the raw rate, MB/s by mode and way, and ratios to "off" of the same round, medians."""
    cable.limit(megabytes)
    num_blocks = min(128, max(16, megabytes * 1_000_000 // blocks.shape[1]))
    raw = cable.raw_rate(num_blocks * blocks.shape[1])
    taken: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    with engines(cable, blocks, num_blocks) as started:
        for number in range(rounds + 1):
            for mode, engine in started.items():
                rates = engine.round()
                if number:  # the first round warms up, and lets "auto" measure
                    taken[mode].append(rates)
    row: dict[str, Any] = {"link": megabytes, "raw": raw}
    for mode in MODES:
        for way, name in enumerate(("store", "load")):
            row[f"{mode} {name}"] = statistics.median(rates[way] for rates in taken[mode])
            pairs = zip(taken[mode], taken["off"], strict=True)
            row[f"{mode} {name} ratio"] = statistics.median(rates[way] / plain[way] for rates, plain in pairs)
    return row


def report_codec(rows: dict[str, dict[str, float]]) -> Table:
    """Return the table of data types."""
    table = Table(title="one thread, GB of blocks per second of its processor time")
    for column in ("dtype", "times smaller", "compress", "restore"):
        table.add_column(column, justify="right")
    for dtype, row in rows.items():
        table.add_row(dtype, f"{row['ratio']:.2f}", f"{row['compress']:.2f}", f"{row['restore']:.2f}")
    return table


def report_links(rows: list[dict[str, Any]]) -> Table:
    """Return the table of links; figures that miss their targets are marked."""
    table = Table(title="bfloat16 through the tier, MB/s of blocks, store / load; in brackets: times as fast as off")
    for column in ("link", "raw", *MODES):
        table.add_column(column, justify="right")
    for row in rows:
        least = FASTER if row["link"] <= FASTER_UP_TO else LEAST
        cells = []
        for mode in MODES:
            ratios = [row[f"{mode} {way} ratio"] for way in ("store", "load")]
            shown = " / ".join(f"{ratio:.2f}{'!' if mode != 'off' and ratio < least else ''}" for ratio in ratios)
            cells.append(f"{row[f'{mode} store']:.0f} / {row[f'{mode} load']:.0f} ({shown})")
        table.add_row(str(row["link"]), f"{row['raw']:.0f}", *cells)
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round, fewer tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    num_tokens = 128 if options.quick else options.tokens
    by_dtype = {dtype: kv_blocks(dtype, num_tokens) for dtype in ("bfloat16", "float16", "float32")}
    console = Console(width=140)
    console.print(report_codec({dtype: measure_codec(blocks, dtype) for dtype, blocks in by_dtype.items()}))
    if os.geteuid():
        console.print(
            "SKIPPED LOUDLY: the links need root, for a network namespace: sudo python benchmarks/compression.py"
        )
        return
    cable = Cable()
    try:
        rounds = 1 if options.quick else options.rounds
        console.print(report_links([measure_link(cable, rate, by_dtype["bfloat16"], rounds) for rate in LINKS]))
    finally:
        cable.close()


if __name__ == "__main__":
    main()
