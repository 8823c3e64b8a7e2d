"""What it costs to vouch for a block: the seal without a secret, with one, and a bare copy of the memory beside them.

    python benchmarks/secure.py [--quick] [--json]

GB/s of one thread that seals, and of one that verifies, blocks that are in memory but not in the processor's cache.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

from kvtier.namespace import Namespace
from kvtier.stores.seal import Seal
from kvtier.stores.secrets import Authenticator
from kvtier.testing.stores import make_key

_NAMESPACE = Namespace({"model": "benchmark"})
_KEY = make_key(1)
_MEMORY_BYTES = 256 << 20


def gigabytes_a_second(work: Callable[[memoryview], object], blocks: list[memoryview], seconds: float) -> float:
    """Return how fast `work` goes through the blocks, again and again, for some seconds."""
    moved, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or not moved:
        for block in blocks:
            work(block)
        moved += sum(block.nbytes for block in blocks)
    return moved / elapsed / 1e9


def measure(block_bytes: int, memory_bytes: int, seconds: float) -> dict[str, float]:
    """Return GB/s by what was done, for blocks of one length."""
    memory = memoryview(np.random.default_rng(0).integers(0, 256, memory_bytes, np.uint8))
    blocks = [memory[start : start + block_bytes] for start in range(0, memory_bytes, block_bytes)]
    target = np.empty(block_bytes, np.uint8)
    results = {"copy": gigabytes_a_second(lambda block: np.copyto(target, block), blocks, seconds)}
    seals = {
        "plain": Seal(_NAMESPACE),
        "secret": Seal(_NAMESPACE, Authenticator(b"a secret of the benchmark", _NAMESPACE)),
    }
    for name, seal in seals.items():
        header = seal.seal(_KEY, blocks[0])
        results[f"{name} seal"] = gigabytes_a_second(lambda block, seal=seal: seal.seal(_KEY, block), blocks, seconds)
        results[f"{name} verify"] = gigabytes_a_second(
            lambda block, seal=seal, header=header: seal.verify(header, _KEY, block), blocks, seconds
        )
    return {name: round(value, 2) for name, value in results.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less memory, less time")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    lengths = [128 << 10, 2 << 20]
    memory_bytes, seconds = (16 << 20, 0.1) if arguments.quick else (_MEMORY_BYTES, 2.0)
    results = {f"{length >> 10} KiB": measure(length, memory_bytes, seconds) for length in lengths}
    if arguments.json:
        print(json.dumps(results))
        return
    for length, rates in results.items():
        print(f"blocks of {length}")
        for name, rate in rates.items():
            print(f"  {name:14} {rate:6.2f} GB/s")


if __name__ == "__main__":
    main()
