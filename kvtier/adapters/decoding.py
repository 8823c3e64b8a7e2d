"""Greedy decoding with exact control over where the prefill is split.

A prefill split elsewhere multiplies matrices of other shapes and rounds differently. Whoever compares two runs bit
by bit must split both at the same tokens, so splits are arguments here and nothing else decides them.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvtier.adapters.model_identity import accepts


@dataclass(frozen=True)
class Decoded:
    """What one greedy run produced.

    Attributes:
        token_ids: the new tokens, in order; an end token, if one ended the run, is the last.
        first_logits: shape (vocabulary,), those the first new token was chosen by.
        seconds_to_first: from the start of the prefill to the choice of the first token.
    """

    token_ids: list[int]
    first_logits: torch.Tensor
    seconds_to_first: float


def last_full_block(num_tokens: int, tokens_per_block: int) -> int:
    """Return where the last block boundary before the last of `num_tokens` tokens is.

    Everything up to it can be restored later, and at least one token is left to compute logits from.
    """
    return (num_tokens - 1) // tokens_per_block * tokens_per_block


def decode_greedily(
    model: Any,
    input_ids: torch.Tensor,
    cache: Any,
    *,
    splits: Sequence[int] = (),
    max_new_tokens: int,
    end_tokens: Collection[int] = (),
) -> Decoded:
    """Compute what the cache lacks of a prompt, then choose the most likely token until an end.

    Args:
        model: a causal language model.
        input_ids: the whole prompt, shape (1, tokens), longer than the cache.
        cache: KV of the prompt's first tokens, possibly none; grows by all tokens computed.
        splits: tokens, ascending, before which the prefill starts a new forward pass; those within the cache or
            at its end are ignored.
        max_new_tokens: at least 1.
        end_tokens: tokens that end the run.
    """
    started = time.perf_counter()
    options = {"use_cache": True, **({"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {})}

    def compute(token_ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=token_ids, past_key_values=cache, **options).logits[0, -1]

    with torch.inference_mode():
        position = int(cache.get_seq_length())
        for end in (*(split for split in splits if position < split < input_ids.shape[1]), input_ids.shape[1]):
            logits = compute(input_ids[:, position:end])
            position = end
        first_logits = logits
        token_ids = [int(logits.argmax())]
        seconds_to_first = time.perf_counter() - started
        while len(token_ids) < max_new_tokens and token_ids[-1] not in end_tokens:
            token = torch.tensor([[token_ids[-1]]], dtype=torch.long, device=input_ids.device)
            token_ids.append(int(compute(token).argmax()))
    return Decoded(token_ids, first_logits, seconds_to_first)
