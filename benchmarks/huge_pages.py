"""A disk's store with and without private memory between the arena and the device, in the pages this machine gives.

Both stores write and read the same blocks, from the same arena, on 4 threads, interleaved in one run. "Copied" goes
through private memory in huge pages, "straight" does not; a tier measures both in use, and chooses.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kvtier.abc import StoreContext
from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.primary.arena import Arena
from kvtier.primary.huge_pages import HugePages
from kvtier.sizes import format_size, parse_size
from kvtier.stores.slab.roads import Road
from kvtier.stores.slab.store import SlabStore
from kvtier.testing.stores import make_key

ARENA_BYTES = 192 << 20
JOB_BLOCKS = 16
THREADS = 4


class Rig:
    """One arena, and a store per road."""

    def __init__(self, folder: Path, block_bytes: int, huge_pages: HugePages) -> None:
        self.num_blocks = ARENA_BYTES // block_bytes
        self.arena = Arena.create(self.num_blocks, block_bytes, huge_pages=huge_pages)
        words = np.frombuffer(self.arena.view.cast("B"), np.uint64)
        words[:] = np.random.default_rng(1).integers(0, 1 << 63, len(words), dtype=np.uint64)
        self.rows = [self.arena.row(slot) for slot in range(self.num_blocks)]
        self.keys: list[OffloadKey] = [make_key(number) for number in range(self.num_blocks)]
        self.pool = ThreadPoolExecutor(THREADS)
        self.stores = {road: self._open(folder / road.value, block_bytes, road) for road in Road}

    def _open(self, folder: Path, block_bytes: int, road: Road) -> SlabStore:
        capacity = self.num_blocks * (block_bytes + 4096) + (8 << 20)
        context = StoreContext(Namespace({"model": "pages"}), block_bytes)
        store = SlabStore.open({"path": str(folder), "capacity": capacity}, context, road=road)
        list(store.recover())
        return store

    def move(self, road: Road, load: bool) -> tuple[float, float]:
        """Write or read all blocks once; return GB/s and CPU seconds per GB."""
        store = self.stores[road]
        call = store.read_into if load else store.write

        def job(start: int) -> None:
            blocks = slice(start, start + JOB_BLOCKS)
            if not all(call(range(self.num_blocks)[blocks], self.keys[blocks], self.rows[blocks])):
                raise SystemExit("a block failed: the figures mean nothing")

        cpu, begun = time.process_time(), time.perf_counter()
        list(self.pool.map(job, range(0, self.num_blocks, JOB_BLOCKS)))
        seconds, gigabytes = time.perf_counter() - begun, ARENA_BYTES / 1e9
        return gigabytes / seconds, (time.process_time() - cpu) / gigabytes

    def close(self) -> None:
        """End the threads, the stores and the arena."""
        self.pool.shutdown()
        for store in self.stores.values():
            store.close()
        self.arena.close()


def measure(folder: Path, block_bytes: int, huge_pages: HugePages, rounds: int) -> None:
    """Print a line per direction: medians over the rounds, after one that is not counted."""
    rig = Rig(folder, block_bytes, huge_pages)
    moves = [(road, load) for load in (False, True) for road in Road]
    found: dict[tuple[Road, bool], list[tuple[float, float]]] = {move: [] for move in moves}
    for _ in range(rounds + 1):
        for move in moves:
            found[move].append(rig.move(*move))
    print(f"blocks of {format_size(block_bytes)}: {rig.arena.describe_memory()}")
    for load in (False, True):
        straight, copied = ([speed for speed, _ in found[road, load][1:]] for road in Road)
        ratio = statistics.median(two / one for one, two in zip(copied, straight, strict=True))
        figures = [
            f"{road.value} {statistics.median(speed for speed, _ in found[road, load][1:]):.2f} GB/s,"
            f" {statistics.median(cpu for _, cpu in found[road, load][1:]):.3f} CPU s/GB"
            for road in Road
        ]
        print(f"  {'load ' if load else 'store'}  {'; '.join(figures)}; straight / copied {ratio:.2f}")
    rig.close()


def main() -> None:
    """Measure each size in the pages asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to write, on the device in question")
    parser.add_argument("--blocks", nargs="*", default=["512KiB", "2MiB"], help="bytes of a block")
    parser.add_argument("--huge-pages", choices=[kind.value for kind in HugePages], default=HugePages.AUTO.value)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    for text in options.blocks:
        with tempfile.TemporaryDirectory(prefix="kvtier-pages-", dir=options.folder) as folder:
            measure(Path(folder), parse_size("blocks", text), HugePages(options.huge_pages), options.rounds)


if __name__ == "__main__":
    main()
