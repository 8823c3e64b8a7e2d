"""What makes the KV cache of one transformers model unlike that of another: its shape, and its namespace."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvtier.adapters.token_blocks import HASH_ALGORITHM
from kvtier.errors import ConfigError
from kvtier.namespace import Namespace

PAGE_BYTES = 4096
PAGES_PER_TENSOR = 64
"""A tensor of up to this many pages is hashed whole, a larger one at this many places, evenly spread."""

_VOLATILE_CONFIG = frozenset(
    {"transformers_version", "_name_or_path", "_model_name_or_path", "use_cache", "output_attentions", "architectures"}
)


@dataclass(frozen=True)
class CacheShape:
    """Shape of a model's KV cache for one sequence.

    Attributes:
        num_layers: layers that keep keys and values.
        num_heads: key and value heads of each layer.
        key_dim, value_dim: elements of one head's key and value of one token.
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
        """Bytes that one token takes in one layer."""
        return self.num_heads * (self.key_dim + self.value_dim) * int(self.dtype.itemsize)


def inspect_cache(model: Any) -> CacheShape:
    """Return the shape of the model's KV cache, found by running the model on one token.

    Args:
        model: a causal language model of transformers, in evaluation mode.

    Raises:
        ConfigError: the model's cache is not made of plain full-attention layers of one shape, or the model is in
            training mode.
    """
    if model.training:
        raise ConfigError("model.training", True, "false expected: call model.eval() first")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError("model", type(model).__name__, "a decoder-only causal language model expected")
    cache = DynamicCache(config=model.config)
    _check_layers(model, cache)
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    with torch.inference_mode():
        model(input_ids=token, past_key_values=cache, use_cache=True)
    _check_layers(model, cache)
    shapes = {_layer_shape(model, layer) for layer in cache.layers}
    if len(shapes) != 1:
        raise ConfigError("model", type(model).__name__, f"layers of one shape expected, not {len(shapes)} shapes")
    (heads, key_dim, value_dim, dtype, device) = shapes.pop()
    return CacheShape(len(cache.layers), heads, key_dim, value_dim, dtype, device)


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


def model_namespace(model: Any, shape: CacheShape, tokens_per_block: int) -> Namespace:
    """Return the identity of the model's KV blocks.

    It covers the weights (see `weights_digest`), every setting of the model's configuration, the attention
    implementation, the shape and order of what a block holds, and how keys are made. The name of a model in a local
    folder is left out: a moved folder is still the same model.
    """
    name = str(getattr(model.config, "_name_or_path", "") or "")
    config = {key: value for key, value in model.config.to_dict().items() if key not in _VOLATILE_CONFIG}
    return Namespace(
        {
            "engine": f"transformers {transformers.__version__}",
            "model": "" if os.path.exists(name) else name,
            "revision": str(getattr(model.config, "_commit_hash", None) or ""),
            "class": type(model).__name__,
            "weights": weights_digest(model.state_dict()),
            "config": hashlib.blake2b(_canonical(config), digest_size=16).hexdigest(),
            "rope": _canonical(config.get("rope_parameters") or config.get("rope_scaling") or {}).decode(),
            "attention": str(getattr(model.config, "_attn_implementation", None) or ""),
            "dtype": str(shape.dtype),
            "layers": shape.num_layers,
            "heads": shape.num_heads,
            "key_dim": shape.key_dim,
            "value_dim": shape.value_dim,
            "tokens_per_block": tokens_per_block,
            "layout": "layer, key then value, head, token, dim",
            "hash": HASH_ALGORITHM,
        }
    )


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of weights: each tensor's name, type, shape, and pages sampled evenly over it.

    A tensor of at most `PAGES_PER_TENSOR` pages is covered whole. Of a larger one a change of a few elements may be
    missed; training, merging or quantizing changes them all.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(_sample(tensor.detach()))
    return digest.hexdigest()


def _sample(tensor: torch.Tensor) -> bytes:
    if tensor.numel() == 0:
        return b""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    size = flat.numel()
    if size > PAGES_PER_TENSOR * PAGE_BYTES:
        starts = [(size - PAGE_BYTES) * i // (PAGES_PER_TENSOR - 1) for i in range(PAGES_PER_TENSOR)]
        flat = torch.cat([flat[start : start + PAGE_BYTES] for start in starts])
    return bytes(flat.cpu().numpy())


def accepts(model: Any, argument: str) -> bool:
    """Return whether the model's forward pass takes an argument of this name."""
    return argument in inspect.signature(model.forward).parameters
