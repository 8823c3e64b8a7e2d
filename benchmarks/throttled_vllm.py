"""Time to the first token inside vLLM over disks that the kernel slows down, beside computing everything anew.

    ~/.cache/kvtier/vllm-0.32.0/bin/python benchmarks/throttled_vllm.py      # as root; after make test-vllm

An engine with kvtier writes the first nine tenths of every prompt to a disk, and ends. For each speed a new engine with
kvtier, whose host memory is empty, and one without any connector get the same prompts in turn, neither warmed up; every
second pair begins with the other one. A ratio is the median over the pairs of kvtier's time to the other's; the first
pair, the first request after a start of both, is also printed by itself. The disk is an ext4 filesystem on a loop
device over memory, and a control group (v1, blkio) allows the processes of kvtier's engine so many bytes per second of
it each way. The model has random weights in bf16. Its shape was chosen such that a processor computes KV at a speed
between the slowest and the fastest disk.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ttft_vllm import SHAPE, Engine, prompt

HIDDEN, HEADS = 384, 6
VOCABULARY = 4096
CONTROLLER = Path("/sys/fs/cgroup/blkio")
BACKING = Path("/dev/shm")
SHARE_ON_DISK = 0.9
BLOCK = 128
"""Tokens per block of vLLM on CPUs."""


def shape(num_layers: int) -> dict[str, Any]:
    """Return the configuration of a small model with as many KV heads as query heads."""
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": 1024,
        "num_hidden_layers": num_layers,
        "vocab_size": VOCABULARY,
    }
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    return SHAPE | sizes | heads


@contextlib.contextmanager
def loop_disk(num_bytes: int) -> Iterator[tuple[Path, str]]:
    """Mount an ext4 filesystem on a loop device in memory; yield its folder and the device's "major:minor"."""
    with tempfile.TemporaryDirectory(dir=BACKING) as backing, tempfile.TemporaryDirectory() as folder:
        image = Path(backing) / "image"
        with image.open("wb") as file:
            file.truncate(num_bytes)
        found = subprocess.run(["losetup", "--find", "--show", str(image)], check=True, capture_output=True, text=True)
        device = found.stdout.strip()
        with contextlib.ExitStack() as stack:
            stack.callback(subprocess.run, ["losetup", "--detach", device], check=True)
            subprocess.run(["mkfs.ext4", "-q", device], check=True)
            subprocess.run(["mount", device, folder], check=True)
            stack.callback(subprocess.run, ["umount", folder], check=True)
            number = os.stat(device).st_rdev
            yield Path(folder), f"{os.major(number)}:{os.minor(number)}"


@contextlib.contextmanager
def throttle(device: str, bytes_per_second: int) -> Iterator[Path]:
    """Yield a control group whose processes read and write at most `bytes_per_second` each on a device."""
    group = CONTROLLER / f"kvtier-bench-{os.getpid()}"
    group.mkdir()
    try:
        for name in ("read_bps_device", "write_bps_device"):
            (group / f"blkio.throttle.{name}").write_text(f"{device} {bytes_per_second}")
        yield group
    finally:
        deadline = time.monotonic() + 60
        while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)  # the processes of the tiers end after their engine
        group.rmdir()


@dataclass
class Speed:
    """Figures of one speed of the disk, one entry per pair.

    Attributes:
        computed: seconds to the first token without a connector.
        kvtier: seconds to the first token with kvtier.
        promoted: share of the prompt that came from the disk, 0 to 1.
    """

    computed: list[float] = field(default_factory=list)
    kvtier: list[float] = field(default_factory=list)
    promoted: list[float] = field(default_factory=list)

    def row(self, megabytes: int) -> list[str]:
        """Return the cells of this speed, in the order of `HEADER`."""
        ratios = [ours / theirs for ours, theirs in zip(self.kvtier, self.computed, strict=True)]
        times = [f"{statistics.median(seconds):.2f}" for seconds in (self.computed, self.kvtier)]
        shares = [f"{100 * share:.0f}" for share in (self.promoted[0], statistics.median(self.promoted))]
        quartiles = statistics.quantiles(ratios, n=4)
        spread = f"{quartiles[0]:.2f} to {quartiles[2]:.2f}"
        return [
            f"{megabytes} MB/s",
            *times,
            f"{statistics.median(ratios):.2f}",
            spread,
            f"{ratios[0]:.2f}",
            shares[1],
            shares[0],
        ]


