"""Computes the bytes of KV cache per token in vLLM from a model's `config.json`.

Layers with a sliding window or with chunks count like layers with full attention, since kvtier stores their blocks,
too. Layers that keep a state instead of a cache per token (Mamba, linear attention) have no bytes per token. Models
with such layers are refused. Configurations with an unknown key that may change the size are refused, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtier.errors import ConfigError
from kvtier.simulator.attention_share import doubling_tokens
from kvtier.simulator.kv_formats import DS_MLA, KVFormat, find_format
from kvtier.simulator.layer_shapes import READ, LayerShape, is_latent, kind_of, layer_shapes
from kvtier.simulator.model_config import ModelConfig, read_config


def _gqa(layers: int, kv_heads: int, dim: int, hidden: int, heads: int, mlp: int, experts: int = 0) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "torch_dtype": "bfloat16",
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "num_experts_per_tok": experts,
    }


def _mla(
    layers: int, hidden: int, heads: int, queries: int, dense: int, num_dense: int, mlp: int, experts: int, shared: int
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "torch_dtype": "bfloat16",
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "q_lora_rank": queries,
        "intermediate_size": dense,
        "first_k_dense_replace": num_dense,
        "moe_intermediate_size": mlp,
        "num_experts_per_tok": experts,
        "n_shared_experts": shared,
    }


KNOWN_MODELS: Mapping[str, Mapping[str, Any]] = {
    "meta-llama/Llama-3.1-8B": _gqa(32, 8, 128, 4096, 32, 14336),
    "meta-llama/Llama-3.1-70B": _gqa(80, 8, 128, 8192, 64, 28672),
    "meta-llama/Llama-3.1-405B": _gqa(126, 8, 128, 16384, 128, 53248),
    "meta-llama/Llama-2-7b": _gqa(32, 32, 128, 4096, 32, 11008),
    "mistralai/Mistral-7B-v0.3": _gqa(32, 8, 128, 4096, 32, 14336),
    "Qwen/Qwen3-0.6B": _gqa(28, 8, 128, 1024, 16, 3072),
    "Qwen/Qwen3-8B": _gqa(36, 8, 128, 4096, 32, 12288),
    "Qwen/Qwen3-32B": _gqa(64, 8, 128, 5120, 64, 25600),
    "Qwen/Qwen3-30B-A3B": _gqa(48, 4, 128, 2048, 32, 768, experts=8),
    "Qwen/Qwen3-235B-A22B": _gqa(94, 4, 128, 4096, 64, 1536, experts=8),
    "HuggingFaceTB/SmolLM2-135M": _gqa(30, 3, 64, 576, 9, 1536),
    "deepseek-ai/DeepSeek-V2-Lite": _mla(27, 2048, 16, 0, 10944, 1, 1408, 6, 2),
    "deepseek-ai/DeepSeek-V3": _mla(61, 7168, 128, 1536, 18432, 3, 2048, 8, 1),
    "deepseek-ai/DeepSeek-R1": _mla(61, 7168, 128, 1536, 18432, 3, 2048, 8, 1),
    "moonshotai/Kimi-K2-Instruct": _mla(61, 7168, 64, 1536, 18432, 1, 2048, 8, 1),
}
"""Shapes that the models' makers published, for use without their `config.json`."""


@dataclass(frozen=True)
class Geometry:
    """Shape of a model's KV cache.

    Attributes:
        name: the model's name, for people.
        kind: "MHA", "GQA", "MQA" or "MLA".
        layers: the layers that keep a cache.
        format: the format of the numbers in the cache.
        doubling: tokens of context with which a token takes twice as long to compute as without context.
    """

    name: str
    kind: str
    layers: Sequence[LayerShape]
    format: KVFormat
    doubling: float

    @property
    def num_layers(self) -> int:
        """Number of layers that keep a cache."""
        return len(self.layers)

    @property
    def layer_elements(self) -> int:
        """Numbers that one layer keeps per token; the largest if layers differ."""
        return max(layer.vectors * layer.width for layer in self.layers)

    @property
    def element_bytes(self) -> float:
        """Bytes per number, without `scale_bytes` per vector."""
        return self.format.element_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes per token, all layers together."""
        return sum(
            layer.vectors * self.format.vector_bytes(layer.width, layer.rotary) + layer.index_bytes
            for layer in self.layers
        )


def find_geometry(model: str, kv_dtype: str = "auto") -> Geometry:
    """Return the geometry of a model.

    Args:
        model: a `config.json`, a folder with one, or the name of a known model, with or without its owner.
        kv_dtype: data type of the cache; "auto" is the checkpoint's own.

    Raises:
        ConfigError: the model or the data type is not known, or the configuration does not determine the size.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            return geometry_of(model, read_config(path), kv_dtype)
        except RecursionError:
            raise ConfigError("model", model, "a config.json that is not nested too deeply") from None
    for name, config in KNOWN_MODELS.items():
        if model.lower() in (name.lower(), name.rpartition("/")[2].lower()):
            return geometry_of(name, config, kv_dtype)
    raise ConfigError("model", model, f"a config.json, a folder with one, or one of {', '.join(KNOWN_MODELS)}")


def geometry_of(name: str, config: Mapping[str, Any], kv_dtype: str = "auto") -> Geometry:
    """Return the geometry of a model's configuration; if it nests several models, the language model's.

    Raises:
        ConfigError: as `find_geometry`.
    """
    model = ModelConfig(config, READ)
    latent = is_latent(model)
    layers = layer_shapes(model)
    numbers = find_format(kv_dtype, model.dtype, model.quantization)
    if numbers.is_latent and not latent:
        raise ConfigError("kv_dtype", kv_dtype, "for latent attention (MLA) only; fp8 does for this model")
    if numbers.element_bytes == 1 and any(layer.index_bytes for layer in layers):
        numbers = DS_MLA  # vLLM's sparse attention supports no other 8-bit format
    return Geometry(name, kind_of(model, layers), layers, numbers, doubling_tokens(model, layers))
