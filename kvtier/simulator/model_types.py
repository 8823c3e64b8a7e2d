"""Facts about types of models that their configurations do not contain."""

from __future__ import annotations

from collections.abc import Mapping

STATE = "layers that keep a state instead of a cache a token are not understood"

REFUSED_TYPES: Mapping[str, frozenset[str]] = {
    reason: frozenset(types.split())
    for reason, types in {
        STATE: (
            "bailing_hybrid bailing_moe_linear bamba falcon_h1 falcon_mamba glm5_next_text granitemoehybrid jamba"
            " kimi_linear lfm2 lfm2_moe lfm3 mamba mamba2 minimax minimax_m1 minimax_text_01 nemotron_h"
            " nemotron_h_puzzle olmo_hybrid phi4flash plamo2 qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp_text"
            " recurrent_gemma rwkv rwkv5 rwkv6 rwkv7 xlstm zamba zamba2 zaya"
        ),
        "encoders and cross-attention are not understood": (
            "albert bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert"
            " data2vec-text deberta deberta-v2 distilbert electra ernie esm led longt5 m2m_100 marian mbart"
            " megatron-bert mllama mllama_text_model modernbert mpnet mt5 mvp new nllb-moe nomic_bert pegasus"
            " prophetnet reformer rembert roberta roberta-prelayernorm roc_bert roformer switch_transformers t5 t5gemma"
            " t5gemma2 t5gemma2_decoder trocr umt5 voxtral_realtime whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod"
        ),
        "its latent vector is spread into keys and values before they are kept": "minicpm3 plm",
        "it drafts for another model": "eagle eagle3 medusa mlp_speculator speculator",
        "it runs its layers several times": "hrm_text iquestloopcoder",
    }.items()
}
"""Refused types of models, by reason. Those with `STATE` are accepted if all layers are listed as attention."""

_GROUPS: Mapping[tuple[int | None, int | None], str] = {
    (2, None): "glm4v_text glm_image_text starcoder2",
    (2, 128): "ernie4_5 glm glm4 internlm3 muse_glimmer_text paddleocr_vl_text",
    (2, 256): "gemma3n_text",
    (4, None): (
        "ernie4_5_moe ernie4_5_vl_moe_text granite_docling_text granite_swa qwen2_5_omni_text qwen3_moe"
        " qwen3_omni_moe_text smollm3"
    ),
    (4, 128): "flint kolibri1 mellum",
    (4, 256): "diffusion_gemma_text gemma2 gemma3_text gemma4_text gemma4_unified_text vaultgemma",
    (5, None): "bitnet",
    (8, None): (
        "emu3_text_model glm4_moe glm4v_moe_text glm_ocr_text lfm2 ministral mistral mixtral phi4_multimodal phimoe"
        " qwen2_5_vl_text qwen2_vl_text"
    ),
    (8, 64): "gpt_oss",
    (8, 128): (
        "beam cosmos3_edge_text cwm hy_v3 iquestcoder laguna llama4_text minimax_m2 ministral3 molmo2_text seed_oss"
        " solar_open"
    ),
    (16, None): "qwen2_moe qwen3_vl_moe_text",
    (16, 64): "muse_spark_text",
    (16, 128): "jetmoe",
    (16, 256): "gemma",
    (20, 128): "helium",
    (32, None): "chameleon dots1 exaone4 exaone_moe qwen2 stablelm",
    (32, 128): "qwen3 qwen3_vl_text",
    (None, 128): "afmoe cohere2_moe",
}

CLASS_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    model_type: {
        key: value for key, value in (("num_key_value_heads", heads), ("head_dim", width)) if value is not None
    }
    for (heads, width), types in _GROUPS.items()
    for model_type in types.split()
}
"""Defaults of a type's class in transformers, for keys that `config.json` leaves out.

Other types have as many KV heads as query heads, and hidden size / heads as the width of a head.
"""

NEEDED: Mapping[str, str] = {
    "gemma3n_text": "num_kv_shared_layers",
    "gemma4_text": "global_head_dim",
    "gemma4_unified_text": "global_head_dim",
    "diffusion_gemma_text": "global_head_dim",
}
"""Keys that a type must have, since its class's default differs from that of other types."""
