"""How fast a file of weights in the page cache is told from others, beside reading it into memory and doing nothing.

    python benchmarks/weights.py --path /models/large.safetensors

Without a path it makes a file of random bytes, and removes it at the end. The raw limit reads the same pieces with as
many threads.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from kvtier.weights.file_digests import digest_file

PIECE_BYTES = 4 << 20


def read_all(path: Path, threads: int) -> None:
    """Read a file in pieces, each into the same buffer per thread."""
    descriptor = os.open(path, os.O_RDONLY)
    starts = iter(range(0, path.stat().st_size, PIECE_BYTES))
    lock = threading.Lock()

    def work() -> None:
        buffer = bytearray(PIECE_BYTES)
        while True:
            with lock:
                start = next(starts, None)
            if start is None:
                return
            os.preadv(descriptor, [buffer], start)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    os.close(descriptor)


def seconds_of(action: Callable[[], object]) -> float:
    """Return the wall seconds of a call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def make_file(folder: Path, num_bytes: int) -> Path:
    """Write a file of random bytes: 64 MiB pieces, each rotated by one more byte, so that no two are equal."""
    file, piece = folder / "weights", os.urandom(min(64 << 20, num_bytes))
    with file.open("wb") as handle:
        for turn in range(-(-num_bytes // len(piece))):
            handle.write(piece[turn:] + piece[:turn])
    return file


def main() -> None:
    """Print one line per round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", type=Path, help="a file; default one that is made")
    parser.add_argument("--mib", type=int, default=1024, help="size of the file that is made")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    threads = min(4, len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        path = options.path or make_file(Path(folder), options.mib << 20)
        size = path.stat().st_size
        read_all(path, threads)
        for _ in range(options.rounds):
            raw, digest = seconds_of(lambda: read_all(path, threads)), seconds_of(lambda: digest_file(path))
            rates = f"read {size / raw / 1e9:.2f} GB/s, told apart {size / digest / 1e9:.2f} GB/s"
            print(f"{size / 1e9:.2f} GB, {threads} threads: {rates}, ratio {raw / digest:.2f}")


if __name__ == "__main__":
    main()
