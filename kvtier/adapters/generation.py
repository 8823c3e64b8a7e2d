"""`PrefixCache.generate`: answers a prompt greedily within its request, and says what was restored and stored."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from kvtier.adapters.decoding import decode_greedily, last_full_block
from kvtier.adapters.prefix_request import PrefixRequest
from kvtier.errors import ConfigError


@dataclass(frozen=True)
class Generation:
    """One answer, as `PrefixCache.generate` returns it.

    Attributes:
        sequences: prompt and new tokens, shape (1, tokens).
        num_prompt_tokens: tokens of the prompt.
        restored_tokens: tokens of the prompt that were restored, not computed.
        sources: restored tokens per tier, by the tier's name; "primary" is host memory.
        splits: positions at which the prefill was split: the end of the restored prefix or, if nothing was restored,
            the last block boundary; empty for a prompt within one block.
        stored_blocks: blocks of this request that are new in the primary tier.
        seconds_to_first_token: from the call to the choice of the first new token.
        first_logits: shape (vocabulary,), the logits from which the first new token was chosen.
    """

    sequences: torch.Tensor
    num_prompt_tokens: int
    restored_tokens: int
    sources: dict[str, int]
    splits: tuple[int, ...]
    stored_blocks: int
    seconds_to_first_token: float
    first_logits: torch.Tensor

    @property
    def new_token_ids(self) -> list[int]:
        """The new tokens, with the end token if one ended the answer."""
        return [int(token) for token in self.sequences[0, self.num_prompt_tokens :]]


def generate(
    model: Any,
    request: PrefixRequest,
    token_ids: list[int],
    tokens_per_block: int,
    max_new_tokens: int,
    end_tokens: Collection[int],
    started: float,
) -> Generation:
    """Restore a prompt's prefix, compute the rest, decode greedily, and store the new blocks.

    Args:
        request: the prompt's, within its with statement.
        started: `time.perf_counter()` from which the time to the first token counts.
    """
    prompt = torch.tensor([token_ids], dtype=torch.long, device=model.device)
    request.restore()
    before = time.perf_counter() - started
    split = request.restored_tokens or last_full_block(len(token_ids), tokens_per_block)
    splits = (split,) if split else ()
    decoded = decode_greedily(
        model,
        prompt,
        request.past_key_values,
        splits=splits,
        max_new_tokens=max_new_tokens,
        end_tokens=end_tokens,
    )
    new = torch.tensor([decoded.token_ids], dtype=prompt.dtype, device=prompt.device)
    stored = request.store(token_ids + decoded.token_ids)
    return Generation(
        sequences=torch.cat([prompt, new], dim=1),
        num_prompt_tokens=len(token_ids),
        restored_tokens=request.restored_tokens,
        sources=request.sources,
        splits=splits,
        stored_blocks=stored,
        seconds_to_first_token=before + decoded.seconds_to_first,
        first_logits=decoded.first_logits,
    )


def end_tokens_of(model: Any) -> Collection[int]:
    """Return the end tokens of the model's generation settings, possibly none."""
    settings = getattr(model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    if ends is None:
        return ()
    return (ends,) if isinstance(ends, int) else tuple(ends)


def check_end_tokens(value: Any) -> Collection[int]:
    """Return `value` if it is a list, tuple or set of ints.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(token, int) for token in value):
        raise ConfigError("end_tokens", value, "a list of token ids")
    return value
