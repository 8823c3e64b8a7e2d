"""What callers give as prompts, by mistake or with more than tokens in them, and what they ask to be stored."""

import threading

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from adapters_models import tiny_llama, tokens
from transformers import BatchEncoding, DynamicCache, GPT2Config, GPT2LMHeadModel

from kvtier.adapters.transformers import PrefixCache
from kvtier.errors import ConfigError, KVTierError

MEMORY_ONLY = {"cpu_bytes_to_use": "32MiB"}
PROMPT = tokens(100)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture
def cache(model):
    with PrefixCache(model, MEMORY_ONLY) as cache:
        yield cache


def compute(model, ids, past_key_values=None, **inputs):
    with torch.inference_mode():
        return model(input_ids=ids, past_key_values=past_key_values, use_cache=True, **inputs).past_key_values


def one_line(error):
    assert isinstance(error.value, KVTierError)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    return str(error.value)


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        ("what is a tower?", r"tokenizer\(text\)"),
        ("long " * 10_000, r"tokenizer\(text\)"),
        (b"bytes", "tokenizer"),
        (["several", "texts"], "integers"),
        ({"input_ids": PROMPT}, "pass its input_ids"),
        (BatchEncoding({"input_ids": [[1, 2]]}), "pass its input_ids"),
        (None, "token ids"),
        (object(), "integers"),
        ([], "at least one token"),
        ([[]], "at least one token"),
        (torch.zeros((1, 0), dtype=torch.long), "at least one token"),
        (torch.zeros((1, 1, 8), dtype=torch.long), "one prompt"),
        ([[1, 2], [3]], "one prompt"),
        (7, "one prompt"),
        ([1.0, 2.5], "integers"),
        (np.ones(4), "integers"),
        ([True, False], "integers"),
        ([1, "2"], "integers"),
        ([1, None], "integers"),
        ([1, -1], "from 0 to 299"),
        ([1, 300], "from 0 to 299"),
        ([1, 2**70], "integers"),
        (torch.zeros(8, dtype=torch.long, device="meta"), "integers"),
    ],
)
@pytest.mark.parametrize("call", ["generate", "request"])
def test_no_prompt_is_one_line_with_the_remedy(cache, call, wrong, remedy):
    with pytest.raises(ConfigError, match=remedy) as error:
        getattr(cache, call)(wrong)
    assert "input_ids" in one_line(error)


@pytest.mark.parametrize(
    "same", [PROMPT, PROMPT[0], PROMPT[0].tolist(), PROMPT.tolist(), PROMPT.numpy(), PROMPT.int(), tuple(PROMPT[0])]
)
def test_prompts_in_any_form_are_the_same_prompt(cache, same):
    cache.generate(PROMPT, max_new_tokens=1)
    answer = cache.generate(same, max_new_tokens=1)
    assert answer.restored_tokens == 96
    assert answer.sequences[0, :100].tolist() == PROMPT[0].tolist()


@pytest.mark.parametrize(
    "wrong",
    [
        {"cache_salt": None},
        {"cache_salt": 5},
        {"past_key_values": DynamicCache()},
    ],
)
def test_wrong_arguments_are_one_line(cache, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))) as error:
        cache.generate(PROMPT, **wrong)
    one_line(error)


@pytest.mark.parametrize("wrong", ["HuggingFaceTB/SmolLM2-135M-Instruct", None, 5, object(), torch.nn.Linear(2, 2)])
def test_no_model_is_one_line(wrong):
    with pytest.raises(ConfigError, match="model") as error:
        PrefixCache(wrong, MEMORY_ONLY)
    one_line(error)


@pytest.mark.parametrize("wrong", [None, "1GiB", ["cpu_bytes_to_use"], 5])
def test_no_configuration_is_one_line(model, wrong):
    with pytest.raises(ConfigError, match="config") as error:
        PrefixCache(model, wrong)
    one_line(error)


