"""Bytes a token of published models: `config.json` as their makers wrote it, beside the figure that follows."""

import json
from pathlib import Path

import pytest

from kvtier.errors import ConfigError
from kvtier.simulator.geometry import geometry_of

PUBLISHED = json.loads((Path(__file__).parent / "published_models.json").read_text(encoding="utf-8"))
"""Each with `follows`, the product that `token_bytes` is, and `source`, where shape and figure come from."""


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry["model"])
def test_a_published_model_takes_what_is_published(entry):
    assert eval(entry["follows"]) == entry["token_bytes"]  # digits, products and sums of this repository
    assert entry["source"]
    assert geometry_of(entry["model"], entry["config"]).token_bytes == entry["token_bytes"]


def test_the_table_holds_many_models_each_once():
    assert len({entry["model"] for entry in PUBLISHED}) == len(PUBLISHED) >= 100


PLAIN = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
LATENT = PLAIN | {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
HYBRID = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 8
REFUSED = {
    "AI21-Jamba-1.5": ({"model_type": "jamba", "attn_layer_period": 8, "attn_layer_offset": 4}, "attn_layer_period"),
    "Bamba-9B": ({"model_type": "bamba", "attn_layer_indices": [9, 18, 27]}, "attn_layer_indices"),
    "BERT": ({"model_type": "bert", "type_vocab_size": 2}, "model_type"),
    "Command-R with an eagle": ({"model_type": "eagle"}, "model_type"),
    "DeciLM-7B, another list": ({"num_key_value_heads_per_layer": [4, 2]}, "num_key_value_heads_per_layer"),
    "DeepSeek-V4": ({"model_type": "deepseek_v4", "compress_ratios": [4, 128], "index_topk": 512}, "compress_ratios"),
    "Falcon-H1": ({"model_type": "falcon_h1", "mamba_d_ssm": 1536}, "mamba_d_ssm"),
    "Gemma 3n without its shared layers": ({"model_type": "gemma3n_text"}, "num_kv_shared_layers"),
    "Gemma 4, rewritten": ({"per_layer_config": {"5": {"head_dim": 512}}}, "per_layer_config"),
    "GLM-5 with shared indexers": (
        {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128, "indexer_types": ["full", "shared"]},
        "indexer_types",
    ),
    "Granite-4.0-H": (
        {"model_type": "granitemoehybrid", "layer_types": ["mamba"] * 31 + ["attention"], "mamba_n_heads": 48},
        "layer_types",
    ),
    "Hunyuan-Large": ({"use_cla": True, "cla_share_factor": 2}, "use_cla"),
    "Hymba": ({"conv_dim": {"0": 3200}, "kv_reuse_group": [[1, 2], [3, 4]]}, "conv_dim"),
    "Kimi-Linear": ({"linear_attn_config": {"full_attn_layers": [4, 8]}}, "linear_attn_config"),
    "LFM2": ({"model_type": "lfm2", "conv_L_cache": 3, "layer_types": ["conv", "full_attention"]}, "conv_L_cache"),
    "Llama-3.2-11B-Vision": (
        {"model_type": "mllama_text_model", "cross_attention_layers": [3, 8, 13]},
        "cross_attention_layers",
    ),
    "Mamba-Codestral": ({"model_type": "mamba2", "state_size": 128}, "state_size"),
    "MiMo-V2-Flash": (
        {"head_dim": 192, "v_head_dim": 128, "swa_head_dim": 192, "swa_num_key_value_heads": 8},
        "swa_head_dim",
    ),
    "MiniCPM3-4B": (LATENT | {"model_type": "minicpm3"}, "model_type"),
    "MiniCPM4.1-8B": ({"sparse_config": {"kernel_size": 32, "block_size": 64}}, "sparse_config"),
    "MiniMax-M1": ({"model_type": "minimax_m1", "attn_type_list": [0] * 7 + [1]}, "attn_type_list"),
    "MiniMax-M3": ({"sparse_attention_config": {"use_sparse_attention": True}}, "sparse_attention_config"),
    "Nemotron-3-Nano": ({"hybrid_override_pattern": "MEMEM*EMEMEM*"}, "hybrid_override_pattern"),
    "Phi-4-mini-flash": ({"model_type": "phi4flash", "mb_per_layer": 2}, "mb_per_layer"),
    "PLaMo 2": ({"mamba_step": 2, "mamba_enabled": True}, "mamba_step"),
    "Qwen3-Next": ({"full_attention_interval": 4, "linear_num_key_heads": 16}, "full_attention_interval"),
    "Qwen3.5": ({"model_type": "qwen3_5_text", "layer_types": HYBRID}, "layer_types"),
    "Qwen3.5 without its layers' kinds": ({"model_type": "qwen3_5_text"}, "model_type"),
    "RecurrentGemma": ({"lru_width": 2560, "block_types": ["recurrent", "attention"]}, "lru_width"),
    "Ring-2.5": ({"model_type": "bailing_hybrid", "layer_group_size": 8}, "layer_group_size"),
    "RWKV-7": ({"model_type": "rwkv7", "num_key_value_heads": None}, "model_type"),
    "Step-3.5-Flash": (
        {"attention_other_setting": {"attention_type": "sliding_attention", "num_attention_groups": 4}},
        "attention_other_setting",
    ),
    "T5": ({"model_type": "t5", "is_encoder_decoder": True}, "is_encoder_decoder"),
    "Voxtral Realtime": ({"model_type": "voxtral_realtime", "text_config": PLAIN}, "model_type"),
    "Zamba2": ({"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 2}, "layers_block_type"),
    "a DFlash drafter": ({"speculators_config": {"algorithm": "eagle3"}}, "speculators_config"),
}


@pytest.mark.parametrize(("more", "key"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_keeps_something_else_is_refused_by_the_key_that_says_so(more, key):
    with pytest.raises(ConfigError, match=r"no size follows|must say it|expected") as caught:
        geometry_of("m", PLAIN | more)
    assert caught.value.key == key
    assert "\n" not in str(caught.value)
