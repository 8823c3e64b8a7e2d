"""The shape of a transformers model's KV cache: which layers keep what, and which models cannot be restored."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from kvtier.adapters.weights_digest import plain_parts
from kvtier.errors import ConfigError

ROPE_BY_LENGTH = frozenset({"dynamic", "longrope"})
"""Rotary embeddings whose angles depend on the prompt's length: the same prefix has other KV in a longer prompt."""

_QUANTIZES_PASSES = "torch.ao.nn.quantized"
"""Layers that scale activations by the largest one of a forward pass: another split gives other results."""

_RESTORABLE = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
"""Kinds of layers whose KV can be restored. The last kind keeps nothing: it uses another layer's KV, or none."""


@dataclass(frozen=True)
class LayerShape:
    """The KV of one layer, for one sequence.

    Attributes:
        index: of the layer in the model's cache.
        num_heads: KV heads.
        key_dim, value_dim: elements per head and token.
        dtype: of keys and values.
        window: number of tokens that a token attends to, itself included; None for all tokens. The model's cache keeps
            the last `window - 1` tokens.
    """

    index: int
    num_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    window: int | None = None

    @property
    def token_bytes(self) -> int:
        """Bytes per token."""
        return self.num_heads * (self.key_dim + self.value_dim) * int(self.dtype.itemsize)


@dataclass(frozen=True)
class CacheShape:
    """The shape of a model's KV cache for one sequence.

    Attributes:
        layers: those that keep KV, in the model's order; at least one.
        device: of the cached tensors.
    """

    layers: tuple[LayerShape, ...]
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes per token, of all layers."""
        return sum(layer.token_bytes for layer in self.layers)

    @property
    def has_windows(self) -> bool:
        """Whether some layer's cache forgets tokens that have left its window."""
        return any(layer.window is not None for layer in self.layers)


def inspect_cache(model: Any) -> CacheShape:
    """Run the model on one token, and return the shape of its KV cache.

    Args:
        model: a causal language model of transformers, in evaluation mode.

    Raises:
        ConfigError: `model` is no causal language model, is in training mode, has weights that are not in memory, or
            its cache has layers of a kind that cannot be restored.
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
    kept = [(index, layer) for index, layer in enumerate(cache.layers) if not isinstance(layer, DummyLayer)]
    shapes = tuple(_layer_shape(model, index, layer) for index, layer in kept)
    devices = {layer.keys.device for _, layer in kept}
    if len(devices) != 1:
        allowed = f"layers on one device expected, not on {len(devices)}"
        raise ConfigError("model", type(model).__name__, allowed)
    return CacheShape(shapes, devices.pop())


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
    if any(type(module).__module__.startswith(_QUANTIZES_PASSES) for module in model.modules()):
        allowed = (
            "layers that quantize each token by itself expected: of torch's, a token's KV depends on those beside it"
        )
        raise ConfigError("model", kind, allowed)
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        plain_parts(name, tensor)
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    by_layer = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    if kinds := sorted(ROPE_BY_LENGTH & {str(parameters.get("rope_type")) for parameters in by_layer}):
        allowed = "a type whose angles do not depend on the prompt's length: else a prefix cannot be reused"
        raise ConfigError("rope_type", kinds[0], allowed)


def _check_layers(model: Any, cache: Any) -> None:
    others = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in _RESTORABLE})
    if others:
        allowed = f"only layers with full attention or a sliding window can be restored, not {', '.join(others)}"
        raise ConfigError("model", type(model).__name__, allowed)


def _layer_shape(model: Any, index: int, layer: Any) -> LayerShape:
    if not layer.is_initialized:
        raise ConfigError("model", type(model).__name__, "layers that share another layer's KV are not supported")
    (batch, heads, length, key_dim), value_shape = layer.keys.shape, layer.values.shape
    same = value_shape[:3] == (batch, heads, length) and layer.values.dtype == layer.keys.dtype
    if not same or (batch, length) != (1, 1):
        allowed = f"keys and values (1, heads, tokens, dim) expected, not {tuple(layer.keys.shape)}"
        raise ConfigError("model", type(model).__name__, allowed)
    return LayerShape(index, heads, key_dim, value_shape[3], layer.keys.dtype, getattr(layer, "sliding_window", None))
