"""The shape of a transformers model's KV cache, and the namespace of its blocks."""

from __future__ import annotations

import inspect
import itertools
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvtier.adapters.token_blocks import HASH_ALGORITHM
from kvtier.adapters.weights_digest import plain_parts, weights_digest
from kvtier.errors import ConfigError
from kvtier.namespace import Namespace

__all__ = ["CacheShape", "accepts", "inspect_cache", "layout_namespace", "weights_digest"]

LAYOUT_VERSIONS: Mapping[str, str] = {}
"""Releases of transformers that compute the same KV, bit for bit, as an earlier release, by test: maps each to the
earlier one, whose blocks it shares. A release that is not listed shares no blocks with others."""

ROPE_BY_LENGTH = frozenset({"dynamic", "longrope"})
"""Rotary embeddings whose angles depend on the prompt's length: the same prefix has other KV in a longer prompt."""


@dataclass(frozen=True)
class CacheShape:
    """The shape of a model's KV cache for one sequence.

    Attributes:
        num_layers: layers that keep keys and values.
        num_heads: KV heads per layer.
        key_dim, value_dim: elements per head and token.
        dtype, device: of the cached tensors.
    """

    num_layers: int
    num_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes per token and layer."""
        return self.num_heads * (self.key_dim + self.value_dim) * int(self.dtype.itemsize)


def inspect_cache(model: Any) -> CacheShape:
    """Run the model on one token, and return the shape of its KV cache.

    Args:
        model: a causal language model of transformers, in evaluation mode.

    Raises:
        ConfigError: `model` is no causal language model, is in training mode, has weights that are not in memory, or
            its cache does not consist of plain full-attention layers of one shape.
    """
    _check_model(model)
    cache = DynamicCache(config=model.config)
    _check_layers(model, cache)
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    try:
        with torch.inference_mode():
            model(input_ids=token, past_key_values=cache, use_cache=True)
    except Exception as error:  # a model that needs more than token ids may raise anything
        allowed = f"a model that runs on token ids alone expected: {type(error).__name__}: {error}"
        raise ConfigError("model", type(model).__name__, allowed) from error
    _check_layers(model, cache)
    shapes = {_layer_shape(model, layer) for layer in cache.layers}
    if len(shapes) != 1:
        raise ConfigError("model", type(model).__name__, f"layers of one shape expected, not {len(shapes)} shapes")
    (heads, key_dim, value_dim, dtype, device) = shapes.pop()
    return CacheShape(len(cache.layers), heads, key_dim, value_dim, dtype, device)


def _check_model(model: Any) -> None:
    kind = type(model).__name__
    if isinstance(model, str):
        allowed = "a model expected, not its name: AutoModelForCausalLM.from_pretrained(name).eval()"
        raise ConfigError("model", reprlib.repr(model), allowed)
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise ConfigError("model", kind, "a causal language model of transformers expected")
    if getattr(model.config, "is_encoder_decoder", False) or not hasattr(model, "get_input_embeddings"):
        raise ConfigError("model", kind, "a decoder-only causal language model expected")
    if model.training:
        raise ConfigError("model.training", True, "false expected: call model.eval() first")
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        plain_parts(name, tensor)
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    by_layer = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    if kinds := sorted(ROPE_BY_LENGTH & {str(parameters.get("rope_type")) for parameters in by_layer}):
        allowed = "a type whose angles do not depend on the prompt's length: else a prefix cannot be reused"
        raise ConfigError("rope_type", kinds[0], allowed)


def _check_layers(model: Any, cache: Any) -> None:
    others = sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer})
    if others:
        allowed = f"only plain full-attention layers can be cached by prefix, this model has {', '.join(others)}"
        raise ConfigError("model", type(model).__name__, allowed)


def _layer_shape(model: Any, layer: Any) -> tuple[int, int, int, Any, Any]:
    if not layer.is_initialized:
        raise ConfigError("model", type(model).__name__, "layers that share another layer's KV are not supported")
    (batch, heads, length, key_dim), value_shape = layer.keys.shape, layer.values.shape
    same = value_shape[:3] == (batch, heads, length) and layer.values.dtype == layer.keys.dtype
    if not same or (batch, length) != (1, 1):
        allowed = f"keys and values (1, heads, tokens, dim) expected, not {tuple(layer.keys.shape)}"
        raise ConfigError("model", type(model).__name__, allowed)
    return heads, key_dim, value_shape[3], layer.keys.dtype, layer.keys.device


def layout_namespace(model: Any, shape: CacheShape, tokens_per_block: int) -> Namespace:
    """Return the namespace of all KV blocks of a model: the layout of their bytes, and how their keys are made.

    Weights and settings are not part of it: they can change while a cache is open, so each key contains them (see
    `ModelIdentity`). The path of a local model is not part of it either: a moved folder is the same model.
    """
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return Namespace(
        {
            "engine": f"transformers {LAYOUT_VERSIONS.get(transformers.__version__, transformers.__version__)}",
            "model": "" if os.path.exists(name) else name,
            "revision": str(getattr(model.config, "_commit_hash", None) or ""),
            "dtype": str(shape.dtype),
            "device": shape.device.type,
            "layers": shape.num_layers,
            "heads": shape.num_heads,
            "key_dim": shape.key_dim,
            "value_dim": shape.value_dim,
            "tokens_per_block": tokens_per_block,
            "layout": "layer, key then value, head, token, dim",
            "hash": HASH_ALGORITHM,
        }
    )


def accepts(model: Any, argument: str) -> bool:
    """Return whether the model's forward pass has a parameter of this name."""
    return argument in inspect.signature(model.forward).parameters
