"""Models for tests: a tiny one with random weights, made in a moment, and the packaged one."""

import os
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny_llama(seed=0, dtype=torch.float32, **overrides):
    """A Llama with grouped-query attention whose weights follow from `seed`."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 16384,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
        **overrides,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).to(dtype).eval()


def save_tiny_model(folder: Path, text: str, **overrides):
    """Save a tiny model with a tokenizer that learned the words of `text`, as `from_pretrained` reads them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    tiny_llama(vocab_size=tokenizer.get_vocab_size(), **overrides).save_pretrained(folder)


LOGITS = {"return_dict_in_generate": True, "output_logits": True}
"""Makes `generate` return what `first_logits` reads."""


def first_logits(generation):
    """Return the logits from which the first new token of the first sequence was chosen, shape (vocabulary,)."""
    return generation.logits[0][0]


def tokens(count, seed=1):
    """A prompt of random tokens, shape (1, count)."""
    return torch.randint(0, 250, (1, count), generator=torch.Generator().manual_seed(seed))


def tiers(folder, memory="32MiB", **more):
    """Host memory and a disk tier; tiny models compute sooner than a busy disk reads, so these are told to be slow."""
    disk = {"type": "disk", "path": str(folder / "blocks"), "capacity": "64MiB"}
    return {"cpu_bytes_to_use": memory, "secondary_tiers": [disk], "prefill_rate": 1.0, **more}


def without_hub():
    """Environment for child processes that must not reach a hub."""
    return {**os.environ, "HF_HUB_OFFLINE": "1"}
