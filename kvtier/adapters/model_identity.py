"""The namespace of a transformers model's blocks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import transformers

from kvtier.adapters.cache_shape import CacheShape, LayerShape
from kvtier.adapters.token_blocks import HASH_ALGORITHM
from kvtier.namespace import Namespace

LAYOUT_VERSIONS: Mapping[str, str] = {}
"""Releases of transformers that compute the same KV, bit for bit, as an earlier release, by test: maps each to the
earlier one, whose blocks it shares. A release that is not listed shares no blocks with others."""


def layout_namespace(model: Any, shape: CacheShape, tokens_per_block: int) -> Namespace:
    """Return the namespace of all KV blocks of a model: the layout of their bytes, and how their keys are made.

    Weights and settings are not part of it: they can change while a cache is open, so each key contains them (see
    `ModelIdentity`). The path of a local model is not part of it either: a moved folder is the same model.
    """
    first, *others = shape.layers
    are_alike = first.window is None and all(replace(layer, index=first.index) == first for layer in others)
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return Namespace(
        {
            "engine": f"transformers {LAYOUT_VERSIONS.get(transformers.__version__, transformers.__version__)}",
            "model": "" if os.path.exists(name) else name,
            "revision": str(getattr(model.config, "_commit_hash", None) or ""),
            "dtype": str(first.dtype),
            "device": shape.device.type,
            "layers": len(shape.layers),
            "heads": first.num_heads,
            "key_dim": first.key_dim,
            "value_dim": first.value_dim,
            "tokens_per_block": tokens_per_block,
            "layout": "layer, key then value, head, token, dim",
            "hash": HASH_ALGORITHM,
            **({} if are_alike else {"layer_shapes": "; ".join(map(_describe, shape.layers))}),
        }
    )


def _describe(layer: LayerShape) -> str:
    """Return a text that is equal for layers whose pages have the same bytes."""
    dims = f"{layer.num_heads} x {layer.key_dim} + {layer.value_dim} {layer.dtype}"
    return dims if layer.window is None else f"{dims}, window {layer.window}"
