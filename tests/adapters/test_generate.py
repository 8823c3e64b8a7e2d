"""`PrefixCache.generate` gives the tokens that `model.generate` gives, from restored prefixes, however it is called."""

import copy
import logging

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from adapters_models import tiny_llama, tokens
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from kvtier.adapters.transformers import PrefixCache
from kvtier.errors import ConfigError

MEMORY_ONLY = {"cpu_bytes_to_use": "32MiB", "prefill_rate": 1.0}
PROMPT = tokens(100)
BATCH = tokens(300, seed=4).reshape(3, 100)
PADDED = torch.ones_like(BATCH)
PADDED[0, :41] = 0
PADDED[1, :5] = 0


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture
def cache(model):
    with PrefixCache(model, MEMORY_ONLY) as cache:
        yield cache
        cache.manager.check_invariants()


def plain(model, *prompt, **arguments):
    torch.manual_seed(7)
    return model.generate(*prompt, **arguments)


def both(cache, prompt, **arguments):
    """Answer twice, check each answer against transformers alone, and return them."""
    expected = plain(cache.model, prompt, **arguments)
    answers = []
    for _ in range(2):
        torch.manual_seed(7)
        answers.append(cache.generate(prompt, **arguments))
        assert torch.equal(answers[-1].sequences, getattr(expected, "sequences", expected))
    return answers


