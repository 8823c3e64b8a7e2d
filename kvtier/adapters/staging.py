"""The staging area between a worker and a `DynamicCache`.

A worker copies pages, each with one layer of one block. A `DynamicCache` has per layer one tensor for all tokens. The
staging area holds a few blocks as pages: the worker copies between arena and pages, this module between pages and
tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from kvtier.adapters.model_identity import CacheShape
from kvtier.primary.copies import KVCaches


class Staging:
    """Memory for some blocks of all layers, on the model's device.

    A page holds one layer of one block: keys of shape (heads, tokens, key_dim), then values.

    Attributes:
        num_blocks: number of blocks that fit.
        pages: per layer a uint8 tensor, shape (num_blocks, page_bytes).
        views: per layer the same memory as keys and values, each shape (heads, num_blocks, tokens, dim).
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
        """Return views of a layer's keys and values, each shape (heads, num_blocks, tokens, dim)."""
        shape, tokens = self._shape, self._tokens_per_block
        elements = page.view(shape.dtype)
        num_keys = shape.num_heads * tokens * shape.key_dim
        keys = elements[:, :num_keys].unflatten(1, (shape.num_heads, tokens, shape.key_dim))
        values = elements[:, num_keys:].unflatten(1, (shape.num_heads, tokens, shape.value_dim))
        return keys.transpose(0, 1), values.transpose(0, 1)

    def kv_caches(self) -> KVCaches:
        """Return the pages in the form that workers take: one KV group with all layers."""
        return KVCaches(self.pages, [[(index, int(page.shape[1])) for index, page in enumerate(self.pages)]])

    def fill(self, cache: Any, blocks: Sequence[int]) -> None:
        """Copy blocks of the cache into the first pages.

        Args:
            cache: a `DynamicCache` of the staging area's shape that holds all tokens of the blocks.
            blocks: indices of blocks, counted from the first token; at most `num_blocks` of them.
        """
        for layer, views in zip(cache.layers, self.views, strict=True):
            for tensor, view in zip((layer.keys, layer.values), views, strict=True):
                whole = tensor[0, :, : (max(blocks) + 1) * self._tokens_per_block]
                by_block = whole.unflatten(1, (-1, self._tokens_per_block))
                view[:, : len(blocks)] = by_block[:, list(blocks)]


class CacheBuilder:
    """Collects the keys and values of a prefix from several fillings of the staging area."""

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
        """Copy the first `count` blocks of the staging area to the prefix, from its block `start` on."""
        for tensors, views in zip(self._tensors, staging.views, strict=True):
            for tensor, view in zip(tensors, views, strict=True):
                tensor[:, start : start + count] = view[:, :count]

    def build(self, config: Any, num_blocks: int) -> DynamicCache:
        """Return a cache of the first `num_blocks` blocks; if these are all, it shares the builder's memory."""
        cache = DynamicCache(config=config)
        if num_blocks:
            for layer, (keys, values) in zip(cache.layers, self._tensors, strict=True):
                layer.lazy_initialization(keys[None, :, 0], values[None, :, 0])
                layer.keys = keys[:, :num_blocks].flatten(1, 2)[None]
                layer.values = values[:, :num_blocks].flatten(1, 2)[None]
        return cache
