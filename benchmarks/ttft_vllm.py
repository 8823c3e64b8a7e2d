"""Time to the first token inside vLLM: cold, device prefix hit, host-memory hit, disk hit in a new process.

Run with the Python of an environment that has vLLM and kvtier (`make test-vllm` makes one). The model has random
weights of Qwen2.5-0.5B's shape in bf16. Every figure is the median of several prompts that share nothing. The control
is the same engine without any connector, in a process beside; cold prompts alternate between the two, and their ratio
is the median of the pairs. A hit is measured by its raw limit: the device hit of the same prompt and a copy of the same
bytes at memory speed; for the disk the host hit and reading those bytes at the speed measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SHAPE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "hidden_act": "silu",
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKEN_BYTES = 24 * 2 * 2 * 64 * 2
"""Layers * (key and value) * KV heads * head size * bytes per bf16 number."""

HITS_A_ROUND = 3
SMALL = 1000
"""Vocabulary of warm-up prompts; every model of the benchmarks has a larger one."""

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "PYTHONHASHSEED": "0",
}


def prompt(seed: int, length: int, vocabulary: int = SHAPE["vocab_size"]) -> list[int]:
    """Return `length` random token ids, the same for the same seed."""
    tokens = random.Random(seed)
    return [tokens.randrange(3, vocabulary) for _ in range(length)]


def make_engine(task: dict[str, Any]) -> Any:
    """Return vLLM's engine, with kvtier or without any connector."""
    from vllm import LLM

    extra: dict[str, Any] = {"spec_name": "KVTierOffloadingSpec", "cpu_bytes_to_use": "2GiB"}
    extra["secondary_tiers"] = [{"type": "disk", "path": task["disk"], "capacity": task.get("capacity", "4GiB")}]
    connector = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return LLM(
        model=task["model"],
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="auto",
        max_model_len=max(task["lengths"]) + 64,
        max_num_seqs=2,
        seed=0,
        disable_log_stats=False,
        kv_transfer_config=connector if task["kvtier"] else None,
    )


def child(task: dict[str, Any]) -> None:
    """Run one engine. It reads a JSON command per line from standard input, and writes answers to `replies`."""
    if "group" in task:  # a control group; the tiers' I/O processes inherit it
        Path(task["group"], "cgroup.procs").write_text(str(os.getpid()))
    from vllm import SamplingParams

    replies = os.fdopen(task["replies"], "w", buffering=1)
    engine = make_engine(task)
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)

    def first_token(tokens: list[int]) -> float:
        started = time.perf_counter()
        engine.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
        return time.perf_counter() - started

    def metric(name: str) -> float:
        return sum(metric.value for metric in engine.get_metrics() if metric.name == name)

    if not task.get("is_fresh"):
        first_token(prompt(0, 300, SMALL))
    print(json.dumps("started"), file=replies)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        answer: Any = None
        if command == "first_token":
            answer = first_token(*arguments)
        elif command == "forget":  # vLLM sends a request's stores in the next step, so a further request is needed
            first_token(prompt(1, 40, SMALL))
            engine.reset_prefix_cache()
        elif command == "flush":
            deadline = time.monotonic() + 60
            first_token(prompt(2, 30, SMALL))  # as above
            while metric("vllm:kvtier_jobs") and time.monotonic() < deadline:
                first_token(prompt(2, 30, SMALL))
            answer = metric("vllm:kvtier_written_blocks")
        elif command == "hits":
            answer = metric("vllm:external_prefix_cache_hits")
        print(json.dumps(answer), file=replies)


class Engine:
    """An engine in its own process."""

    def __init__(self, **task: Any) -> None:
        """Start the engine and wait for it.

        Args:
            task: `model` and `disk` (folders), `lengths` (tokens of the prompts) and `kvtier` (False: no connector).
                Optional: `capacity` of the disk tier, `is_fresh` (no warm-up prompt), and `group` (a control group of
                the kernel, in which the engine runs).
        """
        reading, writing = os.pipe()
        command = [sys.executable, __file__, "--child", json.dumps(task | {"replies": writing})]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `stop`
        self._process = subprocess.Popen(
            command,
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            text=True,
            pass_fds=(writing,),
        )
        os.close(writing)
        self._replies = os.fdopen(reading)
        self._receive()

    def ask(self, *command: Any) -> Any:
        """Send a command; return its answer."""
        assert self._process.stdin is not None  # it was opened as a pipe
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def first_token(self, tokens: list[int]) -> float:
        """Return the seconds to the first token of a prompt."""
        return float(self.ask("first_token", tokens))

    def stop(self) -> None:
        """End the engine."""
        assert self._process.stdin is not None  # it was opened as a pipe
        self._process.stdin.close()
        self._process.wait(120)
        self._log.close()

    def _receive(self) -> Any:
        line = self._replies.readline()
        if not line:
            self._log.seek(0)
            raise SystemExit("the engine has ended:\n" + self._log.read()[-3000:])
        return json.loads(line)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