class Forbid(LogitsProcessor):
    """Forbids every token that the whole sequence, restored part included, has had."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids, float("-inf"))


class StopAfterThree(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length + 3)


SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95}
WAYS = {
    "greedily": {},
    "sampled": SAMPLING,
    "by a generation config": {"generation_config": GenerationConfig(max_new_tokens=6, **SAMPLING)},
    "to a length": {"max_length": 107},
    "with an end token": {"eos_token_id": list(range(0, 300, 3)), "pad_token_id": 299},
    "with a stopping criterion": {"stopping_criteria": StoppingCriteriaList([StopAfterThree(100)])},
    "with a processor": {"logits_processor": LogitsProcessorList([Forbid()])},
    "with a penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "with allowed tokens": {"prefix_allowed_tokens_fn": lambda row, ids: [int(ids[-1]) % 50, 60, 61]},
    "with guidance": {"guidance_scale": 1.5, "negative_prompt_ids": tokens(20, seed=3)},
    "with a mask of ones": {"attention_mask": torch.ones_like(PROMPT)},
    "with default positions": {"position_ids": torch.arange(100)[None]},
    "in pieces": {"prefill_chunk_size": 7},
    "three answers": {"num_return_sequences": 3, **SAMPLING},
    "by beams": {"num_beams": 3},
    "by sampled beams": {"num_beams": 2, "num_return_sequences": 2, **SAMPLING},
}


@pytest.mark.parametrize("arguments", WAYS.values(), ids=WAYS)
def test_a_restored_prefix_changes_no_token(cache, arguments):
    lengths = {} if {"generation_config", "max_length"} & arguments.keys() else {"max_new_tokens": 6}
    cold, warm = both(cache, PROMPT, **lengths, **arguments)
    assert (cold.restored_tokens, warm.restored_tokens) == (0, 96)
    assert warm.sources == {"primary": 96}
    assert not cache.calls_without


def test_settings_of_the_model_are_used(model):
    sampling = copy.copy(model)
    sampling.generation_config = GenerationConfig(max_new_tokens=6, **SAMPLING)
    with PrefixCache(sampling, MEMORY_ONLY) as cache:
        assert both(cache, PROMPT)[1].restored_tokens == 96
        sampling.generation_config.use_cache = False
        assert both(cache, PROMPT)[1].ran_without == "use_cache is False"


def test_the_answer_is_what_generate_returns(cache, model):
    as_tensor = cache.generate(PROMPT, max_new_tokens=5)
    expected = plain(model, PROMPT, max_new_tokens=5)
    assert torch.equal(as_tensor.output, expected)
    assert torch.equal(as_tensor[0], expected[0])
    assert torch.equal(next(iter(as_tensor)), expected[0])
    assert (len(as_tensor), as_tensor.shape) == (1, expected.shape)
    asked = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    as_dict = cache.generate(PROMPT, **asked)
    expected = plain(model, PROMPT, **asked)
    assert type(as_dict.output) is type(expected)
    assert len(as_dict.scores) == len(as_dict.logits) == 5
    assert torch.allclose(as_dict.logits[0], expected.logits[0], atol=1e-5)
    assert as_dict.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length() == 104


def test_a_streamer_gets_what_it_gets_without_kvtier(cache, model):
    class Kept(BaseStreamer):
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got.append(value.tolist())

        def end(self):
            self.ended = True

    expected = Kept()
    plain(model, PROMPT, max_new_tokens=5, streamer=expected)
    for _ in range(2):
        streamer = Kept()
        cache.generate(PROMPT, max_new_tokens=5, streamer=streamer)
        assert streamer.ended
        assert streamer.got == expected.got


# -- several rows -----------------------------------------------------------------------------------------


def test_each_row_of_a_batch_restores_its_own_prefix(cache):
    for row, padding in zip(BATCH, (PADDED == 0).sum(dim=1), strict=True):
        cache.generate(row[padding:], max_new_tokens=1)
    expected = plain(cache.model, BATCH, attention_mask=PADDED, max_new_tokens=6)
    answer = cache.generate(BATCH, attention_mask=PADDED, max_new_tokens=6)
    assert torch.equal(answer.sequences, expected)
    # All rows go on from the column where the first of them needs computing: 41 + 32 tokens, 5 + 64, 96.
    assert answer.restored_tokens == (69 - 41) + (69 - 5) + 69


@pytest.mark.parametrize(
    "arguments",
    [{}, SAMPLING, {"num_beams": 2}, {"num_return_sequences": 2, **SAMPLING}, {"eos_token_id": list(range(0, 300, 7))}],
    ids=["greedily", "sampled", "by beams", "two answers", "with end tokens"],
)
def test_batches(cache, arguments):
    settings = {"max_new_tokens": 30, "pad_token_id": 299, **arguments}
    cold, warm = both(cache, BATCH, attention_mask=PADDED, **settings)
    assert cold.restored_tokens == 0
    assert warm.restored_tokens == (69 - 41) + (69 - 5) + 69
    whole = both(cache, BATCH, **settings)
    assert whole[1].restored_tokens == 3 * 96
    for row, answer in zip(BATCH, whole[0].sequences[:: len(whole[0].sequences) // 3], strict=True):
        assert cache.generate(row, max_new_tokens=1).restored_tokens == 96
        follow_up = torch.cat([answer, tokens(1)[0]])
        assert torch.equal(
            cache.generate(follow_up, max_new_tokens=4).output, plain(cache.model, follow_up[None], max_new_tokens=4)
        )


def test_padding_that_transformers_finds_by_itself(cache):
    prompt = PROMPT.clone()
    prompt[prompt == 299] = 298
    prompt[:, :20] = 299
    cold, warm = both(cache, prompt, max_new_tokens=6, pad_token_id=299)
    assert (cold.restored_tokens, warm.restored_tokens) == (0, 64)
    assert cache.generate(prompt[:, 20:], max_new_tokens=1).restored_tokens == 64


# -- calls that run without the cache ---------------------------------------------------------------------

HOLES = torch.ones_like(PROMPT)
HOLES[0, 30:40] = 0
WITHOUT = {
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "static"},
    "assisted": {"assistant_model": tiny_llama(seed=9)},
    "assisted by lookup": {"prompt_lookup_num_tokens": 3},
    "attention_mask with holes": {"attention_mask": HOLES},
    "attention_mask that hides the end": {"attention_mask": HOLES.roll(60, dims=1)},
    "position_ids": {"position_ids": torch.arange(5, 105)[None]},
    "attentions": {"output_hidden_states": True, "return_dict_in_generate": True},
    "inputs_embeds": {"inputs_embeds": torch.zeros(1, 100, 64)},
    "custom_generate": {"custom_generate": lambda model, input_ids, **_: torch.cat([input_ids, input_ids], dim=1)},
}


@pytest.mark.parametrize("arguments", WITHOUT.values(), ids=WITHOUT)
def test_what_cannot_go_on_from_a_prefix_runs_as_without_kvtier(cache, caplog, arguments):
    cache.generate(PROMPT, max_new_tokens=1)
    with caplog.at_level(logging.WARNING, "kvtier"):
        answers = both(cache, PROMPT, max_new_tokens=6, **arguments)
    (reason,) = {answer.ran_without for answer in answers}
    assert [answer.restored_tokens for answer in answers] == [0, 0]
    assert cache.calls_without == {reason: 2}
    assert [record.getMessage().count(reason) for record in caplog.records if reason in record.getMessage()] == [1]


def test_embeddings_alone(cache, model):
    embeddings = model.get_input_embeddings()(PROMPT).detach()
    expected = plain(model, inputs_embeds=embeddings, max_new_tokens=6)
    assert torch.equal(cache.generate(inputs_embeds=embeddings, max_new_tokens=6).output, expected)
    assert cache.generate(PROMPT, max_new_tokens=1).restored_tokens == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"temperatur": 0.7},
        {"pixel_values": torch.zeros(1, 3, 8, 8)},
        {"attention_mask": torch.ones(1, 1, 100, 100)},
        {"num_beams": 2, "num_return_sequences": 3},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_transformers_refuses_is_refused_in_its_words(cache, model, wrong):
    with pytest.raises(ValueError) as expected:
        model.generate(PROMPT, **wrong)
    with pytest.raises(ValueError) as error:
        cache.generate(PROMPT, **wrong)
    assert str(error.value) == str(expected.value)


def test_a_cache_of_the_callers_own_is_refused(cache):
    with pytest.raises(ConfigError, match="past_key_values"):
        cache.generate(PROMPT, past_key_values=DynamicCache())


def test_the_callers_criteria_stay_as_they_are(cache):
    criteria = StoppingCriteriaList([MaxLengthCriteria(104)])
    assert both(cache, PROMPT, stopping_criteria=criteria)[1].sequences.shape == (1, 104)
    assert len(criteria) == 1


# -- the first logits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", WAYS.values(), ids=WAYS)
def test_first_logits_are_raw_however_the_token_is_chosen(cache, model, arguments):
    expected = model(PROMPT).logits[0, -1]
    lengths = {} if {"generation_config", "max_length"} & arguments.keys() else {"max_new_tokens": 3}
    for _ in range(2):
        logits = cache.generate(PROMPT, **lengths, **arguments).first_logits
        assert (logits.shape, logits.dtype) == ((300,), torch.float32)
        assert torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}, {"num_return_sequences": 2, **SAMPLING}], ids=str)
def test_first_logits_of_each_row_of_a_batch(cache, model, arguments):
    alone = [model(row[None, padding:]).logits[0, -1] for row, padding in zip(BATCH, (41, 5, 0), strict=True)]
    for _ in range(2):
        settings = {"attention_mask": PADDED, "max_new_tokens": 3, "pad_token_id": 299, **arguments}
        logits = cache.generate(BATCH, **settings).first_logits
        assert torch.allclose(logits, torch.stack(alone), atol=1e-5)


def test_first_logits_are_those_that_transformers_returns(cache):
    asked = {"return_dict_in_generate": True, "output_logits": True}
    for _ in range(2):
        answer = cache.generate(PROMPT, max_new_tokens=3, **asked)
        assert torch.equal(answer.first_logits, answer.logits[0][0])


def test_first_logits_leave_the_model_as_it_is(cache, model):
    before, namespace = dict(vars(model)), cache.namespace
    seen = []
    hook = model.register_forward_hook(lambda module, inputs, output: seen.append(module))
    try:
        cache.generate(PROMPT, max_new_tokens=3)
    finally:
        hook.remove()
    assert seen
    assert all(module is model for module in seen)
    assert vars(model) == before
    assert cache.namespace == namespace
    assert cache.generate(PROMPT, use_cache=False, max_new_tokens=3).first_logits is None


def test_first_logits_of_a_compiled_model():
    model = tiny_llama()
    expected = model(PROMPT).logits[0, -1]
    model.compile(backend="eager")
    with PrefixCache(model, MEMORY_ONLY) as cache:
        for _ in range(2):
            assert torch.allclose(cache.generate(PROMPT, max_new_tokens=3).first_logits, expected, atol=1e-5)
