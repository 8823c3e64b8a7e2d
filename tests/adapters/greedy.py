"""Greedy decoding by transformers' forward pass alone, with exact control over where the prefill is split.

A prefill that is split at another token multiplies matrices of other shapes, which rounds differently. To compare two
runs bit by bit, both must be split at the same tokens. So the caller decides all splits here.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Decoded:
    """The result of one greedy run.

    Attributes:
        token_ids: the new tokens, in order, with the end token if one ended the run.
        first_logits: shape (vocabulary,), the logits from which the first new token was chosen.
        seconds_to_first: from the start of the prefill to the choice of the first token.
    """

    token_ids: list[int]
    first_logits: torch.Tensor
    seconds_to_first: float


def decode_greedily(
    model: Any,
    input_ids: torch.Tensor,
    cache: Any,
    *,
    splits: Sequence[int] = (),
    max_new_tokens: int,
    end_tokens: Collection[int] = (),
) -> Decoded:
    """Compute the tokens of a prompt that are not in the cache, then append the most likely token again and again.

    Args:
        model: a causal language model.
        input_ids: the whole prompt, shape (1, tokens), longer than the cache.
        cache: KV of the prompt's first tokens, possibly empty; the KV of all computed tokens is added.
        splits: positions in tokens, ascending, at which the prefill starts a new forward pass. Positions up to the
            cache's end are ignored.
        max_new_tokens: at least 1.
        end_tokens: tokens that end the run.
    """
    started = time.perf_counter()
    options = {"use_cache": True, "logits_to_keep": 1}

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
