"""Pages between a transformers cache and a worker.

A worker moves pages of whole blocks; transformers keeps one tensor per layer with the tokens in the middle. The staging
area is a few blocks of pages that one side fills and the other empties: one copy between arena and pages, one
between pages and tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from kvtier.adapters.model_identity import CacheShape
from kvtier.primary.copies import KVCaches


class Staging:
    """Room for some blocks of every layer, on the model's device.

    A page holds one block of one layer: its keys (heads, tokens, key_dim), then its values.

    Attributes:
        num_blocks: blocks that fit.
        pages: one uint8 tensor a layer, shape (num_blocks, page_bytes).
        views: the same memory as keys and values, a pair per layer, each shape (heads, num_blocks, tokens, dim).
    """

    def __init__(self, shape: CacheShape, tokens_per_block: int, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        page_bytes = shape.token_bytes * tokens_per_block
        self.pages = [
            torch.zeros((num_blocks, page_bytes), dtype=torch.uint8, device=shape.device)
            for _ in range(shape.num_layers)
        ]
        self._shape = shape
        self._tokens_per_block = tokens_per_block
        self.views = [self._split(page) for page in self.pages]

    def _split(self, page: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of a layer's pages, each shape (heads, num_blocks, tokens, dim), sharing memory."""
        shape, tokens = self._shape, self._tokens_per_block
        elements = page.view(shape.dtype)
        num_keys = shape.num_heads * tokens * shape.key_dim
        keys = elements[:, :num_keys].unflatten(1, (shape.num_heads, tokens, shape.key_dim))
        values = elements[:, num_keys:].unflatten(1, (shape.num_heads, tokens, shape.value_dim))
        return keys.transpose(0, 1), values.transpose(0, 1)

    def kv_caches(self) -> KVCaches:
        """Return the pages as a worker takes them: one KV group with every layer."""
        return KVCaches(self.pages, [[(index, int(page.shape[1])) for index, page in enumerate(self.pages)]])

    def fill(self, cache: Any, blocks: Sequence[int]) -> None:
        """Copy blocks of the cache into the first pages.

        Args:
            cache: a `DynamicCache` of the shape given, that reaches to the end of the last of the blocks.
            blocks: indices of blocks from the first token on, at most `num_blocks`.
        """
        for layer, views in zip(cache.layers, self.views, strict=True):
            for tensor, view in zip((layer.keys, layer.values), views, strict=True):
                whole = tensor[0, :, : (max(blocks) + 1) * self._tokens_per_block]
                by_block = whole.unflatten(1, (-1, self._tokens_per_block))
                view[:, : len(blocks)] = by_block[:, list(blocks)]


class CacheBuilder:
    """Keys and values of a prefix, put together from windows of blocks."""

    def __init__(self, shape: CacheShape, tokens_per_block: int, num_blocks: int) -> None:
        self._tokens_per_block = tokens_per_block
        size = (shape.num_heads, num_blocks, tokens_per_block)
        self._tensors = [
            tuple(
                torch.empty((*size, dim), dtype=shape.dtype, device=shape.device)
                for dim in (shape.key_dim, shape.value_dim)
            )
            for _ in range(shape.num_layers)
        ]

    def take(self, staging: Staging, start: int, count: int) -> None:
        """Copy the first `count` blocks of the pages to the blocks from `start` on."""
        for tensors, views in zip(self._tensors, staging.views, strict=True):
            for tensor, view in zip(tensors, views, strict=True):
                tensor[:, start : start + count] = view[:, :count]

    def build(self, config: Any, num_blocks: int) -> DynamicCache:
        """Return a cache of the first `num_blocks` blocks; without a copy if those are all."""
        cache = DynamicCache(config=config)
        if num_blocks:
            for layer, (keys, values) in zip(cache.layers, self._tensors, strict=True):
                layer.lazy_initialization(keys[None, :, 0], values[None, :, 0])
                layer.keys = keys[:, :num_blocks].flatten(1, 2)[None]
                layer.values = values[:, :num_blocks].flatten(1, 2)[None]
        return cache
