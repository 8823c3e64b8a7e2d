"""Answers questions about a text with vLLM's `LLM`: the text is computed once, then comes from host memory or disk.

    python examples/vllm_offline.py Qwen/Qwen3-0.6B README.md "What is it for?" "How is it installed?"

Start it again and ask something else: what the first run computed comes from disk.
"""

import argparse
import json
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("model", help="a folder, or a name on the hub")
    options.add_argument("text", type=Path, help="a file of a few thousand words")
    options.add_argument("questions", nargs="+")
    options.add_argument("--blocks", type=Path, default="/var/tmp/kvtier-vllm", help="directory of the blocks on disk")
    options.add_argument("--tiers", type=json.loads, default={}, help="more options of kvtier, as JSON")
    chosen = options.parse_args()

    disk = {"type": "disk", "path": str(chosen.blocks.absolute()), "capacity": "2GiB"}
    kvtier = KVTransferConfig(
        kv_connector="OffloadingConnector",
        kv_role="kv_both",
        kv_connector_extra_config={
            "spec_name": "KVTierOffloadingSpec",
            "cpu_bytes_to_use": "1GiB",
            "secondary_tiers": [disk],
            **chosen.tiers,
        },
    )
    # Without log_stats, vLLM has no metrics, and the last line of each answer no number.
    llm = LLM(chosen.model, kv_transfer_config=kvtier, disable_log_stats=False)
    text = chosen.text.read_text()
    found = restored_tokens(llm)
    for question in chosen.questions:
        prompt = f"{text}\n\nQuestion: {question}\nAnswer:"
        (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=60), use_tqdm=False)
        found, before = restored_tokens(llm), found
        print(f"{question}\n{output.outputs[0].text.strip()}")
        print(f"[{len(output.prompt_token_ids)} tokens, {found - before} from kvtier's tiers]")
        # The device still has the text. It forgets here, as a busy server's device does, to show what kvtier restores.
        llm.reset_prefix_cache()


def restored_tokens(llm):
    """Return how many tokens have come from kvtier's tiers so far."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:external_prefix_cache_hits")


if __name__ == "__main__":  # vLLM starts processes, which import this file
    main()
