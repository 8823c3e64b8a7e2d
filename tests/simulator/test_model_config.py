"""Reading `config.json`: which keys are harmless, which are refused, and where the language model stands."""

import json

import pytest

from kvtier.errors import ConfigError
from kvtier.simulator.geometry import find_geometry, geometry_of
from kvtier.simulator.layer_shapes import READ
from kvtier.simulator.model_keys import TEXT_CONFIGS

PLAIN = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
LATENT = PLAIN | {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
KIB_128 = 128 * 1024


@pytest.mark.parametrize(
    "more",
    [
        {"kv_share_factor": 2},
        {"cross_layer_kv_sharing": 4},
        {"num_shared_kv_groups": 2},
        {"kv_reuse_layers": [1, 3]},
        {"yoco_start": 16},
        {"num_memory_slots": 16},
        {"compressed_kv_dim": 64},
        {"kv_compression_ratio": 4},
        {"latent_size": 256},
        {"attention_pattern": "LLLG"},
        {"attn_layer_kinds": [0, 1]},
        {"recurrent_blocks": [1, 2]},
        {"local_num_kv_heads": 4},
        {"swa_head_dim": 64},
        {"global_num_heads": 4},
        {"head_dim_per_layer": [64, 128]},
        {"num_query_groups": 4},
        {"index_kpool": 16},
        {"nsa_settings": {"block_size": 64}},
        {"blocks": [{"attention": "gqa"}, {"attention": "none"}]},
        {"stages": [{"num_layers": 2}, {"num_layers": 30}]},
        {"mixer_types": ["attention", "mamba"]},
        {"delta_rule": True},
        {"loop_count": 2},
        {"retention_heads": 8},
        {"kv_evict_after": 1024},
        {"kv_cache_dtype": "fp8"},
        {"decoder_layers": 12},
    ],
    ids=lambda more: next(iter(more)),
)
def test_a_key_that_may_change_the_cache_is_refused_by_its_name(more):
    with pytest.raises(ConfigError, match="not known: no size follows") as caught:
        geometry_of("m", PLAIN | more)
    assert caught.value.key in more


@pytest.mark.parametrize(
    "more",
    [
        {"kv_share_factor": None, "num_kv_shared_layers": 0, "use_cla": False, "cla_share_factor": 2},
        {"mamba_enabled": False, "index_head_dim": None, "block_configs": None, "layer_types": None},
        {"num_nextn_predict_layers": 1, "mtp_num_layers": 1, "num_mtp_modules": 3},
        {"sliding_window": 4096, "max_window_layers": 28, "sliding_window_pattern": 6, "use_sliding_window": True},
        {"attention_bias": True, "attention_dropout": 0.1, "attn_logit_softcapping": 50.0, "_attn_implementation": "x"},
        {"unsloth_fixed": True, "cache_implementation": "hybrid", "use_cache": False, "pruned_heads": {}},
        {"rope_scaling": {"rope_type": "yarn", "attention_factor": 1.0}, "no_rope_layers": [1, 0]},
        {"tts_config": {"num_attention_heads": 12}, "visual": {"layers": 48}, "spatial_conv_size": 2},
        {"num_beam_groups": 1, "is_decoder": False, "add_cross_attention": False, "cross_attention_hidden_size": None},
        {"some_word": 7, "another": {"inside": [1, 2]}, "vision_config": {"num_hidden_layers": 24}},
        {
            "num_experts_per_tok": 8,
            "shared_expert_intermediate_size": 64,
            "moe_layer_freq": 1,
            "first_k_dense_replace": 3,
        },
    ],
)
def test_keys_that_say_nothing_of_the_cache_are_passed_over(more):
    assert geometry_of("m", PLAIN | {"head_dim": 128} | more).token_bytes == KIB_128


@pytest.mark.parametrize("name", TEXT_CONFIGS)
def test_the_language_model_is_found_where_models_of_several_modalities_have_it(name):
    around = {"vision_config": {"num_hidden_layers": 24, "num_attention_heads": 16}, "torch_dtype": "float32"}
    assert geometry_of("m", around | {name: PLAIN}).token_bytes == KIB_128
    assert geometry_of("m", {"thinker_config": {name: PLAIN} | around}).token_bytes == KIB_128


def test_keys_of_what_is_around_the_language_model_are_not_its_own():
    assert geometry_of("m", {"head_dim": 1280, "num_hidden_layers": 2, "text_config": PLAIN}).token_bytes == KIB_128


def test_two_language_models_or_none_are_refused():
    with pytest.raises(ConfigError, match="a second language model beside text_config") as caught:
        geometry_of("m", {"text_config": PLAIN, "llm_config": PLAIN})
    assert caught.value.key == "llm_config"
    with pytest.raises(ConfigError, match="looked for at the top and in text_config, llm_config, language_config"):
        geometry_of("m", {"brain_config": PLAIN})
    with pytest.raises(ConfigError, match="must say it, at its top or in one of text_config, llm_config"):
        geometry_of("m", {"vision_config": PLAIN})


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"num_layers": 28}, "num_layers"),
        ({"n_head_kv": 4}, "n_head_kv"),
        ({"head_dim": 64, "kv_channels": 128}, "kv_channels"),
        ({"v_head_dim": 64}, "v_head_dim"),
        ({"qk_nope_head_dim": 64}, "qk_nope_head_dim"),
        ({"layer_types": ["indexed_attention"]}, "layer_types"),
        ({"attention_k_eq_v": True}, "layer_types"),
        ({"global_head_dim": 512, "layer_types": ["full_attention"] * 31}, "layer_types"),
        ({"num_kv_shared_layers": 32}, "num_kv_shared_layers"),
        ({"num_kv_shared_layers": "15"}, "num_kv_shared_layers"),
        ({"attn_config": 5}, "attn_config"),
        ({"attn_config": {"attn_type": "linear"}}, "attn_type"),
        ({"attn_config": {"kv_n_heads": 4, "reuse_kv_layer_idx": 3}}, "reuse_kv_layer_idx"),
        ({"block_configs": [{}]}, "block_configs"),
        ({"block_configs": "x"}, "block_configs"),
        ({"block_configs": [{"attention": {"no_op": True}}] * 32}, "block_configs"),
        ({"block_configs": [{"attention": {"n_heads_in_group": 0}}] * 32}, "block_configs"),
        ({"block_configs": [{"attention": {"window_length": 8}}] * 32}, "block_configs.attention.window_length"),
        ({"block_configs": [{"block_type": "mamba"}] * 32}, "block_configs"),
        (LATENT | {"index_head_dim": 128, "model_type": "axk2"}, "index_head_dim"),
        (LATENT | {"attention_method": "GQA"}, "attention_method"),
    ],
)
def test_contradicting_or_incomplete_configurations_are_refused(more, key):
    with pytest.raises(ConfigError) as caught:
        geometry_of("m", PLAIN | more)
    assert caught.value.key == key


