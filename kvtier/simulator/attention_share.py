"""How the cost of a token grows with its context: multiplications of attention, compared with all others."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvtier.simulator.layer_shapes import LayerShape, is_latent
from kvtier.simulator.model_config import ModelConfig
from kvtier.tiering.estimate import DOUBLING_TOKENS

_HIDDEN = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_DENSE = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
_EXPERT = ("moe_intermediate_size", "expert_ffn_hidden_size", *_DENSE)
_EXPERTS_USED = ("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_top_k", "moe_k")
_SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
_FULL = ("full_attention", "attention", "indexed_attention")
_MLP_MATRICES = 3
"""Weight matrices of a gated MLP, which almost all models since 2023 have."""


def doubling_tokens(model: ModelConfig, layers: Sequence[LayerShape]) -> float:
    """Return the context, in tokens, at which attention multiplies as often as the rest of the model.

    A token with this context takes twice as long as one without context. Layers with a window or with chunks do not
    slow down; a model with only such layers gets infinity. If the configuration lacks a size, the result is the
    engine's guess, `DOUBLING_TOKENS`.
    """
    hidden, heads = _count(model, _HIDDEN), _count(model, _HEADS)
    mlp = _mlp(model, len(layers), hidden)
    if not (hidden and heads and mlp):
        return DOUBLING_TOKENS
    if is_latent(model):
        fixed, per_token = _latent(model, hidden, heads)
    else:
        fixed = sum(hidden * (2 * heads + layer.vectors) * layer.width for layer in layers) / len(layers)
        per_token = 2 * heads * sum(layer.width for layer in layers) / len(layers)
    full = _full_share(model)
    return (fixed + mlp) / (per_token * full) if full and per_token else math.inf


def _latent(model: ModelConfig, hidden: int, heads: int) -> tuple[float, float]:
    """Return the multiplications of MLA per token: of its projections, and of attention per token of context."""
    rank, rotary = model.need("kv_lora_rank"), model.need("qk_rope_head_dim")
    plain, value = _count(model, ("qk_nope_head_dim",)) or 128, _count(model, ("v_head_dim",)) or 128
    query, compressed = heads * (plain + rotary), _count(model, ("q_lora_rank",))
    queries = (hidden + query) * compressed if compressed else hidden * query
    keys = hidden * (rank + rotary) + rank * heads * (plain + value)
    # An indexer reads the whole context; attention then reads only the tokens that the indexer chooses.
    index = _count(model, ("index_n_heads",)) * _count(model, ("index_head_dim",))
    return queries + keys + heads * value * hidden, index or heads * (plain + rotary + value)


def _mlp(model: ModelConfig, layers: int, hidden: int) -> float:
    """Return the multiplications per token of one layer's MLP, the mean over layers; 0 if its shape is not known."""
    dense, used = _MLP_MATRICES * hidden * _count(model, _DENSE), _count(model, _EXPERTS_USED)
    if not used:
        return dense
    active = used + _count(model, _SHARED_EXPERTS)
    experts = active * _MLP_MATRICES * hidden * _count(model, _EXPERT)
    num_dense = min(layers, _count(model, ("first_k_dense_replace",)))
    return (num_dense * dense + (layers - num_dense) * experts) / layers


def _full_share(model: ModelConfig) -> float:
    """Return the share of layers whose attention sees the whole context."""
    kinds, pattern = model.values.get("layer_types"), _count(model, ("sliding_window_pattern",))
    if isinstance(kinds, list) and kinds:
        return sum(kind in _FULL for kind in kinds) / len(kinds)
    return 1 / pattern if pattern else 1.0


def _count(model: ModelConfig, names: Sequence[str]) -> int:
    """Return the value of the first of `names` that the configuration has as a positive int, else 0."""
    values = (model.values.get(name) for name in names)
    return next((value for value in values if type(value) is int and value > 0), 0)
