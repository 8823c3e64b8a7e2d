"""The table of models in docs/transformers.md is what trying them gives."""

import re
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from adapters_models import tokens
from torch.ao.quantization import quantize_dynamic
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvtier.adapters.transformers import PrefixCache
from kvtier.errors import ConfigError

DOCUMENT = Path(__file__).parents[2] / "docs" / "transformers.md"
SMALL = {
    **dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id")),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head"), 4),
    "vocab_size": 300,
    "intermediate_size": 96,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOW = {"sliding_window": 40}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
BY_LENGTH = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}


def alike(*model_types, **overrides):
    return dict.fromkeys(model_types, overrides)


MODELS = {
    "full attention": {
        **alike("llama", "qwen2", "qwen3", "phi3", "gpt2", "olmo2", "glm4", "granite", "smollm3"),
        **alike("mixtral", "qwen3_moe", **EXPERTS, sliding_window=None),
    },
    "sliding windows": alike("mistral", "ministral3", **WINDOW),
    "sliding windows and full attention": {
        **alike("gemma2", "gemma3_text", "gemma4_text", "cohere2", "exaone4", **WINDOW),
        "gpt_oss": {**EXPERTS, **WINDOW},
    },
    "attention in chunks": {"llama4_text": {**EXPERTS, "attention_chunk_size": 40}},
    "multi-head latent attention": alike("deepseek_v2", "deepseek_v3", **LATENT),
    "attention to tokens that an index chooses": {"deepseek_v32": LATENT},
    "states: Mamba, linear attention, convolutions": {
        **alike("mamba", "falcon_h1", "recurrent_gemma", "bamba"),
        **alike("qwen3_next", "jamba", "minimax", **EXPERTS),
        "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    },
    "rotary embeddings that depend on the prompt's length": {"llama": BY_LENGTH},
    "encoder and decoder": alike("t5", "bart"),
    "linear layers that torch has quantized to int8": {"llama": {}},
}
QUANTIZED = "linear layers that torch has quantized to int8"


@pytest.fixture(autouse=True)
def _quiet():
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


def make(layers, model_type):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SMALL, **MODELS[layers][model_type]})
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config).eval()
    return quantize_dynamic(model, {torch.nn.Linear}) if layers == QUANTIZED else model


def tried(layers, model_type):
    """Return what happens to a model of random weights: "restored", or the words of its refusal."""
    model, prompt = make(layers, model_type), tokens(100)
    try:
        cache = PrefixCache(model, {"cpu_bytes_to_use": "32MiB", "prefill_rate": 1.0})
    except ConfigError as refusal:
        return "refused: " + str(refusal).partition(": ")[2]
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
    with cache:
        answers = [cache.generate(prompt, max_new_tokens=6, do_sample=False) for _ in range(2)]
    assert [answer.restored_tokens for answer in answers] == [0, 96]
    assert all(torch.equal(answer.output, expected) for answer in answers)
    return "restored"


@pytest.mark.filterwarnings("ignore")  # of torch's quantization, which has a successor outside of torch
@pytest.mark.parametrize(("layers", "model_type"), [(layers, name) for layers in MODELS for name in MODELS[layers]])
def test_a_model_is_restored_or_refused_as_the_guide_says(layers, model_type):
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", DOCUMENT.read_text(), re.M)
    said = {(row, name): result for row, names, result in rows for name in re.findall(r"`(\w+)`", names)}
    result = tried(layers, model_type)
    assert result.startswith(said[layers, model_type]), f"{layers} | {model_type} | {result}"


def test_the_guide_names_no_other_models():
    table = DOCUMENT.read_text().partition("## Which models")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (?:.+?) \|$", table, re.M)
    assert {row: set(re.findall(r"`(\w+)`", names)) for row, names in rows if "`" in names} == {
        layers: set(models) for layers, models in MODELS.items()
    }
