"""Computes from a model's configuration what each layer keeps per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvtier.simulator.model_config import ModelConfig, refusal

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_KV_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_head_kv",
    "num_attention_groups",
    "num_key_value_heads_per_layer",
)
_HEAD_DIM = ("head_dim", "kv_channels", "hidden_size_per_head", "attention_head_dim")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_LATENT_WIDTHS = ("v_head_dim", "qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim")
_LONGCAT = ("longcat_flash", "longcat_flash_ngram")
_WITH_INDEX = ("", "deepseek_v32", "glm_moe_dsa")
_NOT_KNOWN = "not known, no size follows for this model"

READ = frozenset(
    (
        *(*_LAYERS, *_HEADS, *_KV_HEADS, *_HEAD_DIM, *_HIDDEN, *_LATENT_WIDTHS, "kv_lora_rank", "use_mla"),
        *("multi_query", "new_decoder_architecture", "multi_query_attention", "multi_query_group_num"),
        *("num_query_heads", "num_kv_shared_layers", "index_head_dim", "attn_config", "block_configs"),
        *("attention_k_eq_v", "num_global_key_value_heads", "global_head_dim"),
    )
)
"""Keys of the configuration that this module reads."""


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps per token.

    Attributes:
        vectors: number of vectors, keys and values together.
        width: numbers per vector.
        rotary: numbers of a latent vector that carry the position; 0 for other vectors.
        index_bytes: further bytes, for an indexer that chooses tokens.
    """

    vectors: int
    width: int
    rotary: int = 0
    index_bytes: int = 0


def is_latent(model: ModelConfig) -> bool:
    """Return whether a layer keeps one latent vector instead of keys and values (MLA)."""
    return model.values.get("kv_lora_rank") not in (None, 0) and model.values.get("use_mla") is not False


def layer_shapes(model: ModelConfig) -> Sequence[LayerShape]:
    """Return the shapes of the layers that keep a cache.

    Raises:
        ConfigError: the configuration lacks a needed key, contradicts itself, or has a part that is not known.
    """
    if is_latent(model):
        return (_latent_shape(model),) * _num_layers(model)
    if "indexed_attention" in (model.values.get("layer_types") or ()):
        raise refusal("layer_types", "indexed_attention", f"without kv_lora_rank: {_NOT_KNOWN}")
    if model.values.get("block_configs"):
        return _shapes_of_blocks(model)
    layers, width = _num_layers(model), _head_dim(model)
    for key in _KV_HEADS:
        if isinstance(model.values.get(key), list):
            return [LayerShape(2 * count, width) for count in _listed(model, key, layers)]
    shape = LayerShape(2 * _num_kv_heads(model), width)
    if model.values.get("global_head_dim") or model.values.get("attention_k_eq_v"):
        return _shapes_by_kind(model, layers, shape)
    return (shape,) * layers


def kind_of(model: ModelConfig, layers: Sequence[LayerShape]) -> str:
    """Return "MHA", "GQA", "MQA" or "MLA"."""
    if is_latent(model):
        return "MLA"
    kv_heads = max(layer.vectors for layer in layers) // 2
    heads = model.values.get("num_query_heads") or next(
        (model.values[key] for key in _HEADS if model.values.get(key)), 0
    )
    if kv_heads == (max(heads) if isinstance(heads, list) else heads):
        return "MHA"
    return "MQA" if kv_heads == 1 else "GQA"


def _num_layers(model: ModelConfig) -> int:
    if model.model_type in _LONGCAT:
        return 2 * model.need("num_layers")  # each layer has two attention blocks
    layers = model.need(*_LAYERS)
    for key in _LAYERS:
        if model.get(key) not in (None, layers):
            raise refusal(
                key, model.get(key), f"another number of layers than {layers}, no size follows for this model"
            )
    shared = model.values.get("num_kv_shared_layers") or 0  # the last layers read the cache of earlier ones
    if type(shared) is not int or not 0 <= shared < layers:
        raise refusal("num_kv_shared_layers", shared, f"an int below the {layers} layers expected")
    return layers - shared


def _head_dim(model: ModelConfig) -> int:
    width = model.get(*_HEAD_DIM)
    if width is None:
        width = _quotient(_HIDDEN[0], model.need(*_HIDDEN), model.need(*_HEADS))
    for key in _LATENT_WIDTHS:
        if model.values.get(key) and (key not in _LATENT_WIDTHS[:2] or model.get(key) != width):
            raise refusal(key, model.values[key], f"without latent attention, and not the head's {width}: {_NOT_KNOWN}")
    return width


