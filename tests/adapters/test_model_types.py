"""Sizes by configuration, against the classes and the models of every causal type that transformers has."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from kvtier.errors import ConfigError
from kvtier.simulator.geometry import geometry_of
from kvtier.simulator.model_types import CLASS_DEFAULTS

NUM_LAYERS, NUM_TOKENS = 4, 7
NOT_RUN = (RuntimeError, TypeError, AttributeError, NotImplementedError, KeyError, ImportError, ValueError)


def small_config(model_type):
    """Return a type's default configuration with few layers; as it is, where its class takes no number of layers."""
    try:
        return CONFIG_MAPPING[model_type](num_hidden_layers=NUM_LAYERS)
    except Exception:  # noqa: BLE001 - each class has errors of its own
        return CONFIG_MAPPING[model_type]()


def kept_numbers(config):
    """Return how many numbers a token leaves in the cache of a model without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()
        output = model(input_ids=torch.zeros(1, NUM_TOKENS, dtype=torch.long), use_cache=True)
    layers = output.past_key_values.layers
    return sum(layer.keys.numel() + layer.values.numel() for layer in layers if layer.is_initialized) / NUM_TOKENS


@pytest.fixture(autouse=True)
def _quiet():
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


def test_every_causal_type_is_sized_as_its_model_keeps_it_or_refused_by_a_key_of_its_own():
    sized, refused, wrong = [], {}, {}
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            config = small_config(model_type)
        except Exception:  # noqa: BLE001 - gemma4_assistant has no valid default
            continue
        values = config.to_dict()
        try:
            geometry = geometry_of(model_type, values)
        except ConfigError as error:
            refused[model_type] = error.key in str(values)
            continue
        try:
            numbers = kept_numbers(config)
        except NOT_RUN:
            continue
        sized.append(model_type)
        ours = sum(layer.vectors * layer.width for layer in geometry.layers)  # indexes are the engine's own
        if ours != numbers:
            wrong[model_type] = (ours, numbers)
    assert not wrong
    assert len(sized) >= 60
    assert len(refused) >= 30
    assert all(refused.values()), refused


def test_keys_that_a_config_leaves_out_have_the_defaults_of_its_class():
    wrong = {}
    for outer_type in {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}:
        try:
            config = CONFIG_MAPPING[outer_type]().get_text_config(decoder=True)
            geometry = geometry_of(outer_type, config.to_dict())
        except Exception:  # noqa: BLE001 - refused, or no valid default
            continue
        names = {key: config.attribute_map.get(key, key) for key in ("num_key_value_heads", "head_dim")}
        theirs = {key: getattr(type(config), name, None) for key, name in names.items()}
        expected = {key: value for key, value in theirs.items() if isinstance(value, int)}
        ours = CLASS_DEFAULTS.get(config.model_type, {})
        if geometry.kind != "MLA" and ours != expected:
            wrong[config.model_type] = (ours, expected)
    assert not wrong
    assert not [model_type for model_type in CLASS_DEFAULTS if model_type not in CONFIG_MAPPING]
