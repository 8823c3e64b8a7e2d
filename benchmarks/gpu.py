"""What kvtier does on an accelerator: right bytes beside a busy device, speed to and from host memory, and the time to
the first token of a transformers model. One run fits into five minutes; `make test-gpu` runs the marked tests first.

    python benchmarks/gpu.py --json gpu.json            # --device cpu --quick checks the script where there is no GPU

Pages are copied by the worker that the transformers adapter uses. Beside it, one copy of as many bytes in one piece,
from and to pinned memory, is the limit of the device's link.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from kvtier.adapters.cuda import DriverCopies
from kvtier.adapters.torch import make_worker
from kvtier.adapters.transformers import PrefixCache
from kvtier.primary.arena import Arena
from kvtier.primary.copies import KVCaches
from kvtier.types import CPULoadStoreSpec, GPULoadStoreSpec

LAYERS = 8
PAGES_BYTES = (8 << 10, 28 << 10, 128 << 10, 512 << 10, 2 << 20)
MATRIX = 2048
QWEN_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
QWEN_HEADS = {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
SMALL_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000}
QWEN_BYTES = 16 << 30
"""Weights in bfloat16, and room for activations and the KV of a prompt."""


class Rig:
    """A device's KV cache of `LAYERS` tensors, an arena, and the worker between them."""

    def __init__(self, device: torch.device, page_bytes: int, num_blocks: int) -> None:
        self.device, self.num_blocks, self.page_bytes = device, num_blocks, page_bytes
        self.tensors = [
            torch.randint(-128, 127, (num_blocks, page_bytes), dtype=torch.int8, device=device) for _ in range(LAYERS)
        ]
        self.arena = Arena.create(num_blocks, LAYERS * page_bytes)
        self.worker = make_worker(self.arena.view, KVCaches(self.tensors))
        self._jobs = 0

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * LAYERS * self.page_bytes

    def move(self, blocks: list[int], slots: list[int], load: bool) -> float:
        """Store or load blocks in one transfer; return its seconds."""
        self._jobs += 1
        engine, host = GPULoadStoreSpec(blocks, [len(blocks)], [0]), CPULoadStoreSpec(slots, self._jobs)
        synchronize(self.device)
        start = time.perf_counter()
        if load:
            self.worker.submit_load(self._jobs, host, engine)
        else:
            self.worker.submit_store(self._jobs, engine, host)
        self.worker.wait({self._jobs})
        seconds = time.perf_counter() - start
        if not all(result.success for result in self.worker.get_finished()):
            raise SystemExit("a copy failed")
        return seconds

    def close(self) -> None:
        """End the worker and release the arena."""
        self.worker.shutdown()
        self.arena.close()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_bytes(device: torch.device, num_blocks: int) -> str:
    """Store blocks in random order and load them into others beside matrix products; compare all bytes."""
    rig = Rig(device, 16 << 10, num_blocks)
    random = np.random.default_rng(3)
    before = [tensor.clone() for tensor in rig.tensors]
    source, slots, target = (random.permutation(num_blocks).tolist() for _ in range(3))
    matrix = torch.randn(MATRIX, MATRIX, device=device)
    for start in range(0, num_blocks, 1000):
        part = slice(start, start + 1000)
        matrix = (matrix @ matrix).clamp(-1, 1)
        rig.move(source[part], slots[part], load=False)
    for tensor in rig.tensors:
        tensor.zero_()
    for start in range(0, num_blocks, 1000):
        part = slice(start, start + 1000)
        matrix = (matrix @ matrix).clamp(-1, 1)
        rig.move(target[part], slots[part], load=True)
    synchronize(device)
    for tensor, was in zip(rig.tensors, before, strict=True):
        if not torch.equal(tensor[torch.tensor(target, device=device)], was[torch.tensor(source, device=device)]):
            raise SystemExit("WRONG BYTES: a block that was loaded differs from the one that was stored")
    rig.close()
    return f"{num_blocks} blocks of {LAYERS} pages stored and loaded beside matrix products: all bytes equal"


