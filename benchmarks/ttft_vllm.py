"""Time to the first token inside vLLM: cold, device prefix hit, host-memory hit, disk hit in a new process.

Run with the Python of an environment that has vLLM and kvtier (`make test-vllm` makes one). The model has random
weights of Qwen2.5-0.5B's shape in bf16. Every figure is the median of several prompts that share nothing; the control
is the same engine without any connector. A hit is measured by its raw limit: the device hit and a copy of the same
bytes at memory speed; for the disk the host hit and reading those bytes at the speed measured in the same run.
"""

from __future__ import annotations

import argparse
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

SHAPE = {
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
"""Layers, key and value, heads, head size, bytes of a bf16."""

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "PYTHONHASHSEED": "0",
}


def prompt(seed: int, length: int) -> list[int]:
    """Return random token ids."""
    tokens = random.Random(seed)
    return [tokens.randrange(3, SHAPE["vocab_size"]) for _ in range(length)]


def child(task: dict[str, Any]) -> None:
    """Run one engine and print its figures as JSON, in the last line."""
    from vllm import LLM, SamplingParams

    extra: dict[str, Any] = {"spec_name": "KVTierOffloadingSpec", "cpu_bytes_to_use": "2GiB"}
    extra["secondary_tiers"] = [{"type": "disk", "path": task["disk"], "capacity": "4GiB"}]
    connector = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    engine = LLM(
        model=task["model"],
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=max(task["lengths"]) + 64,
        max_num_seqs=2,
        seed=0,
        disable_log_stats=False,
        kv_transfer_config=connector if task["kvtier"] else None,
    )
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)

    def first_token(tokens: list[int]) -> float:
        started = time.perf_counter()
        engine.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
        return time.perf_counter() - started

    first_token(prompt(0, 300))
    figures: dict[str, dict[int, list[float]]] = {}
    for length in task["lengths"]:
        prompts = [prompt(1000 * length + index, length) for index in range(task["rounds"])]
        for name in task["measure"]:
            if name == "host":
                engine.generate(
                    [{"prompt_token_ids": prompt(1, 40)}], sampling, use_tqdm=False
                )  # stores go a step later
                engine.reset_prefix_cache()
            figures.setdefault(name, {})[length] = [first_token(tokens) for tokens in prompts]
    if task["kvtier"] and "cold" in task["measure"]:
        _let_writes_end(engine, first_token)
    hits = [metric.value for metric in engine.get_metrics() if metric.name == "vllm:external_prefix_cache_hits"]
    print(json.dumps({"figures": figures, "hits": sum(hits)}))


def _let_writes_end(engine: Any, first_token: Any) -> None:
    """Step until the disk's jobs are answered."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        first_token(prompt(2, 30))
        jobs = [metric.value for metric in engine.get_metrics() if metric.name == "vllm:kvtier_jobs"]
        if not sum(jobs):
            return


def run_engine(**task: Any) -> dict[str, Any]:
    """Run one engine in a process of its own; return its figures."""
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def memory_speed() -> float:
    """Return bytes a second of one copy in memory."""
    source, target = np.ones(256 << 20, dtype=np.uint8), np.zeros(256 << 20, dtype=np.uint8)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        target[:] = source
        seconds.append(time.perf_counter() - started)
    return source.nbytes / min(seconds)


def disk_speed(folder: Path) -> float:
    """Return bytes a second of direct sequential reads of 4 MiB, the best of two."""
    import mmap

    path, size, best = folder / "raw", 512 << 20, 0.0
    path.write_bytes(os.urandom(1 << 20) * (size >> 20))
    buffer = mmap.mmap(-1, 4 << 20)
    for _ in range(2):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        os.fsync(fd)
        started = time.perf_counter()
        while os.readv(fd, [buffer]):
            pass
        best = max(best, size / (time.perf_counter() - started))
        os.close(fd)
    path.unlink()
    return best


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the disk tier lives")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child))
        return
    if importlib.util.find_spec("vllm") is None:
        print("VLLM IS NOT INSTALLED: nothing was measured; run this with an environment's Python that has it")
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps(SHAPE))
        task = {
            "model": str(folder / "model"),
            "disk": str(folder / "disk"),
            "lengths": options.lengths,
            "rounds": options.rounds,
        }
        control = run_engine(**task, kvtier=False, measure=["control"])["figures"]
        first = run_engine(**task, kvtier=True, measure=["cold", "device", "host"])["figures"]
        second = run_engine(**task, kvtier=True, measure=["disk"])
        if second["hits"] < 0.9 * options.rounds * sum(options.lengths):
            raise SystemExit(f"only {second['hits']} tokens came from the disk")
        report(control | first | second["figures"], options.lengths, memory_speed(), disk_speed(folder))


def report(figures: dict[str, dict[str, list[float]]], lengths: list[int], memory: float, disk: float) -> None:
    """Print milliseconds, and ratios to what each is to be measured by."""
    print(f"memory copy {memory / 1e9:.1f} GB/s, disk read {disk / 1e9:.2f} GB/s; medians in milliseconds\n")
    print("| prompt tokens | control | cold | device hit | host hit | disk hit | cold / control | host / limit |"
          " disk / limit | cold / host |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    for length in lengths:
        value = {name: statistics.median(runs[str(length)]) for name, runs in figures.items()}
        num_bytes = length * TOKEN_BYTES
        host_limit = value["device"] + num_bytes / memory
        disk_limit = value["host"] + num_bytes / disk
        times = [value[name] * 1e3 for name in ("control", "cold", "device", "host", "disk")]
        ratios = [value["cold"] / value["control"], value["host"] / host_limit, value["disk"] / disk_limit]
        ratios.append(value["cold"] / value["host"])
        cells = [f"{time_:.0f}" for time_ in times] + [f"{ratio:.2f}" for ratio in ratios]
        print(f"| {length:,} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
