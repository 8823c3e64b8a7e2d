"""The logits that the first new tokens of a call of `model.generate` were chosen from.

transformers gives raw logits only if they are asked for, and then keeps those of every token: 0.6 MB per token with a
vocabulary of 150,000. A processor sees the scores that other processors have changed, and with beams log-probabilities.
So the forward pass is watched that computes the prompt's last token.
"""

from __future__ import annotations

import copy
from typing import Any

import torch


class FirstLogits:
    """Notes the logits of the last column of prompts."""

    def __init__(self, cache: Any, num_columns: int) -> None:
        """Args:
        cache: with which the model runs; its passes with other caches are none of ours, such as those for guidance.
        num_columns: of the prompt.
        """
        self._cache = cache
        self._num_columns = num_columns
        self._value: torch.Tensor | None = None

    def watch(self, model: Any) -> Any:
        """Return the same model, with the same modules and settings, whose calls are seen here.

        A forward hook would be seen by other threads that call the model, and be a change of it for `ModelIdentity`.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            output = model(*args, **kwargs)
            if kwargs.get("past_key_values") is self._cache:
                self._note(output)
            return output

        watched = copy.copy(model)  # shares its modules, tensors and hooks
        # torch calls this instead of `forward` and the hooks, all of which `model(...)` runs. `forward` itself stays:
        # transformers looks at its parameters.
        watched._compiled_call_impl = call
        return watched

    def _note(self, output: Any) -> None:
        # A prefill in pieces has earlier passes; those of new tokens come later.
        if self._value is None and self._cache.get_seq_length() == self._num_columns:
            self._value = output.logits[:, -1].detach().to(torch.float32, copy=True)

    def of_prompts(self, num_copies: int) -> torch.Tensor | None:
        """Return the logits, float32: shape (vocabulary,) for one prompt, (prompts, vocabulary) for several.

        Args:
            num_copies: sequences per prompt, which are side by side and have the same logits.
        """
        if self._value is None:  # a `generate` that is not transformers' own, and ran another object
            return None
        logits = self._value[::num_copies]
        return logits[0] if len(logits) == 1 else logits
