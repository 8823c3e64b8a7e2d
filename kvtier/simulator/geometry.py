"""How many bytes of KV cache one token takes, from a model's `config.json`: MHA, GQA, MQA and MLA.

Layers with a sliding window or with chunks are counted like those with full attention: kvtier stores their blocks, too.
Layers that keep a state instead of a cache a token (Mamba, linear attention) have no bytes a token; models with such
are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtier.errors import ConfigError

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "fp8": 1, "int8": 1}

_MOST = 1 << 31
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_HEAD_DIM = ("head_dim", "kv_channels")
_CACHING_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
_STATE_KEYS = frozenset(
    (
        "full_attention_interval",
        "attn_layer_period",
        "layers_block_type",
        "block_types",
        "hybrid_override_pattern",
        "linear_attn_config",
        "ssm_cfg",
    )
)
_STATE = "layers that keep a state instead of a cache a token are not understood, no size follows for this model"


def _gqa(layers: int, heads: int, dim: int) -> dict[str, Any]:
    return {"num_hidden_layers": layers, "num_key_value_heads": heads, "head_dim": dim, "torch_dtype": "bfloat16"}


def _mla(layers: int, rank: int, rope: int) -> dict[str, Any]:
    return {"num_hidden_layers": layers, "kv_lora_rank": rank, "qk_rope_head_dim": rope, "torch_dtype": "bfloat16"}


KNOWN_MODELS: Mapping[str, Mapping[str, Any]] = {
    "meta-llama/Llama-3.1-8B": _gqa(32, 8, 128),
    "meta-llama/Llama-3.1-70B": _gqa(80, 8, 128),
    "meta-llama/Llama-3.1-405B": _gqa(126, 8, 128),
    "meta-llama/Llama-2-7b": _gqa(32, 32, 128),
    "mistralai/Mistral-7B-v0.3": _gqa(32, 8, 128),
    "Qwen/Qwen3-0.6B": _gqa(28, 8, 128),
    "Qwen/Qwen3-8B": _gqa(36, 8, 128),
    "Qwen/Qwen3-32B": _gqa(64, 8, 128),
    "Qwen/Qwen3-30B-A3B": _gqa(48, 4, 128),
    "Qwen/Qwen3-235B-A22B": _gqa(94, 4, 128),
    "HuggingFaceTB/SmolLM2-135M": _gqa(30, 3, 64),
    "deepseek-ai/DeepSeek-V2-Lite": _mla(27, 512, 64),
    "deepseek-ai/DeepSeek-V3": _mla(61, 512, 64),
    "deepseek-ai/DeepSeek-R1": _mla(61, 512, 64),
    "moonshotai/Kimi-K2-Instruct": _mla(61, 512, 64),
}
"""Shapes as their makers published them, for machines that cannot reach the files."""


@dataclass(frozen=True)
class Geometry:
    """Shape of a model's KV cache.

    Attributes:
        name: of the model, for people.
        kind: "MHA", "GQA", "MQA" or "MLA".
        num_layers: layers that keep a cache.
        layer_elements: numbers that one layer keeps of one token.
        element_bytes: bytes of each.
    """

    name: str
    kind: str
    num_layers: int
    layer_elements: int
    element_bytes: int

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes, all layers together."""
        return self.num_layers * self.layer_elements * self.element_bytes


def find_geometry(model: str, kv_dtype: str = "auto") -> Geometry:
    """Return the geometry of a model.

    Args:
        model: a `config.json`, a folder with one, or the name of a known model (its last part will do).
        kv_dtype: data type of the cache; "auto" is the model's own.

    Raises:
        ConfigError: no such model, no such data type, or a config without what the sizes follow from.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ConfigError("model", model, f"no readable config.json: {error}") from None
        if not isinstance(config, dict):
            raise ConfigError("model", model, "a JSON object expected")
        return geometry_of(model, config, kv_dtype)
    for name, config in KNOWN_MODELS.items():
        if model.lower() in (name.lower(), name.rpartition("/")[2].lower()):
            return geometry_of(name, config, kv_dtype)
    raise ConfigError("model", model, f"a config.json, a folder with one, or one of {', '.join(KNOWN_MODELS)}")


def geometry_of(name: str, config: Mapping[str, Any], kv_dtype: str = "auto") -> Geometry:
    """Return the geometry that a model's configuration describes; of nested ones, the text model's.

    Raises:
        ConfigError: as `find_geometry`.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config = {**config, **text}
    _check_every_layer_caches(config)
    layers = _count(config, *_LAYERS)
    dtype = kv_dtype if kv_dtype != "auto" else str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
    if dtype not in DTYPE_BYTES:
        raise ConfigError("kv_dtype", dtype, f"one of {', '.join(DTYPE_BYTES)}")
    if config.get("kv_lora_rank"):
        elements = _count(config, "kv_lora_rank") + _count(config, "qk_rope_head_dim")
        return Geometry(name, "MLA", layers, elements, DTYPE_BYTES[dtype])
    heads, kv_heads = _heads(config)
    dim = _optional_count(config, *_HEAD_DIM)
    if dim is None:
        dim = _quotient("hidden_size", _count(config, "hidden_size", "n_embd"), heads or _count(config, *_HEADS))
    kind = "MHA" if kv_heads == heads else "MQA" if kv_heads == 1 else "GQA"
    return Geometry(name, kind, layers, 2 * kv_heads * dim, DTYPE_BYTES[dtype])


def _heads(config: Mapping[str, Any]) -> tuple[int | None, int]:
    """Return the numbers of query heads, None if the config does not say, and of KV heads."""
    heads = _optional_count(config, *_HEADS)
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return heads, 1  # Falcon and GPT-BigCode, whatever else they say
    groups = _optional_count(config, "multi_query_group_num") if config.get("multi_query_attention") else None
    kv_heads = groups or _optional_count(config, *_KV_HEADS) or heads or _count(config, *_HEADS)
    if heads is not None:
        _quotient("num_attention_heads", heads, kv_heads)
    return heads, kv_heads


def _check_every_layer_caches(config: Mapping[str, Any]) -> None:
    """Refuse models some of whose layers keep a state and no cache a token.

    Raises:
        ConfigError: the first key that says so.
    """
    for key, value in config.items():
        if value and (key in _STATE_KEYS or key.startswith("mamba_")):
            raise ConfigError(key, value, _STATE)
    types = config.get("layer_types") or []
    if not isinstance(types, list) or any(kind not in _CACHING_LAYERS for kind in types):
        raise ConfigError("layer_types", types, f"a list of {', '.join(_CACHING_LAYERS)}; {_STATE}")


def _quotient(name: str, value: int, divisor: int) -> int:
    if value % divisor:
        raise ConfigError(name, value, f"a multiple of {divisor}, since heads are equal")
    return value // divisor


def _optional_count(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MOST:
            raise ConfigError(name, value, "in the model's config.json: an int above 0 expected")
        return value
    return None


def _count(config: Mapping[str, Any], *names: str) -> int:
    value = _optional_count(config, *names)
    if value is None:
        raise ConfigError(names[0], None, "the model's config.json must say it, an int above 0")
    return value
