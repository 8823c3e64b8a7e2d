"""A chat in the terminal, on transformers: answers appear word by word, and each turn computes its new tokens only.

    python examples/transformers_chat.py Qwen/Qwen3-0.6B --blocks /var/tmp/kvtier

Start it again and tell it the same: what the first run computed comes from disk. Ctrl-D ends it.
"""

import argparse
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from kvtier.adapters.transformers import PrefixCache


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("model", help="a folder, or a name on the hub")
    options.add_argument("--blocks", default="/var/tmp/kvtier", help="directory of the blocks on disk")
    options.add_argument("--max-new-tokens", type=int, default=200)
    chosen = options.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = AutoModelForCausalLM.from_pretrained(chosen.model).eval()
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    disk = {"type": "disk", "path": chosen.blocks, "capacity": "2GiB"}
    messages = []
    with PrefixCache(model, {"cpu_bytes_to_use": "512MiB", "secondary_tiers": [disk]}) as cache:
        for line in sys.stdin:
            messages.append({"role": "user", "content": line.strip()})
            answer = cache.generate(
                prompt_of(tokenizer, messages), streamer=streamer, max_new_tokens=chosen.max_new_tokens
            )
            text = tokenizer.decode(answer.new_token_ids, skip_special_tokens=True)
            messages.append({"role": "assistant", "content": text})
            print(f"[{answer.num_prompt_tokens} tokens, restored: {answer.sources or 'none'}]")


def prompt_of(tokenizer, messages):
    """Return the conversation as token ids, shape (1, tokens)."""
    if tokenizer.chat_template is None:  # a model that was not made for chats
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:"
        return tokenizer(text, return_tensors="pt").input_ids
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    return encoded.input_ids


if __name__ == "__main__":
    main()