Figures = dict[int, dict[str, list[float]]]
"""Seconds to the first token, by prompt length and kind, one entry per measurement."""


def measure(task: dict[str, Any], rounds: int) -> Figures:
    """Measure all kinds of prompts; cold ones in pairs with the control."""
    lengths = task["lengths"]
    figures: Figures = {length: {} for length in lengths}

    def note(kind: str, length: int, seconds: float) -> None:
        figures[length].setdefault(kind, []).append(seconds)

    with contextlib.ExitStack() as stack:
        control = stack.enter_context(Engine(**task, kvtier=False))
        engine = stack.enter_context(Engine(**task, kvtier=True))
        for length in lengths:
            for index in range(rounds):
                tokens = prompt(1000 * length + index, length)
                order = [("control", control), ("cold", engine)]
                for kind, which in order if index % 2 else order[::-1]:
                    note(kind, length, which.first_token(tokens))
                for _ in range(HITS_A_ROUND):
                    note("device", length, engine.first_token(tokens))
                    engine.ask("forget")
                    note("host", length, engine.first_token(tokens))
        engine.ask("flush")
    with Engine(**task, kvtier=True) as engine:
        for length in lengths:
            for index in range(rounds):
                note("disk", length, engine.first_token(prompt(1000 * length + index, length)))
        hits, prompts = engine.ask("hits"), rounds * sum(lengths)
        if hits < 0.9 * prompts:
            raise SystemExit(f"only {hits} of {prompts} tokens came from the disk")
    return figures


def memory_speed() -> float:
    """Return bytes per second of a copy in memory, the median of five."""
    source, target = np.ones(256 << 20, dtype=np.uint8), np.zeros(256 << 20, dtype=np.uint8)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        target[:] = source
        seconds.append(time.perf_counter() - started)
    return source.nbytes / statistics.median(seconds)


def disk_speed(folder: Path) -> float:
    """Return bytes per second of direct sequential reads of 4 MiB, the median of three."""
    import mmap

    path, size, speeds = folder / "raw", 512 << 20, []
    path.write_bytes(os.urandom(1 << 20) * (size >> 20))
    buffer = mmap.mmap(-1, 4 << 20)  # page-aligned, as O_DIRECT needs
    for _ in range(3):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        os.fsync(fd)
        started = time.perf_counter()
        while os.readv(fd, [buffer]):
            pass
        speeds.append(size / (time.perf_counter() - started))
        os.close(fd)
    path.unlink()
    return statistics.median(speeds)


def table(figures: Figures, memory: float, disk: float) -> list[dict[str, float]]:
    """Return one row per prompt length: milliseconds, and ratios to the raw limits."""
    rows = []
    for length, kinds in figures.items():
        value = {name: statistics.median(runs) for name, runs in kinds.items()}
        num_bytes = length * TOKEN_BYTES
        pairs = [cold / control for cold, control in zip(kinds["cold"], kinds["control"], strict=True)]
        row = {name: value[name] * 1e3 for name in ("control", "cold", "device", "host", "disk")}
        row |= {
            "cold / control": statistics.median(pairs),
            "host / limit": value["host"] / (value["device"] + num_bytes / memory),
            "disk / limit": value["disk"] / (value["host"] + num_bytes / disk),
            "cold / host": value["cold"] / value["host"],
            "cold / disk": value["cold"] / value["disk"],
        }
        rows.append({"prompt tokens": length} | row)
    return rows


def report(rows: list[dict[str, float]], memory: float, disk: float) -> None:
    """Print the table."""
    print(f"memory copy {memory / 1e9:.1f} GB/s, disk read {disk / 1e9:.2f} GB/s; medians, times in milliseconds\n")
    names = list(rows[0])
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names))
    for row in rows:
        cells = [f"{value:,.2f}" if "/" in name else f"{value:,.0f}" for name, value in row.items()]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="short prompts, two rounds")
    parser.add_argument("--json", type=Path, default=None, help="write the figures there")
    parser.add_argument("--folder", type=Path, default=None, help="where the disk tier lives")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child))
        return
    if importlib.util.find_spec("vllm") is None:
        print("VLLM IS NOT INSTALLED: nothing was measured; run this with an environment's Python that has it")
        return
    lengths, rounds = ([512, 1024], 2) if options.quick else (options.lengths, options.rounds)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps(SHAPE))
        task = {"model": str(folder / "model"), "disk": str(folder / "disk"), "lengths": lengths}
        figures = measure(task, rounds)
        memory, disk = memory_speed(), disk_speed(folder)
    rows = table(figures, memory, disk)
    report(rows, memory, disk)
    if options.json is not None:
        figures_json = {"rows": rows, "seconds": figures, "memory": memory, "disk": disk}
        options.json.write_text(json.dumps(figures_json, indent=2))


if __name__ == "__main__":
    main()