def whole_copy(device: torch.device, num_bytes: int, load: bool) -> float:
    """Return the seconds of one copy in one piece, from or to pinned memory."""
    host = torch.empty(num_bytes, dtype=torch.int8, pin_memory=device.type == "cuda")
    there = torch.empty(num_bytes, dtype=torch.int8, device=device)
    source, target = (host, there) if load else (there, host)
    target.copy_(source, non_blocking=True)
    synchronize(device)
    start = time.perf_counter()
    target.copy_(source, non_blocking=True)
    synchronize(device)
    return time.perf_counter() - start


def copy_speeds(device: torch.device, num_bytes: int, rounds: int) -> list[dict[str, Any]]:
    """Return per page size GB/s of stores and loads, and of a copy in one piece; medians of interleaved rounds."""
    rows = []
    for page_bytes in PAGES_BYTES:
        rig = Rig(device, page_bytes, max(4, num_bytes // (LAYERS * page_bytes)))
        order = np.random.default_rng(4).permutation(rig.num_blocks).tolist()
        row: dict[str, Any] = {"page_bytes": page_bytes, "blocks": rig.num_blocks}
        for load in (False, True):
            pages, whole = [], []
            for _ in range(rounds + 1):  # the first is not counted
                pages.append(rig.num_bytes / rig.move(order, list(range(rig.num_blocks)), load) / 1e9)
                whole.append(rig.num_bytes / whole_copy(device, rig.num_bytes, load) / 1e9)
            name = "load" if load else "store"
            row[name], row[f"{name} whole"] = statistics.median(pages[1:]), statistics.median(whole[1:])
        rig.close()
        rows.append(row)
    return rows


def first_tokens(device: torch.device, quick: bool, folder: Path) -> dict[str, Any]:
    """Return seconds to the first token of one long prompt: computed, from host memory, and from a disk."""
    large = device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > QWEN_BYTES and not quick
    shape = {**QWEN_7B, **QWEN_HEADS} if large else {**SMALL, **SMALL_HEADS}
    tokens = 16384 if large else 512
    torch.manual_seed(5)
    with torch.device(device):
        config = Qwen2Config(**shape, max_position_embeddings=32768, torch_dtype=torch.bfloat16)
        model = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
    prompt = torch.randint(0, shape["vocab_size"], (1, tokens), device=device)
    other = torch.randint(0, shape["vocab_size"], (1, tokens), device=device)
    tiers = [{"type": "disk", "path": str(folder / "kv"), "capacity": "8GiB"}]
    options = {"cpu_bytes_to_use": "4GiB" if large else "64MiB", "secondary_tiers": tiers}
    found: dict[str, Any] = {"tokens": tokens, "parameters": sum(weight.numel() for weight in model.parameters())}
    with PrefixCache(model, options) as cache:
        cache.generate(other, max_new_tokens=1)  # kernels are chosen and compiled
        found["computed"] = timed(device, lambda: cache.generate(prompt, max_new_tokens=1))
        found["host memory"] = timed(device, lambda: cache.generate(prompt, max_new_tokens=1))
        cache.flush(60.0)
        cache.forget_primary()
        found["disk"] = timed(device, lambda: cache.generate(prompt, max_new_tokens=1))
    return found


def timed(device: torch.device, run: Callable[[], Any]) -> float:
    """Return the seconds of a run, to the end of its work on the device."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    """Run every part; write the figures after each, so that a run that is cut short leaves them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="little of everything")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("NO CUDA DEVICE: nothing was measured. --device cpu --quick checks this script")
        return
    figures: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        figures["copies in one call"] = DriverCopies.find().is_batched
    figures["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    with tempfile.TemporaryDirectory(prefix="kvtier-gpu-") as folder:
        parts: dict[str, Callable[[], Any]] = {
            "bytes": lambda: check_bytes(device, 300 if options.quick else 10_000),
            "copies": lambda: copy_speeds(
                device, (16 << 20) if options.quick else (1 << 30), 1 if options.quick else 5
            ),
            "first_token": lambda: first_tokens(device, options.quick, Path(folder)),
        }
        for name, part in parts.items():
            start = time.perf_counter()
            try:
                figures[name] = part()
            except torch.cuda.OutOfMemoryError as error:
                figures[name] = f"not enough memory: {str(error).splitlines()[0]}"
            print(f"{name} ({time.perf_counter() - start:.0f} s): {json.dumps(figures[name], indent=1)}")
            sys.stdout.flush()
            if options.json is not None:
                options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
