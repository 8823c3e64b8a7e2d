"""Where the prefill of a prompt is split, and the forward pass up to there.

A prefill that is split at another token multiplies matrices of other shapes, which rounds differently. To give the same
bits, two runs must be split at the same tokens.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch


def last_full_block(num_tokens: int, tokens_per_block: int) -> int:
    """Return the last block boundary, in tokens, that leaves at least one of `num_tokens` tokens after it.

    A prompt can be restored up to there: the model must compute at least one token to have logits.
    """
    return (num_tokens - 1) // tokens_per_block * tokens_per_block


def prefill(model: Any, input_ids: torch.Tensor, cache: Any, end: int) -> None:
    """Compute the KV of a prompt's tokens from the cache's end to `end`, in one forward pass.

    Args:
        model: a causal language model.
        input_ids: the whole prompt, shape (1, tokens).
        cache: KV of the prompt's first tokens, possibly empty, fewer than `end`; the KV is added to it.
    """
    start = int(cache.get_seq_length())
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        model(input_ids=input_ids[:, start:end].to(model.device), past_key_values=cache, use_cache=True, **options)


def without_wrapper(model: Any) -> Any:
    """Return the model of transformers inside PEFT's wrapper, which contains the adapters' layers; else the model.

    With adapters that can be restored, the wrapper adds nothing. But its `generate` sets attributes of the model, which
    `ModelIdentity` would take for a change.
    """
    if not hasattr(model, "get_base_model"):
        return model
    inner = model.get_base_model()
    if inner.generation_config is not model.generation_config:  # set on the wrapper, which hands it on like this
        inner.generation_config = model.generation_config
    return inner
