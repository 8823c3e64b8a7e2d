"""Two vLLM engines share one Valkey: the second loads what the first has computed.

    python examples/vllm_shared_valkey.py Qwen/Qwen3-0.6B README.md --valkey redis://127.0.0.1:6379

Here both run on this machine, each with half of a GPU. Engines on other machines need the same configuration, no more.
It needs `pip install '.[redis]'`; `make servers` starts a Valkey to try it with.
"""

import argparse
import json
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

QUESTIONS = ["What is it for?", "What must be installed?", "What does it never do?"]


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("model", help="a folder, or a name on the hub")
    options.add_argument("text", type=Path, help="a file of a few thousand words")
    options.add_argument("--valkey", default="redis://127.0.0.1:6379")
    options.add_argument("--tiers", type=json.loads, default={}, help="more options of kvtier, as JSON")
    chosen = options.parse_args()

    text = chosen.text.read_text()
    with start_engine(chosen) as first, start_engine(chosen) as second:
        for engine, name in ((first, "first"), (second, "second")):
            for question in QUESTIONS:
                num_tokens, hits = engine.submit(ask, f"{text}\n\nQuestion: {question}\nAnswer:").result()
                print(f"{name} engine: {num_tokens} tokens, blocks restored: {dict(hits) or 'none'}", flush=True)


def start_engine(chosen):
    """Return an executor whose only process runs an engine."""
    arguments = (chosen.model, chosen.valkey, chosen.tiers)
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start, initargs=arguments)


def start(model, valkey, tiers):
    """Start this process's engine."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    kvtier = KVTransferConfig(
        kv_connector="OffloadingConnector",
        kv_role="kv_both",
        kv_connector_extra_config={
            "spec_name": "KVTierOffloadingSpec",
            "cpu_bytes_to_use": "1GiB",
            "secondary_tiers": [{"type": "resp", "url": valkey}],
            **tiers,
        },
    )
    global llm
    llm = LLM(model, kv_transfer_config=kvtier, gpu_memory_utilization=0.45, disable_log_stats=False)
    for _ in range(600):  # Valkey is connected in the background, and an engine hears of it in its steps
        if by_tier("vllm:kvtier_tier_up")["resp"]:
            return
        llm.generate("Hello", SamplingParams(max_tokens=1), use_tqdm=False)
        time.sleep(0.1)
    raise SystemExit(f"{valkey} does not answer; the log says why")


def ask(prompt):
    """Answer; return the prompt's length in tokens, and how many of its blocks came from each of kvtier's tiers."""
    from vllm import SamplingParams

    before = by_tier("vllm:kvtier_hit_blocks")
    (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=60), use_tqdm=False)
    llm.reset_prefix_cache()  # as a busy engine's device forgets
    return len(output.prompt_token_ids), by_tier("vllm:kvtier_hit_blocks") - before


def by_tier(name):
    """Return the values of one of kvtier's metrics, by tier."""
    found = [metric for metric in llm.get_metrics() if metric.name == name]
    return Counter({metric.labels["tier"]: int(metric.value) for metric in found})


if __name__ == "__main__":
    main()