def test_names_and_values_of_a_file_stay_on_one_short_line():
    with pytest.raises(ConfigError) as caught:
        geometry_of("m", PLAIN | {"kv\x1b[2J\nkvtier: all is well": "y\n" * 10_000})
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 300


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\xff\xfe{}", "no readable config.json"),
        (b"[" * 100_000, "no readable config.json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no readable config.json"),
        (b'{"num_hidden_layers": 1e400}', "num_hidden_layers"),
        (b" " * (17 << 20), "no config.json is longer than 16 MiB"),
    ],
    ids=("utf-16", "deep", "digits", "infinite", "long"),
)
def test_a_file_that_is_no_config_is_one_line(tmp_path, content, complaint):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=complaint):
        find_geometry(str(path))


def test_a_quantization_in_a_file_beside_the_config_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PLAIN))
    assert find_geometry(str(tmp_path)).token_bytes == KIB_128
    quantization = {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
    }
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(quantization))
    assert find_geometry(str(tmp_path)).token_bytes == KIB_128 // 2
    assert find_geometry(str(tmp_path), "bfloat16").token_bytes == KIB_128


KEYS = sorted(READ | {*TEXT_CONFIGS, "model_type", "layer_types", "torch_dtype", "quantization_config", "use_cla"})
JUNK = (
    None,
    True,
    False,
    -1,
    0,
    1,
    7,
    1 << 40,
    0.5,
    float("nan"),
    "",
    "512",
    [],
    [0],
    [[]],
    {},
    {"attention": 1},
    [{}],
)


@pytest.mark.parametrize("base", [PLAIN, LATENT], ids=["plain", "latent"])
@pytest.mark.parametrize("key", KEYS)
def test_any_value_of_a_key_gives_a_size_or_one_error(base, key):
    for value in JUNK:
        try:
            size = geometry_of("m", base | {key: value}).token_bytes
        except ConfigError as error:
            complaint = str(error)
        else:
            complaint = "" if size > 0 else "no size"
        assert complaint.isprintable(), complaint
        assert complaint != "no size", value
