"""What a number of the cache takes: vLLM's words, and checkpoints with a cache of their own format."""

import pytest

from kvtier.errors import ConfigError
from kvtier.simulator.geometry import geometry_of

PLAIN = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
LATENT = PLAIN | {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
SPARSE = LATENT | {"model_type": "deepseek_v32", "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048}
VECTORS = 32 * 2 * 8


def token_bytes(config, kv_dtype="auto"):
    return geometry_of("m", config, kv_dtype).token_bytes


@pytest.mark.parametrize(
    ("word", "vector"),
    [
        ("auto", 256),
        ("bfloat16", 256),
        ("float16", 256),
        ("half", 256),
        ("float32", 512),
        ("fp8", 128),
        ("fp8_e4m3", 128),
        ("fp8_e5m2", 128),
        ("fp8_inc", 128),
        ("int8", 128),
        ("float8_e4m3fn", 128),
        ("fp8_per_token_head", 132),
        ("int8_per_token_head", 132),
        ("int4_per_token_head", 68),
        ("nvfp4", 72),
        ("nvfp4_4over6", 72),
    ],
)
def test_vllm_words_for_a_head_of_128(word, vector):
    assert token_bytes(PLAIN, word) == VECTORS * vector


@pytest.mark.parametrize(
    ("said", "element"),
    [
        ({}, 2),
        ({"torch_dtype": None}, 2),
        ({"torch_dtype": "auto"}, 2),
        ({"dtype": "auto"}, 2),
        ({"dtype": "float16"}, 2),
        ({"torch_dtype": "torch.bfloat16"}, 2),
        ({"torch_dtype": "float32"}, 2),  # vLLM serves it in 16 bits
    ],
)
def test_auto_is_what_vllm_makes_of_the_model(said, element):
    assert token_bytes(PLAIN | said) == VECTORS * 128 * element


def test_a_word_that_is_not_known_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"one of auto, .*fp8_e4m3") as caught:
        token_bytes(PLAIN, "turboquant_k8v4")
    assert caught.value.key == "kv_dtype"
    with pytest.raises(ConfigError, match=r"for latent attention .* fp8 does"):
        token_bytes(PLAIN, "fp8_ds_mla")


@pytest.mark.parametrize(
    ("config", "word", "layer"),
    [
        (LATENT, "auto", 1152),
        (LATENT, "fp8", 576),
        (LATENT, "fp8_ds_mla", 656),
        (SPARSE, "auto", 1152 + 132),
        (SPARSE, "fp8", 656 + 132),
        (SPARSE, "fp8_e4m3", 656 + 132),
        (SPARSE, "fp8_ds_mla", 656 + 132),
    ],
)
def test_latent_vectors_and_the_indexer_beside_them(config, word, layer):
    assert token_bytes(config, word) == 61 * layer


FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


@pytest.mark.parametrize(
    ("quantization", "vector"),
    [
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": FLOAT8}, 128),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": None, "config_groups": {}}, 256),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, 128),
        ({"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "FP8"}}, 128),
        ({"quant_method": "modelopt", "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}, 128),
        ({"quant_method": "modelopt_fp4", "kv_cache_quant_algo": "NVFP4"}, 72),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": "NONE"}, 256),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": None}, 256),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 256),
        ({"quant_method": "awq", "bits": 4}, 256),
        ({"quant_method": "quark", "export": {"kv_cache_group": []}}, 256),
        ({}, 256),
    ],
)
@pytest.mark.parametrize("place", ["quantization_config", "compression_config"])
def test_a_checkpoint_says_how_its_cache_is_kept(quantization, vector, place):
    assert token_bytes(PLAIN | {place: quantization}) == VECTORS * vector
    assert token_bytes({place: quantization, "text_config": PLAIN}) == VECTORS * vector
    assert token_bytes(PLAIN | {place: quantization}, "bfloat16") == VECTORS * 256


@pytest.mark.parametrize(
    ("quantization", "key"),
    [
        ({"kv_cache_scheme": {"num_bits": 4, "type": "float"}}, "kv_cache_scheme"),
        ({"kv_cache_quant_algo": "INT8"}, "kv_cache_quant_algo"),
        ({"quant_method": "quark", "export": {"kv_cache_group": ["*k_proj", "*v_proj"]}}, "kv_cache_group"),
        ({"kv_bits": 4}, "kv_bits"),
        ("fp8", "quantization_config"),
    ],
)
def test_a_format_of_the_cache_that_is_not_known_is_refused_until_it_is_said(quantization, key):
    config = PLAIN | {"quantization_config": quantization}
    with pytest.raises(ConfigError) as caught:
        token_bytes(config)
    assert caught.value.key == key
    assert token_bytes(config, "fp8") == VECTORS * 128
