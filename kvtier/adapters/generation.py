"""What `PrefixCache.generate` returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        sequences: prompt and new tokens, shape (1, tokens).
        num_prompt_tokens: tokens of the prompt.
        restored_tokens: tokens of the prompt that were not computed.
        sources: restored tokens by the name of the tier they came from, "primary" for host memory.
        splits: where the prefill was split: at the end of the restored prefix or, if nothing was restored, at the
            last block boundary; empty for a prompt within one block.
        stored_blocks: blocks that are new in the primary tier.
        seconds_to_first_token: from the call to the choice of the first new token.
        first_logits: shape (vocabulary,), those that the first new token was chosen by.
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
        """The new tokens; an end token, if one ended the answer, is the last."""
        return [int(token) for token in self.sequences[0, self.num_prompt_tokens :]]
