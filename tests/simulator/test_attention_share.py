"""How much slower long prompts are computed, from what models' makers say of their shape."""

import math

import pytest

from kvtier.simulator.geometry import find_geometry, geometry_of
from kvtier.tiering.estimate import DOUBLING_TOKENS, PrefillSpeed

LLAMA = {
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 14336,
}
PROJECTIONS, MLP = 4096 * 128 * (2 * 32 + 2 * 8), 3 * 4096 * 14336


@pytest.mark.parametrize(
    ("config", "doubling"),
    [
        (LLAMA, (PROJECTIONS + MLP) / (2 * 32 * 128)),
        (LLAMA | {"num_experts_per_tok": 2}, (PROJECTIONS + 2 * MLP) / (2 * 32 * 128)),
        (LLAMA | {"layer_types": ["full_attention", "sliding_attention"] * 16}, (PROJECTIONS + MLP) / (32 * 128)),
        (LLAMA | {"layer_types": ["sliding_attention"] * 32}, math.inf),
        ({key: value for key, value in LLAMA.items() if key != "intermediate_size"}, DOUBLING_TOKENS),
    ],
)
def test_the_context_at_which_attention_is_half_of_the_work(config, doubling):
    assert geometry_of("m", config).doubling == pytest.approx(doubling)


@pytest.mark.parametrize(
    ("model", "active_billions", "matrices"),
    [
        ("Llama-3.1-8B", 8.03 - 2 * 128_256 * 4096 / 1e9, 32 * 2 * 4096),
        ("Llama-3.1-70B", 70.6 - 2 * 128_256 * 8192 / 1e9, 80 * 2 * 8192),
        ("Qwen3-32B", 31.2, 64 * 2 * 8192),  # its maker's figure without embeddings
        ("Qwen3-0.6B", 0.44, 28 * 2 * 2048),
        ("DeepSeek-V3", 37 - 2 * 129_280 * 7168 / 1e9, 61 * 128 * (192 + 128)),
    ],
)
def test_known_models_multiply_as_often_as_they_have_active_parameters(model, active_billions, matrices):
    assert find_geometry(model).doubling * matrices / 1e9 == pytest.approx(active_billions, rel=0.03)


def test_a_speed_goes_through_what_was_measured():
    for rate, doubling in ((12_000.0, 26_624.0), (500.0, 4000.0), (9000.0, math.inf)):
        told = PrefillSpeed(rate, doubling)
        found = PrefillSpeed.through([(tokens, tokens / told.seconds(0, tokens)) for tokens in (1000, 20_000, 100_000)])
        assert found.rate == pytest.approx(rate)
        assert found.seconds(0, 50_000) == pytest.approx(told.seconds(0, 50_000))
    with pytest.raises(ValueError, match="grows"):
        PrefillSpeed.through([(1000, 10.0), (2000, 20.0)])
