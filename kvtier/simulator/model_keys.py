"""Keys of a model's `config.json`: harmless ones, and ones that are refused.

The size of a cache follows from few keys. But an unknown key may mean that layers share a cache, compress it or have
none. So `layer_shapes` reads a key, or the key does not concern the cache, or its name contains a word that may concern
the cache and it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

TEXT_CONFIGS = (
    "text_config",
    "llm_config",
    "language_config",
    "thinker_config",
    "language_model_config",
    "lm_config",
    "llm",
    "llm_cfg",
    "language_model",
    "text_model",
)
"""Keys under which multimodal configurations nest their language model."""

LAYER_KINDS = ("layer_types", "layers_block_type")
"""Keys that list the kinds of layers."""

_CACHING = frozenset(("full_attention", "sliding_attention", "chunked_attention", "attention", "indexed_attention"))
ALLOWED_VALUES: Mapping[str, frozenset[object]] = {
    "layer_types": _CACHING,
    "layers_block_type": _CACHING,
    "attn_type_list": frozenset((1,)),
    "indexer_types": frozenset(("full",)),
    "attention_method": frozenset(("MLA",)),
}
"""Keys that are harmless only with these values, or with a list of them."""

STATE_KEYS = re.compile(
    r"full_attention_interval|attn_layer_(period|offset)|attn_layer_indices|layers_block_type|_?block_types"
    r"|hybrid_override_pattern|linear_attn_config|linear_(num|key|value|head|conv)_?\w*|ssm_\w+|mamba_\w+|use_mamba\w*"
    r"|conv_L_cache|lru_width|mb_per_layer|full_attn_(idxs|alpha_factor)|layer_group_size|short_conv_kernel_size"
    r"|number_of_conv_states"
)
"""Keys of models that keep a state, in some layers or in addition to the cache of each layer."""

SUSPECT = re.compile(
    r"(?<!q)kv|key_value|cache|attn|attention|heads|head_(dim|size|width|num)|(^|_)(d|dim|kv|n|num)_head|layer|block"
    r"|window|sparse|latent|rank|^index|group|share|reuse|cross|mamba|ssm|state|recur|linear|conv|memor|compress|pattern"
    r"|hybrid|delta|period|interval|every|loop|cycle|depth|chunk|local|global|swa|mla|mixer|retention|retain|encoder"
    r"|decoder|speculat|yoco|cla(_|$)|mqa|gqa|mha|evict"
)
"""Parts of names of keys that may change what a layer keeps per token."""

HARMLESS = re.compile(
    "|".join(
        (
            # normalization, dropout, activation, initialization, biases, scales
            r"\w*layer_?norm\w*|\w*normalization_layer\w*|\w*_norm(_\w+)?|use_\w*norm|\w*init\w*|\w*_(bias|act|eps|epsilon)",
            r"\w*dropout\w*|\w*(layer|path)_?drop\w*|\w*_(pdrop|drop_rate)|add_bias_linear|skip_bias_add\w*",
            r"\w*_(multipliers?|softcap|softcapping|scalar|loss_coef|implementation|implementation_autoset)|\w*layer_scal\w*",
            r"(attention|attn)_(scale|scaling|softmax\w*|logit\w*|invalid_logits_value|temperature\w*|value_scale|sink\w*)",
            r"scale_(attn|attention|emb|depth)\w*|reorder_and_upcast_attn|apply_residual_connection_post_layernorm",
            r"\w*(attn|attention|mla)\w*_gate(_\w+)?|(attention|attn)_(output_)?gate\w*|mla_(scale|use)_\w+|param_sink\w*",
            r"\w*flash_?attn\w*|use_flash_attention\w*|attn_(impl|uses_sequence_id)|parallel_attn\w*|use_parallel_\w+",
            # windows: a layer with a window keeps as much per token as other layers
            r"_?sliding_window\w*|prefix_dense_sliding_window_pattern|use_sliding_window|max_window_layers|(keep_)?window_size",
            r"attention_chunk_size|global_attn_every_n_layers|full_attn_mod|layer_switch|order_of_interleaved_layers",
            r"local_attention|(global|local)_rope\w*|rope_local_\w+|use_bidirectional_attention",
            # positions
            r"rope_\w+|\w*rope_theta\w*|rotary\w*|no_rope_layers?\w*|nope_layer_interval|use_rope_layers|indexer_rope_\w+",
            # query heads, which have no cache, and other widths of latent attention
            r"num_attention_heads_per_layer|share_q_dim|num_gqa_groups|q_lora_rank|index_n_heads|index_topk",
            # experts and feed-forward
            r"\w*expert\w*|\w*moe_\w+|\w*router\w*|n_group|\w*topk_?\w*|mlp_\w+|ffn_\w+|\w*_ffn_dim|decoder_sparse_step|hc_\w+",
            r"first_k_dense_replace|interleave_moe_layer_step|num_dense_layers|\w*intermediate_size\w*|\w*activation\w*",
            r"block_(multiple_of|ffn_dim_multiplier|auto_adjust_ff_dim)|(hidden|vocab)_size_per_layer_input|laurel_rank",
            # multi-token prediction: its layers run only with speculative decoding
            r"(num_)?(mtp|nextn)_\w+|num_nextn_predict_layers|use_mtp\w*|keep_mtp\w*",
            # heads that are not of attention, other modalities, vocabulary, training
            r"lm_head\w*|\w*classifier\w*|pooler\w*|\w*_token_(id|ids|index)|tie_\w+|share_\w*embedding\w*|use_embedding_sharing",
            r"\w*(image|video|audio|vision|visual|speech)_\w+|(mm|im|vit|projector|embd)_\w+|select_layer|global_view_pos|visual",
            r"(tts|talker|code2wav|token2wav|codec|vit|vq|whisper|sound|perceiver|qformer|resampler|slice)_(config|cfg)",
            r"(spatial|temporal)_conv_size|use_temporal_conv|max_attn_value|use_logn_attn",
            r"share_input_output_layers|use_cache|cache_implementation|pre_allocate_kv_cache|output_hidden_states|output_attentions",
            r"is_decoder|chunk_size_feed_forward|num_beam_groups|encoder_no_repeat_ngram_size|for_llm_compressor|quantization_config|compression_config|generation_config|do_layer_norm_before",
            r"task_specific_params|auto_map|id2label|label2id|summary_\w+|unsloth\w*|decoder_start_token_id",
        )
    )
)
"""Whole names of keys that match `SUSPECT` but are harmless."""

MATTERS_ONLY_WITH: Mapping[str, str] = {
    "cla_share_factor": "use_cla",
    "multi_query_group_num": "multi_query_attention",
}
"""Keys that have no effect if the configuration switches the other key off."""
