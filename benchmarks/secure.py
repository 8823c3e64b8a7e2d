"""What it costs to vouch for blocks with a secret, and to encrypt them, beside a bare copy and AES-256-GCM alone.

    python benchmarks/secure.py [--quick] [--json] [--path DIR]

Figures are GB/s of one thread, medians of three rounds that take turns. In memory: sealing, verifying, encrypting and
decrypting blocks that are not in the processor's cache. On disk: writing and reading a slab in DIR, in calls as large
as the tier's; the limit is the same slab without a secret.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvtier.abc import StoreContext
from kvtier.namespace import Namespace
from kvtier.primary.arena import Arena, arena_rows
from kvtier.stores.integrity.encrypted_sealer import EncryptedSealer
from kvtier.stores.integrity.plain_sealer import PlainSealer
from kvtier.stores.integrity.sealing import PORTION_BYTES
from kvtier.stores.integrity.secrets import Authenticator, PayloadCipher
from kvtier.stores.slab import SlabStore
from kvtier.testing.stores import make_key

_NAMESPACE = Namespace({"model": "benchmark"})
_SECRET = "a secret of the benchmark"
_KEY = make_key(1)
_CALL_BYTES = PORTION_BYTES
_ROUNDS = 3
_MODES: dict[str, dict[str, object]] = {
    "plain": {},
    "secret": {"secret_env": "KVTIER_BENCHMARK_SECRET"},
    "encrypted": {"secret_env": "KVTIER_BENCHMARK_SECRET", "encrypt": True},
}

Rates = dict[str, float]


def gigabytes_a_second(work: Callable[[memoryview], object], blocks: list[memoryview], seconds: float) -> float:
    """Return the GB/s of `work` over all blocks, repeated for at least `seconds`."""
    moved, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or not moved:
        for block in blocks:
            work(block)
            moved += block.nbytes
    return moved / elapsed / 1e9


def medians(rounds: list[Rates]) -> Rates:
    """Return the median of each rate over the rounds."""
    return {name: round(statistics.median(rates[name] for rates in rounds), 2) for name in rounds[0]}


def in_memory(block_bytes: int, memory_bytes: int, seconds: float) -> Rates:
    """Return GB/s by operation in memory, for blocks of one size."""
    memory = memoryview(np.random.default_rng(0).integers(0, 256, memory_bytes, np.uint8))
    blocks = [memory[start : start + block_bytes] for start in range(0, memory_bytes, block_bytes)]
    works = {**raw_works(block_bytes), **seal_works(blocks[0]), **encrypt_works(blocks[0])}
    return medians(
        [{name: gigabytes_a_second(work, blocks, seconds) for name, work in works.items()} for _ in range(_ROUNDS)]
    )


def raw_works(block_bytes: int) -> dict[str, Callable[[memoryview], object]]:
    """Return the raw limits, which make no seal: a copy, and AES-256-GCM."""
    target = np.empty(block_bytes + 16, np.uint8)
    cipher, nonce = AESGCM(os.urandom(32)), os.urandom(12)
    view = memoryview(target)
    return {
        "copy": lambda block: np.copyto(target[:block_bytes], block),
        "AES-256-GCM alone": lambda block: cipher.encrypt_into(nonce, block, None, view),
    }


def seal_works(first: memoryview) -> dict[str, Callable[[memoryview], object]]:
    """Return the operations of sealers that do not encrypt.

    `verify` also gets blocks that do not match the header; computing their checksum takes the same time.
    """
    works: dict[str, Callable[[memoryview], object]] = {}
    for name, sealer in {
        "plain": PlainSealer(_NAMESPACE),
        "secret": PlainSealer(_NAMESPACE, Authenticator(_SECRET.encode(), _NAMESPACE)),
    }.items():
        (header,) = sealer.seal([_KEY], [first]).headers
        works[f"{name} seal"] = lambda block, sealer=sealer: sealer.seal([_KEY], [block])
        works[f"{name} verify"] = lambda block, sealer=sealer, header=header: sealer.verify(header, _KEY, block)
    return works


def encrypt_works(first: memoryview) -> dict[str, Callable[[memoryview], object]]:
    """Return the operations of a sealer that encrypts from one buffer into another, as a store does."""
    sealer = EncryptedSealer(PayloadCipher(_SECRET.encode(), _NAMESPACE))
    headers = sealer.seal([_KEY], [first]).headers
    return {
        "encrypt": lambda block: sealer.seal([_KEY], [block]),
        "decrypt": lambda block: sealer.open(headers, [_KEY], sealer.rooms([block]), [block]),
    }


def on_disk(block_bytes: int, memory_bytes: int, directory: Path) -> Rates:
    """Return GB/s of writing and reading a slab, by mode (`_MODES`)."""
    arena = Arena.create(memory_bytes // block_bytes, block_bytes)
    rows = arena_rows(arena.view)
    buffers = [rows[slot] for slot in range(arena.num_blocks)]
    noise = np.random.default_rng(0).integers(0, 256, block_bytes, np.uint8)
    for number, buffer in enumerate(buffers):
        buffer[:] = np.roll(noise, number).data
    stores = {}
    os.environ["KVTIER_BENCHMARK_SECRET"] = _SECRET
    for name, options in _MODES.items():
        path = directory / f"{name}-{block_bytes}"
        context = StoreContext(_NAMESPACE, block_bytes)
        stores[name] = SlabStore.open({"path": str(path), "capacity": memory_bytes + (8 << 20), **options}, context)
        list(stores[name].recover())
        while stores[name].prepare() is not None:
            pass  # grow the files before, since neither growth nor first writes are measured
    rounds = []
    for _ in range(_ROUNDS):
        rates = {f"disk write, {name}": move(store.write, buffers) for name, store in stores.items()}
        rates |= {f"disk read, {name}": move(store.read_into, buffers) for name, store in stores.items()}
        rounds.append(rates)
    for store in stores.values():
        store.close()
    arena.close()
    return medians(rounds)


def move(call: Callable[..., list[bool]], buffers: list[memoryview]) -> float:
    """Return GB/s of one pass over all slots, with as many blocks per call as a tier has."""
    step = max(1, _CALL_BYTES // buffers[0].nbytes)
    keys = [make_key(number) for number in range(len(buffers))]
    started = time.perf_counter()
    for start in range(0, len(buffers), step):
        part = slice(start, min(start + step, len(buffers)))
        if not all(call(range(part.start, part.stop), keys[part], buffers[part])):
            raise SystemExit("a block failed")
    return sum(buffer.nbytes for buffer in buffers) / (time.perf_counter() - started) / 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less memory, less time")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--path", type=Path, help="where slabs are made and deleted again")
    arguments = parser.parse_args()
    memory_bytes, seconds = (16 << 20, 0.02) if arguments.quick else (256 << 20, 0.7)
    results = {}
    with tempfile.TemporaryDirectory(prefix="kvtier-secure-", dir=arguments.path) as directory:
        for length in (128 << 10, 2 << 20):
            rates = in_memory(length, memory_bytes, seconds)
            results[f"{length >> 10} KiB"] = rates | on_disk(length, memory_bytes, Path(directory))
    if arguments.json:
        print(json.dumps(results))
        return
    for length, rates in results.items():
        print(f"blocks of {length}")
        for name, rate in rates.items():
            limit = rates["copy"]
            if name in ("encrypt", "decrypt"):
                limit = rates["AES-256-GCM alone"]
            elif name.startswith("disk"):
                limit = rates[name.partition(",")[0] + ", plain"]
            print(f"  {name:22} {rate:6.2f} GB/s  {rate / limit:5.2f} of its limit")


if __name__ == "__main__":
    main()