def test_what_says_nothing_beside_the_tokens_is_taken(cache):
    cache.generate(PROMPT, max_new_tokens=1)
    inputs = {"attention_mask": torch.ones_like(PROMPT), "position_ids": torch.arange(100)[None]}
    assert cache.generate(PROMPT, max_new_tokens=1, **inputs).restored_tokens == 96
    with cache.request(PROMPT, **inputs, token_type_ids=torch.zeros_like(PROMPT), past_key_values=None) as request:
        request.restore()
        assert request.restored_tokens == 96


def test_types_that_the_model_embeds_are_more_than_tokens():
    """GPT-2 adds the embedding of type 0 if types are given at all."""
    torch.manual_seed(0)
    ends = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"))
    size = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    model, types = GPT2LMHeadModel(GPT2Config(**size, **ends)).eval(), torch.zeros_like(PROMPT)
    plain, typed = (model.generate(PROMPT, max_new_tokens=40, token_type_ids=given) for given in (None, types))
    assert not torch.equal(plain, typed)
    with PrefixCache(model, MEMORY_ONLY) as cache:
        for _ in range(2):
            answer = cache.generate(PROMPT, max_new_tokens=40, token_type_ids=types)
            assert torch.equal(answer.output, typed)
        assert torch.equal(cache.generate(PROMPT, max_new_tokens=40).output, plain)
        follow_up = torch.cat([typed, PROMPT[:, :20]], dim=1)
        answer = cache.generate(follow_up, max_new_tokens=40)
        assert torch.equal(answer.output, model.generate(follow_up, max_new_tokens=40))
        with cache.request(PROMPT, token_type_ids=types) as request:
            request.restore()
            assert request.restored_tokens == 0


@pytest.mark.parametrize(
    "inputs",
    [
        {"pixel_values": torch.zeros(1, 3, 8, 8)},
        {"inputs_embeds": torch.zeros(1, 100, 64)},
        {"attention_mask": torch.tensor([[0] * 10 + [1] * 90])},
        {"position_ids": torch.arange(5, 105)[None]},
        {"token_type_ids": torch.ones_like(PROMPT)},
        {"input_features": torch.zeros(1, 80, 10)},
    ],
)
@pytest.mark.parametrize("has_tokens", [True, False])
def test_kv_of_more_than_tokens_is_neither_found_nor_stored(cache, model, inputs, has_tokens):
    cache.generate(PROMPT, max_new_tokens=1)
    cache.reset()
    if not has_tokens:
        inputs = {**inputs, "inputs_embeds": torch.zeros(1, 100, 64)}
    with cache.request(PROMPT if has_tokens else None, **inputs) as request:
        request.restore()
        assert request.restored_tokens == 0
        compute(model, PROMPT, request.past_key_values)
        assert request.store(PROMPT) == 0
    assert cache.generate(PROMPT, max_new_tokens=1).restored_tokens == 0


def test_tokens_that_stand_for_images_are_never_keys():
    model = tiny_llama()
    model.config.image_token_id = int(PROMPT[0, 50])
    with PrefixCache(model, MEMORY_ONLY) as cache:
        for _ in range(2):
            with cache.request(PROMPT) as request:
                request.restore()
                assert request.restored_tokens == 0
                compute(model, PROMPT, request.past_key_values)
                assert request.store(PROMPT) == 0
            assert cache.generate(PROMPT, max_new_tokens=1).restored_tokens == 0
        text = PROMPT[0, 51:]
        cache.generate(text, max_new_tokens=1)
        assert cache.generate(text, max_new_tokens=1).restored_tokens > 0


# -- store ------------------------------------------------------------------------------------------------


def test_a_store_takes_what_was_computed_and_one_token_more(cache, model):
    with cache.request(PROMPT) as request:
        compute(model, PROMPT, request.past_key_values)
        assert request.store(torch.cat([PROMPT, torch.tensor([[7]])], dim=1)) == 3
        assert request.store(PROMPT) == 0
    assert cache.generate(PROMPT, max_new_tokens=1).restored_tokens == 96


