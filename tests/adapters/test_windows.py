"""Models whose layers see a window of tokens: what their cache forgets while they run is stored and restored."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from adapters_models import LOGITS, first_logits, tiers, tokens
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from kvtier.adapters.transformers import PrefixCache
from kvtier.errors import ConfigError

MEMORY_ONLY = {"cpu_bytes_to_use": "32MiB", "prefill_rate": 1.0}
SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


def gemma(window=40):
    torch.manual_seed(0)
    config = Gemma3TextConfig(**SMALL, num_hidden_layers=4, sliding_window=window, sliding_window_pattern=2)
    return Gemma3ForCausalLM(config).eval()


def gpt_oss(window=40):
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(**SMALL, **experts, num_hidden_layers=4, sliding_window=window)).eval()


def mistral(window=40):
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SMALL, num_hidden_layers=2, sliding_window=window)).eval()


@pytest.fixture(scope="module", params=[gemma, gpt_oss, mistral])
def make(request):
    return request.param


@pytest.mark.parametrize("window", [2, 32, 33, 1000])
def test_prompts_around_every_boundary(make, window):
    """Blocks of 32 tokens; windows shorter and longer than a block, a prompt and an answer."""
    model = make(window)
    with PrefixCache(model, MEMORY_ONLY) as cache:
        for length in (65, 150):
            prompt = tokens(length, seed=length)
            expected = model.generate(prompt, max_new_tokens=5)
            cold = cache.generate(prompt, max_new_tokens=5, **LOGITS)
            warm = cache.generate(prompt, max_new_tokens=5, **LOGITS)
            assert warm.restored_tokens == (length - 1) // 32 * 32
            assert torch.equal(first_logits(cold), first_logits(warm))
            assert torch.equal(cold.first_logits, first_logits(cold))
            assert torch.equal(warm.first_logits, first_logits(cold))
            assert torch.equal(cold.sequences, expected)
            assert torch.equal(warm.sequences, expected)
        cache.manager.check_invariants()


def test_answers_and_follow_ups_from_memory_and_disk(make, tmp_path):
    model, prompt = make(), tokens(150)
    with PrefixCache(model, tiers(tmp_path)) as cache:
        first = cache.generate(prompt, max_new_tokens=50)
        follow_up = torch.cat([first.sequences, tokens(45, seed=2)], dim=1)
        expected = model.generate(follow_up, max_new_tokens=20)
        second = cache.generate(follow_up, max_new_tokens=20)
        assert second.sources == {"primary": 192}  # of 150 + 50 tokens
        assert torch.equal(second.sequences, expected)
        assert cache.flush()
        cache.forget_primary()
        from_disk = cache.generate(follow_up, max_new_tokens=20)
        assert from_disk.sources == {"disk": 224}
        assert torch.equal(from_disk.sequences, expected)
    with PrefixCache(make(), tiers(tmp_path)) as cache:
        assert cache.generate(follow_up, max_new_tokens=1).sources == {"disk": 224}


def test_a_window_of_another_length_shares_nothing(make, tmp_path):
    with PrefixCache(make(40), tiers(tmp_path)) as cache:
        cache.generate(tokens(100), max_new_tokens=1)
    with PrefixCache(make(41), tiers(tmp_path)) as cache:
        assert cache.generate(tokens(100), max_new_tokens=1).restored_tokens == 0


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}, {"prefill_chunk_size": 23}], ids=str)
def test_padded_batches(make, arguments):
    model = make()
    batch, mask = tokens(240, seed=4).reshape(2, 120), torch.ones(2, 120, dtype=torch.long)
    mask[0, :21] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, **arguments}
    expected = model.generate(batch, **settings)
    with PrefixCache(model, MEMORY_ONLY) as cache:
        answers = [cache.generate(batch, **settings) for _ in range(2)]
        assert [answer.restored_tokens for answer in answers] == [0, 75 + 96]
        assert all(torch.equal(answer.sequences, expected) for answer in answers)
        single = batch[0, 21:]
        assert cache.generate(single, max_new_tokens=4).restored_tokens == 96
        assert torch.equal(
            cache.generate(single, max_new_tokens=4).output, model.generate(single[None], max_new_tokens=4)
        )


def test_a_model_that_the_caller_runs(make):
    """In pieces, cropped in between as guesses are taken back: what is stored is what was computed last."""
    model, prompt, other = make(), tokens(150), tokens(150, seed=9)
    with PrefixCache(model, MEMORY_ONLY) as cache:
        with cache.request(prompt) as request, torch.no_grad():
            own = request.past_key_values
            model(input_ids=prompt[:, :70], past_key_values=own, use_cache=True)
            own.activate_past_recording()
            model(input_ids=other[:, 70:90], past_key_values=own, use_cache=True)
            own.crop(-20)
            model(input_ids=prompt[:, 70:], past_key_values=own, use_cache=True)
            assert request.store(prompt) == 4
        answer = cache.generate(prompt, max_new_tokens=20)
        assert answer.restored_tokens == 128
        assert torch.equal(answer.sequences, model.generate(prompt, max_new_tokens=20))


def test_a_cache_that_did_not_see_all_tokens_is_not_stored(make):
    model, prompt = make(), tokens(100)
    with PrefixCache(model, MEMORY_ONLY) as cache, cache.request(prompt) as request, torch.no_grad():
        request.past_key_values = DynamicCache(config=model.config)
        model(input_ids=prompt, past_key_values=request.past_key_values, use_cache=True)
        with pytest.raises(ConfigError, match="the request's own cache"):
            request.store(prompt)


def test_a_returned_cache_keeps_the_window_only(make):
    model, prompt = make(), tokens(150)
    settings = {"max_new_tokens": 5, "return_dict_in_generate": True}
    expected = model.generate(prompt, **settings).past_key_values
    with PrefixCache(model, MEMORY_ONLY) as cache:
        for _ in range(2):
            returned = cache.generate(prompt, **settings).past_key_values
            assert returned.get_seq_length() == expected.get_seq_length()
            for ours, theirs in zip(returned.layers, expected.layers, strict=True):
                assert type(ours) is type(theirs)
                assert torch.allclose(ours.keys, theirs.keys, atol=1e-5)
                assert torch.allclose(ours.values, theirs.values, atol=1e-5)