def _num_kv_heads(model: ModelConfig) -> int:
    """Return the number of KV heads of a layer; it equals the query heads if the configuration has none."""
    values, heads = model.values, model.get(*_HEADS)
    if values.get("multi_query") and not values.get("new_decoder_architecture"):
        return 1  # Falcon and GPT-BigCode ignore their other keys then
    kv_heads = model.get("multi_query_group_num") if values.get("multi_query_attention") else None
    if values.get("attn_config"):
        kv_heads = _nested_kv_heads(values["attn_config"])
    kv_heads = kv_heads or model.get(*_KV_HEADS) or heads or model.need(*_HEADS)
    if heads is not None:
        _quotient(_HEADS[0], heads, kv_heads)
    return kv_heads


def _nested_kv_heads(attention: object) -> int | None:
    """Return the KV heads in the `attn_config` of MPT and DBRX; None if it names none."""
    if not isinstance(attention, Mapping):
        raise refusal("attn_config", attention, "a JSON object expected")
    nested = ModelConfig(attention, ("attn_type", "kv_n_heads"))
    kind = nested.values.get("attn_type", "grouped_query_attention")
    if kind not in ("multihead_attention", "multiquery_attention", "grouped_query_attention"):
        raise refusal("attn_type", kind, _NOT_KNOWN)
    return 1 if kind == "multiquery_attention" else nested.get("kv_n_heads")


def _latent_shape(model: ModelConfig) -> LayerShape:
    """Return the shape of a layer with one latent vector, and an indexer's key if the model has an indexer."""
    rank, rotary = model.need("kv_lora_rank"), model.need("qk_rope_head_dim")
    index = model.get("index_head_dim") or 0
    if index and model.model_type not in _WITH_INDEX:
        raise refusal(
            "index_head_dim", index, f"of another type than {', '.join(filter(None, _WITH_INDEX))}: {_NOT_KNOWN}"
        )
    # An indexer's key has 8 bits per number, and a scale of 4 bytes for every 128 numbers.
    return LayerShape(1, rank + rotary, rotary, index + index // 128 * 4)


def _listed(model: ModelConfig, key: str, layers: int) -> list[int]:
    listed: list[int] = model.values[key]
    if len(listed) != layers or not all(type(count) is int and count > 0 for count in listed):
        raise refusal(key, listed, f"an int above 0 for each of {layers} layers expected")
    return listed


def _shapes_by_kind(model: ModelConfig, layers: int, shape: LayerShape) -> list[LayerShape]:
    """Return the shapes of a model whose layers with full attention have other heads than those with a window."""
    kinds = model.values.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) < layers:
        raise refusal("layer_types", kinds, f"the kinds of {layers} layers expected, since they are not alike")
    vectors = shape.vectors
    if model.values.get("attention_k_eq_v"):  # keys equal values, but vLLM keeps both
        vectors = 2 * (model.get("num_global_key_value_heads") or vectors // 2)
    full = LayerShape(vectors, model.get("global_head_dim") or shape.width)
    return [full if kind == "full_attention" else shape for kind in kinds[:layers]]


def _shapes_of_blocks(model: ModelConfig) -> list[LayerShape]:
    """Return the shapes of a model in which each block has its own attention or none (Nemotron-NAS)."""
    blocks, layers = model.values["block_configs"], model.need(*_LAYERS)
    if not isinstance(blocks, list) or len(blocks) != layers:
        raise refusal("block_configs", blocks, f"{layers} blocks expected, one a layer")
    counts = [_block_kv_heads(model, block) for block in blocks]
    if not any(counts):
        raise refusal("block_configs", blocks, "no block with attention: no size follows for this model")
    return [LayerShape(2 * count, _head_dim(model)) for count in counts if count]


def _block_kv_heads(model: ModelConfig, block: Any) -> int:
    """Return the number of a block's KV heads; 0 if it has no attention."""
    attention = block.get("attention") if isinstance(block, Mapping) else None
    if not isinstance(attention, Mapping):
        raise refusal("block_configs", block, f"a block without an object `attention`: {_NOT_KNOWN}")
    if attention.get("no_op") or attention.get("replace_with_linear"):
        return 0
    for key, value in attention.items():
        if value and key not in ("n_heads_in_group", "num_key_value_heads"):
            raise refusal(f"block_configs.attention.{key}", value, _NOT_KNOWN)
    group, count = attention.get("n_heads_in_group"), attention.get("num_key_value_heads")
    if count is None and type(group) is int and group > 0:
        count = _quotient(_HEADS[0], model.need(*_HEADS), group)
    if type(count) is not int or count <= 0:
        raise refusal("block_configs", block, "n_heads_in_group or num_key_value_heads expected, an int above 0")
    return count


def _quotient(name: str, value: int, divisor: int) -> int:
    if value % divisor:
        raise refusal(name, value, f"a multiple of {divisor}, since heads are equal")
    return value // divisor
