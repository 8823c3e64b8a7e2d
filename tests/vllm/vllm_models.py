"""Small random models, saved as safetensors: their output depends on every token before."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCABULARY = 512


def llama_config(**changes):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes


GEMMA_CHANGES = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 32,
    "sliding_window": 256,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_local_base_freq": 10000.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "tie_word_embeddings": True,
}


def save_gemma(folder: Path, seed: int = 0) -> Path:
    """Write a model of Gemma 3's shape: every second layer sees a window of 256 tokens only."""
    config = llama_config(**GEMMA_CHANGES)
    weights = random_weights(config, seed)
    del weights["lm_head.weight"]
    for name in list(weights):
        if name.endswith("norm.weight"):
            weights[name] = torch.zeros_like(weights[name])  # Gemma's norms scale by one plus the weight
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm"):
            weights[f"{layer}.{name}.weight"] = torch.zeros(config["hidden_size"])
        for name in ("q_norm", "k_norm"):
            weights[f"{layer}.self_attn.{name}.weight"] = torch.zeros(config["head_dim"])
    return save(folder, config, weights)


def save_llama(folder: Path, seed: int = 0, **changes) -> Path:
    """Write a llama of random weights, large enough for attention to matter."""
    config = llama_config(**changes)
    return save(folder, config, random_weights(config, seed))


MLA_CHANGES = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 64,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 2,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "head_dim": 64,
}

MAMBA_CONFIG = {
    "architectures": ["Mamba2ForCausalLM"],
    "model_type": "mamba2",
    "hidden_size": 64,
    "state_size": 16,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 16,
    "expand": 2,
    "n_groups": 1,
    "conv_kernel": 4,
    "chunk_size": 128,
    "vocab_size": VOCABULARY,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save_config(folder: Path, config) -> Path:
    """Write a model without weights, for the load format "dummy"."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_weights(config, seed):
    """Return the weights that llama and its relatives have."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator) * (2.0 / shape[-1] ** 0.5)

    weights = {
        "model.embed_tokens.weight": torch.randn((VOCABULARY, hidden), generator=generator),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": random(VOCABULARY, hidden),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        weights |= {
            f"{layer}.self_attn.q_proj.weight": random(config["num_attention_heads"] * head, hidden),
            f"{layer}.self_attn.k_proj.weight": random(config["num_key_value_heads"] * head, hidden),
            f"{layer}.self_attn.v_proj.weight": random(config["num_key_value_heads"] * head, hidden),
            f"{layer}.self_attn.o_proj.weight": random(hidden, config["num_attention_heads"] * head),
            f"{layer}.mlp.gate_proj.weight": random(inner, hidden),
            f"{layer}.mlp.up_proj.weight": random(inner, hidden),
            f"{layer}.mlp.down_proj.weight": random(hidden, inner),
            f"{layer}.input_layernorm.weight": torch.ones(hidden),
            f"{layer}.post_attention_layernorm.weight": torch.ones(hidden),
        }
    return weights


def save(folder, config, weights):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def save_adapter(folder: Path, seed: int, rank: int = 8, scale: float = 0.5, **changes) -> Path:
    """Write a LoRA adapter of random weights for `save_llama`'s model, as PEFT writes them."""
    config = llama_config(**changes)
    hidden, head = config["hidden_size"], config["head_dim"]
    wide, narrow = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {
        "q_proj": (wide, hidden),
        "k_proj": (narrow, hidden),
        "v_proj": (narrow, hidden),
        "o_proj": (hidden, wide),
    }
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for index in range(config["num_hidden_layers"]):
        for name, (outputs, inputs) in shapes.items():
            layer = f"base_model.model.model.layers.{index}.self_attn.{name}"
            weights[f"{layer}.lora_A.weight"] = torch.randn((rank, inputs), generator=generator) / inputs**0.5
            weights[f"{layer}.lora_B.weight"] = torch.randn((outputs, rank), generator=generator) * scale
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(shapes), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def save_deepseek(folder: Path, seed: int = 0) -> Path:
    """Write a model with MLA: each layer caches one latent vector per token, the same on all tensor-parallel ranks."""
    shape = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
    config = llama_config(
        architectures=["DeepseekV2ForCausalLM"],
        model_type="deepseek_v2",
        q_lora_rank=None,
        num_key_value_heads=4,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_shared_experts=1,
        moe_intermediate_size=64,
        first_k_dense_replace=2,
        **shape,
    )
    del config["head_dim"]
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    latent, rope, nope, value = shape.values()
    weights = random_weights(config | {"head_dim": nope + rope}, seed)
    generator = torch.Generator().manual_seed(seed + 1)

    def random(*size):
        return torch.randn(size, generator=generator) * (2.0 / size[-1] ** 0.5)

    for index in range(config["num_hidden_layers"]):
        attention = f"model.layers.{index}.self_attn"
        for name in ("k_proj", "v_proj"):
            del weights[f"{attention}.{name}.weight"]
        weights[f"{attention}.kv_a_proj_with_mqa.weight"] = random(latent + rope, hidden)
        weights[f"{attention}.kv_a_layernorm.weight"] = torch.ones(latent)
        weights[f"{attention}.kv_b_proj.weight"] = random(heads * (nope + value), latent)
        weights[f"{attention}.o_proj.weight"] = random(hidden, heads * value)
    return save(folder, config, weights)


SOUND = {510: "<|audio_bos|>", 511: "<|AUDIO|>", 509: "<|audio_eos|>"}
"""What stands for a sound in a prompt for `save_audio_model`, in this order: the tokens' ids and names."""


def save_audio_model(folder: Path) -> Path:
    """Write a model of Qwen2-Audio's shape without weights, with all that vLLM needs to take sounds in prompts."""
    from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

    text = llama_config(architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    audio = {
        "model_type": "qwen2_audio_encoder",
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "num_mel_bins": 80,
        "max_source_positions": 1500,
    }
    config = {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "audio_token_index": 511,
        "torch_dtype": "float32",
        "text_config": text,
        "audio_config": audio,
    }
    Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer_with(SOUND)).save_pretrained(folder)
    return save_config(folder, config)


def save_whisper(folder: Path) -> Path:
    """Write a model of Whisper's shape, an encoder and a decoder, without weights."""
    from transformers import WhisperFeatureExtractor

    config = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "vocab_size": VOCABULARY,
        "num_mel_bins": 80,
        "d_model": 64,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_source_positions": 1500,
        "max_target_positions": 448,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "decoder_start_token_id": 511,
        "torch_dtype": "float32",
    }
    tokenizer_with({511: "<|startoftranscript|>"}).save_pretrained(folder)
    WhisperFeatureExtractor(chunk_length=2).save_pretrained(folder)
    return save_config(folder, config)


def tokenizer_with(special: dict[int, str]):
    """Return a tokenizer of VOCABULARY words, of which some are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ends = {0: "<unk>", 1: "<s>", 2: "</s>"}
    words = {(ends | special).get(index, f"word{index}"): index for index in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        additional_special_tokens=list(special.values()),
    )