@pytest.mark.parametrize(
    "claimed",
    [
        tokens(100, seed=2),
        torch.cat([tokens(99)[:, :98], torch.tensor([[255]])], dim=1),
        tokens(99)[:, :-1],
        tokens(102),
        "text",
        [[1, 2], [3, 4]],
        [],
    ],
    ids=["other prompt", "other last token", "too few", "too many", "text", "two", "none"],
)
def test_a_store_checks_what_its_caller_claims(cache, model, claimed):
    prompt = tokens(99)
    other = tokens(100, seed=2)
    with cache.request(prompt) as request:
        compute(model, prompt, request.past_key_values)
        with pytest.raises(ConfigError, match="sequence") as error:
            request.store(claimed)
        one_line(error)
    for ids in (prompt, other):
        assert cache.generate(ids, max_new_tokens=1).restored_tokens == 0


def test_a_store_needs_the_cache_of_one_sequence(cache, model):
    with cache.request(PROMPT) as request:
        request.past_key_values = compute(model, PROMPT.repeat(2, 1))
        with pytest.raises(ConfigError, match="one sequence"):
            request.store(PROMPT)
        request.past_key_values = compute(model, PROMPT[:, :40])
        with pytest.raises(ConfigError, match="40 tokens"):
            request.store(PROMPT)
        assert request.store(PROMPT[:, :40]) == 1


def test_engines_may_bring_keys_of_their_own(cache, model):
    keys = cache.keys(PROMPT[0].tolist())
    with cache.request(PROMPT) as request:
        compute(model, PROMPT, request.past_key_values)
        with pytest.raises(ConfigError, match="past_key_values"):
            request.store_blocks([*keys, *keys])
        assert request.store_blocks(keys) == 3
    assert cache.generate(PROMPT, max_new_tokens=1).restored_tokens == 96


# -- threads ----------------------------------------------------------------------------------------------


def test_threads_share_a_cache(model, tmp_path):
    """Little memory, a disk, some threads: each answer is that of the model alone."""
    block_bytes = 3 * 2 * 2 * 16 * 4 * 16
    disk = {"type": "disk", "path": str(tmp_path / "blocks"), "capacity": "16MiB"}
    config = {"cpu_bytes_to_use": 40 * block_bytes, "block_size": 16, "secondary_tiers": [disk]}
    shared = tokens(64)
    prompts = [torch.cat([shared, tokens(60, seed=seed)], dim=1) for seed in range(8)]
    right = [model.generate(prompt, do_sample=False, max_new_tokens=4)[0].tolist() for prompt in prompts]
    wrong, errors, restored = [], [], []

    def work(start):
        try:
            for index in [(start + step) % len(prompts) for step in range(2 * len(prompts))]:
                answer = cache.generate(prompts[index], max_new_tokens=4)
                restored.append(answer.restored_tokens)
                if answer.sequences[0].tolist() != right[index]:
                    wrong.append(index)
        except Exception as error:  # noqa: BLE001 - a thread's error is the test's
            errors.append(error)

    with PrefixCache(model, config) as cache:
        threads = [threading.Thread(target=work, args=(2 * number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert wrong == []
        assert any(restored)
        cache.manager.check_invariants()
        assert all(reason == "" for _, reason in cache.tier_states().values())


def test_closing_while_others_generate(model):
    """Whoever is under way answers right, without the cache; whoever comes later is told."""
    expected = model.generate(PROMPT, do_sample=False, max_new_tokens=4)[0].tolist()
    cache = PrefixCache(model, MEMORY_ONLY).open()
    with cache.request(PROMPT) as request:
        cache.close()
        request.restore()
        assert request.restored_tokens == 0
        compute(model, PROMPT, request.past_key_values)
        assert request.store(PROMPT) == 0
    with pytest.raises(RuntimeError, match="not open"):
        cache.generate(PROMPT)
    answers, running = [], PrefixCache(model, MEMORY_ONLY).open()

    def work():
        try:
            while True:
                answers.append(running.generate(PROMPT, max_new_tokens=4).sequences[0].tolist())
                going.set()
        except RuntimeError as error:
            answers.append(str(error))

    going = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    going.wait()
    running.close()
    thread.join()
    assert "not open" in answers.pop()
    assert all(answer == expected for answer in answers)
