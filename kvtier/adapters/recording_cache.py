"""A `DynamicCache` that also keeps what its sliding-window layers forget, and one sequence's part of it.

After a run, a window layer holds the last tokens of its window only. Blocks of all tokens are to be stored, so the
keys and values are taken when the model hands them to the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from kvtier.adapters.cache_shape import CacheShape, LayerShape

Pieces = list[tuple[torch.Tensor, torch.Tensor]]


class RecordingCache(DynamicCache):  # type: ignore[misc]  # transformers has no types
    """A cache of restored tokens, possibly none, with which a model goes on.

    Attributes:
        recorded_from: position of the first token whose KV is complete, also in window layers.
    """

    def __init__(self, config: Any, shape: CacheShape) -> None:
        super().__init__(config=config)
        self.recorded_from = 0
        self._recorded: dict[int, Pieces] = {layer.index: [] for layer in shape.layers if layer.window is not None}

    def restore(self, layer: LayerShape, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put the KV of the first tokens into an empty layer; shape (rows, heads, tokens, dim), at least one token."""
        held, num_tokens = self.layers[layer.index], keys.shape[2]
        held.lazy_initialization(keys, values)
        if layer.window is not None:  # the rest of the tensors is given up, so that it can be freed
            first = max(0, num_tokens - layer.window + 1)
            keys, values = keys[:, :, first:].clone(), values[:, :, first:].clone()
            held.cumulative_length = num_tokens
            self.recorded_from = num_tokens
        held.keys, held.values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if (pieces := self._recorded.get(layer_idx)) is not None:
            # Copies: a compiled model may write its next results over these.
            pieces.append((key_states.detach().clone(), value_states.detach().clone()))
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    # What changes the layers' past changes the recorded past, too.

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self._change(lambda tensor: tensor[:, :, :tokens_to_remove])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._change(lambda tensor: tensor[beam_idx.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._change(lambda tensor: tensor[indices])

    def reset(self) -> None:
        super().reset()
        self.recorded_from = 0
        for pieces in self._recorded.values():
            pieces.clear()

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for pieces in self._recorded.values():
            if pieces:
                keys, values = _join(pieces)
                pieces[:] = [(change(keys), change(values))]

    def stop_recording(self) -> None:
        """Give up what was recorded, and record no more: from now on this is a plain cache."""
        self._recorded.clear()

    def recorded(self, layer: LayerShape, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a window layer's keys and values from token `recorded_from` on, each (heads, tokens, dim)."""
        keys, values = _join([(keys[row], values[row]) for keys, values in self._recorded[layer.index]])
        return keys, values

    def has_recorded(self, layer: LayerShape) -> bool:
        """Return whether all of a window layer's tokens from `recorded_from` on were seen."""
        num_recorded: int = sum(keys.shape[-2] for keys, _ in self._recorded.get(layer.index, ()))
        return int(self.layers[layer.index].get_seq_length()) == self.recorded_from + num_recorded


def _join(pieces: Pieces) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = zip(*pieces, strict=True)
    return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)


class CachedSequence(NamedTuple):
    """One sequence within a cache.

    Attributes:
        cache: a `RecordingCache`; any `DynamicCache` if no layer has a window.
        row: of the sequence.
        padding: padded columns before its first token.
    """

    cache: Any
    row: int = 0
    padding: int = 0

    def first_token(self, shape: CacheShape) -> int:
        """Return the sequence's first token whose KV is complete."""
        return max(0, self.cache.recorded_from - self.padding) if shape.has_windows else 0

    def layer(self, layer: LayerShape) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values, each (heads, tokens, dim).

        They begin with the first token whose KV is complete in a window layer, and with the first token elsewhere.
        """
        if layer.window is None:
            held, start = self.cache.layers[layer.index], self.padding
            return held.keys[self.row, :, start:], held.values[self.row, :, start:]
        keys, values = self.cache.recorded(layer, self.row)
        start = max(0, self.padding - self.cache.recorded_from)
        return keys[:, start:], values[:, start:]
