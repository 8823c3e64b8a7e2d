"""The staging area between a worker and a `DynamicCache`.

A worker copies pages, each with one layer of one block. A `DynamicCache` has per layer one tensor for all tokens. The
staging area holds a few blocks as pages: the worker copies between arena and pages, this module between pages and
tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvtier.adapters.cache_shape import CacheShape, LayerShape
from kvtier.adapters.recording_cache import CachedSequence, RecordingCache
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
        self.pages = [
            torch.zeros((num_blocks, layer.token_bytes * tokens_per_block), dtype=torch.uint8, device=shape.device)
            for layer in shape.layers
        ]
        self._shape = shape
        self._tokens_per_block = tokens_per_block
        self.views = [self._split(page, layer) for page, layer in zip(self.pages, shape.layers, strict=True)]

    def _split(self, page: torch.Tensor, shape: LayerShape) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of a layer's keys and values, each shape (heads, num_blocks, tokens, dim)."""
        tokens = self._tokens_per_block
        elements = page.view(shape.dtype)
        num_keys = shape.num_heads * tokens * shape.key_dim
        keys = elements[:, :num_keys].unflatten(1, (shape.num_heads, tokens, shape.key_dim))
        values = elements[:, num_keys:].unflatten(1, (shape.num_heads, tokens, shape.value_dim))
        return keys.transpose(0, 1), values.transpose(0, 1)

    def kv_caches(self) -> KVCaches:
        """Return the pages in the form that workers take: one KV group with all layers."""
        return KVCaches(self.pages, [[(index, int(page.shape[1])) for index, page in enumerate(self.pages)]])

    def fill(self, sequence: CachedSequence, blocks: Sequence[int]) -> None:
        """Copy blocks of a sequence into the first pages.

        Args:
            sequence: of the staging area's shape; it holds all tokens of the blocks.
            blocks: indices of blocks, counted from the first token; at most `num_blocks` of them.
        """
        size, complete_from = self._tokens_per_block, sequence.first_token(self._shape)
        lowest, end = min(blocks), max(blocks) + 1
        wanted = [block - lowest for block in blocks]
        for layer, views in zip(self._shape.layers, self.views, strict=True):
            skipped = 0 if layer.window is None else complete_from
            for tensor, view in zip(sequence.layer(layer), views, strict=True):
                part = tensor[:, lowest * size - skipped : end * size - skipped]
                view[:, : len(blocks)] = part.unflatten(1, (-1, size))[:, wanted]


class CacheBuilder:
    """Collects the keys and values of a prefix from several fillings of the staging area.

    Attributes:
        tensors: per layer keys and values, each shape (heads, num_blocks, tokens per block, dim).
    """

    def __init__(self, shape: CacheShape, tokens_per_block: int, num_blocks: int) -> None:
        self._shape = shape
        self.tensors = [
            tuple(
                torch.empty(
                    (layer.num_heads, num_blocks, tokens_per_block, dim), dtype=layer.dtype, device=shape.device
                )
                for dim in (layer.key_dim, layer.value_dim)
            )
            for layer in shape.layers
        ]

    def take(self, staging: Staging, start: int, count: int) -> None:
        """Copy the first `count` blocks of the staging area to the prefix, from its block `start` on."""
        for tensors, views in zip(self.tensors, staging.views, strict=True):
            for tensor, view in zip(tensors, views, strict=True):
                tensor[:, start : start + count] = view[:, :count]

    def build(self, config: Any, num_blocks: int) -> RecordingCache:
        """Return a cache of the first `num_blocks` blocks; if these are all, it shares the builder's memory."""
        cache = RecordingCache(config, self._shape)
        if num_blocks:
            for layer, (keys, values) in zip(self._shape.layers, self.tensors, strict=True):
                cache.restore(layer, *(part[:, :num_blocks].flatten(1, 2)[None] for part in (keys, values)))
        return cache
