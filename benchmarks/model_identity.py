"""Measures what identifying a model costs `PrefixCache`: the hash of all weights, and the check at each request.

python benchmarks/model_identity.py [gigabytes]
"""

import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvtier.adapters.model_watch import ModelIdentity

ROUNDS = 50


def make_model(gigabytes: float) -> LlamaForCausalLM:
    """Return a Llama in bfloat16 with 32 layers and about 290 tensors, of about `gigabytes` GB."""
    width = max(64, int((gigabytes * 1e9 / 2 / 32 / 16) ** 0.5) // 64 * 64)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "vocab_size": 1000, "num_hidden_layers": 32}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(torch.bfloat16)
    return model.to_empty(device="cpu").eval()


def main() -> None:
    """Print both costs, and the time of reading the same memory once."""
    model = make_model(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
    tensors = [*model.parameters()]
    gigabytes = sum(tensor.nbytes for tensor in tensors) / 1e9
    for tensor in tensors:
        tensor.data.zero_()
    started = time.perf_counter()
    for tensor in tensors:
        tensor.data.view(-1).view(torch.int32).max()
    raw = time.perf_counter() - started
    started = time.perf_counter()
    identity = ModelIdentity(model)
    hashing = time.perf_counter() - started
    looks = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        identity.current()
        looks.append(time.perf_counter() - started)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    started = time.perf_counter()
    identity.current()
    following = time.perf_counter() - started
    print(f"{gigabytes:.2f} GB in {len(tensors)} tensors, {torch.get_num_threads()} threads of torch")
    print(f"hashed in {hashing:.3f} s, {hashing / gigabytes:.3f} s per GB; torch reads it in {raw:.3f} s")
    print(
        f"looking for a change at a request: {1e3 * sorted(looks)[ROUNDS // 2]:.2f} ms, least {1e3 * min(looks):.2f} ms"
    )
    print(f"following a change of one small tensor: {1e3 * following:.1f} ms")


if __name__ == "__main__":
    main()