HEADER = [
    "disk",
    "computed, s",
    "kvtier, s",
    "kvtier / computed",
    "quartiles",
    "first request",
    "promoted, %",
    "in the first, %",
]


def prompts(length: int, num_pairs: int, speed: int) -> list[list[int]]:
    """Return prompts with the same heads for all speeds, and with new tails for each speed."""
    head = num_tokens_on_disk(length)
    tails = [prompt(1_000_000 * (1 + speed) + index, length - head, VOCABULARY) for index in range(num_pairs)]
    return [head_of(index, head) + tail for index, tail in enumerate(tails)]


def head_of(index: int, length: int) -> list[int]:
    """Return the part of a prompt that is on the disk."""
    return prompt(index, length, VOCABULARY)


def num_tokens_on_disk(length: int) -> int:
    """Return the number of tokens in a prompt's head: `SHARE_ON_DISK` of it, rounded down to whole blocks."""
    return int(length * SHARE_ON_DISK) // BLOCK * BLOCK


def fill(task: dict[str, Any], length: int, num_pairs: int) -> None:
    """Write the heads of all prompts to the disk."""
    with Engine(**task, kvtier=True) as engine:
        for index in range(num_pairs):
            engine.first_token(head_of(index, num_tokens_on_disk(length)))
            num_written = engine.ask("flush")
    num_blocks = num_pairs * num_tokens_on_disk(length) // BLOCK
    if num_written < num_blocks:
        raise SystemExit(f"only {num_written:.0f} of {num_blocks} blocks are on the disk")


def measure(task: dict[str, Any], asked: list[list[int]], group: Path) -> Speed:
    """Ask both engines for every prompt; return the figures."""
    figures, before = Speed(), 0.0
    fresh = task | {"is_fresh": True}
    with Engine(**fresh, kvtier=False) as control, Engine(**fresh, kvtier=True, group=str(group)) as engine:
        for index, tokens in enumerate(asked):
            order = [(figures.computed, control), (figures.kvtier, engine)]
            for times, which in order if index % 2 else order[::-1]:
                times.append(which.first_token(tokens))
            hits = engine.ask("hits")
            figures.promoted.append((hits - before) / len(tokens))
            before = hits
    return figures


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speeds", type=int, nargs="+", default=[5, 50, 500], help="MB/s")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--length", type=int, default=1280, help="tokens of a prompt")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="two speeds, three pairs")
    parser.add_argument("--json", type=Path, default=None, help="write the figures there")
    options = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        print("VLLM IS NOT INSTALLED: nothing was measured; run this with an environment's Python that has it")
        return
    if os.geteuid() or not CONTROLLER.is_dir():
        print(f"NOTHING WAS MEASURED: needs root, to mount a filesystem, and {CONTROLLER} (cgroup v1)")
        return
    speeds, num_pairs = ([5, 500], 3) if options.quick else (options.speeds, options.pairs)
    figures: dict[int, Speed] = {}
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    with loop_disk(3 << 30) as (folder, device), tempfile.TemporaryDirectory() as model:
        (Path(model) / "config.json").write_text(json.dumps(shape(options.layers)))
        task = {"model": model, "disk": str(folder / "disk"), "lengths": [options.length], "capacity": "2GiB"}
        fill(task, options.length, num_pairs)
        for speed in speeds:
            with throttle(device, speed * 1_000_000) as group:
                figures[speed] = measure(task, prompts(options.length, num_pairs, speed), group)
            print("| " + " | ".join(figures[speed].row(speed)) + " |", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({speed: vars(found) for speed, found in figures.items()}, indent=2))


if __name__ == "__main__":
    main()
