"""The adapter on a tiny model: what is restored is what was computed, and nothing else is."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from adapters_models import LOGITS, first_logits, tiers, tiny_llama, tokens, without_hub
from forked_child import ALL_WAYS, tell
from greedy import decode_greedily
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvtier.adapters.prefill_guess import MAX_GUESSED_RATE, measure_operations
from kvtier.adapters.transformers import PrefixCache, guess_prefill_rate
from kvtier.errors import ConfigError
from kvtier.events import TierState

MEMORY_ONLY = {"cpu_bytes_to_use": "32MiB"}


def split_prefill(model, prompt, split, max_new_tokens=8):
    """Answer with transformers alone, the prefill split before token `split`."""
    cache = DynamicCache(config=model.config)
    return decode_greedily(model, prompt, cache, splits=(split,), max_new_tokens=max_new_tokens)


def plain_greedy(model, prompt, max_new_tokens):
    """Answer with transformers' own generation."""
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=max_new_tokens
    )
    return output[0].tolist()


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_logits_are_those_of_a_prefill_split_at_the_same_token(dtype):
    model, prompt = tiny_llama(dtype=dtype), tokens(301)
    with PrefixCache(model, MEMORY_ONLY) as cache:
        cold = cache.generate(prompt, max_new_tokens=8, **LOGITS)
        warm = cache.generate(prompt, max_new_tokens=8, **LOGITS)
    expected = split_prefill(model, prompt, 288)
    assert (cold.restored_tokens, cold.sources, cold.splits) == (0, {}, (288,))
    assert (warm.restored_tokens, warm.sources, warm.splits) == (288, {"primary": 288}, (288,))
    assert torch.equal(first_logits(cold), expected.first_logits.float())
    assert torch.equal(first_logits(warm), expected.first_logits.float())
    assert warm.new_token_ids == expected.token_ids


def test_answers_are_those_of_transformers_generation(model):
    prompt = tokens(150)
    expected = plain_greedy(model, prompt, 12)
    with PrefixCache(model, MEMORY_ONLY) as cache:
        assert cache.generate(prompt, max_new_tokens=12).sequences[0].tolist() == expected
        assert cache.generate(prompt, max_new_tokens=12).sequences[0].tolist() == expected


def test_blocks_of_generated_tokens_are_restored(model):
    with PrefixCache(model, MEMORY_ONLY) as cache:
        first = cache.generate(tokens(60), max_new_tokens=80)
        follow_up = torch.cat([first.sequences, tokens(5, seed=2)], dim=1)
        second = cache.generate(follow_up, max_new_tokens=4)
    assert second.restored_tokens == 128  # of 60 + 80 tokens, the last never computed
    assert second.sequences[0].tolist() == plain_greedy(model, follow_up, 4)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65])
def test_at_least_one_token_is_computed(model, length):
    prompt = tokens(length)
    with PrefixCache(model, MEMORY_ONLY) as cache:
        cold = cache.generate(prompt, max_new_tokens=2, **LOGITS)
        warm = cache.generate(prompt, max_new_tokens=2, **LOGITS)
    assert warm.restored_tokens == (length - 1) // 32 * 32
    assert torch.equal(first_logits(cold), first_logits(warm))


def test_a_partly_stored_prompt_restores_its_longest_stored_prefix(model):
    prompt = tokens(300)
    with PrefixCache(model, MEMORY_ONLY) as cache:
        cache.generate(prompt[:, :170], max_new_tokens=1)
        output = cache.generate(prompt, max_new_tokens=4)
    assert output.restored_tokens == 160
    assert output.stored_blocks == 4


def test_windows_smaller_than_the_prompt(model):
    prompt = tokens(400)
    with PrefixCache(model, {**MEMORY_ONLY, "block_size": 16}, staging_blocks=3) as cache:
        cold = cache.generate(prompt, max_new_tokens=4, **LOGITS)
        warm = cache.generate(prompt, max_new_tokens=4, **LOGITS)
    assert warm.restored_tokens == 384
    assert torch.equal(first_logits(cold), first_logits(warm))


def test_prompts_of_another_salt_share_nothing(model):
    prompt = tokens(100)
    with PrefixCache(model, MEMORY_ONLY) as cache:
        cache.generate(prompt, cache_salt="alice", max_new_tokens=1)
        assert cache.generate(prompt, cache_salt="bob", max_new_tokens=1).restored_tokens == 0
        assert cache.generate(prompt, cache_salt="", max_new_tokens=1).restored_tokens == 0
        assert cache.generate(prompt, cache_salt="alice", max_new_tokens=1).restored_tokens == 96


def test_memory_forgotten_the_disk_answers(model, tmp_path):
    prompt = tokens(200)
    with PrefixCache(model, tiers(tmp_path)) as cache:
        cold = cache.generate(prompt, max_new_tokens=4, **LOGITS)
        assert cache.flush()
        cache.forget_primary()
        from_disk = cache.generate(prompt, max_new_tokens=4, **LOGITS)
        from_memory = cache.generate(prompt, max_new_tokens=4, **LOGITS)
        cache.manager.check_invariants()
    assert from_disk.sources == {"disk": 192}
    assert from_memory.sources == {"primary": 192}
    assert torch.equal(first_logits(cold), first_logits(from_disk))
    assert cold.new_token_ids == from_disk.new_token_ids == from_memory.new_token_ids


def test_a_later_cache_over_the_same_directory_finds_everything(model, tmp_path):
    prompt = tokens(200)
    with PrefixCache(model, tiers(tmp_path)) as cache:
        cold = cache.generate(prompt, max_new_tokens=4, **LOGITS)
    with PrefixCache(tiny_llama(), tiers(tmp_path)) as cache:
        later = cache.generate(prompt, max_new_tokens=4, **LOGITS)
    assert later.sources == {"disk": 192}
    assert torch.equal(first_logits(cold), first_logits(later))


def test_an_answer_has_reached_the_disk_when_it_is_returned(model, tmp_path):
    """Nobody steps the manager between two answers, however long the pause."""
    with PrefixCache(model, tiers(tmp_path)) as cache:
        cache.generate(tokens(200), max_new_tokens=1)
        assert not cache.manager.has_pending_work()
        assert cache.manager.get_stats()["disk.blocks"] == 6


def test_other_weights_find_nothing(model, tmp_path):
    prompt = tokens(200)
    with PrefixCache(model, tiers(tmp_path)) as cache:
        cache.generate(prompt, max_new_tokens=1)
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[5, 7] += 0.5
    with PrefixCache(other, tiers(tmp_path)) as cache:
        assert cache.generate(prompt, max_new_tokens=1).restored_tokens == 0


def test_a_new_process_answers_from_disk(model, tmp_path):
    """Another interpreter: same bits, though nothing but the directory is shared."""
    with PrefixCache(model, tiers(tmp_path)) as cache:
        here = cache.generate(tokens(200), max_new_tokens=4, **LOGITS)
    script = tmp_path / "answer.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
        "from pathlib import Path\n"
        "from adapters_models import LOGITS, first_logits, tiers, tiny_llama, tokens\n"
        "from kvtier.adapters.transformers import PrefixCache\n"
        "with PrefixCache(tiny_llama(), tiers(Path(sys.argv[2]))) as cache:\n"
        "    output = cache.generate(tokens(200), max_new_tokens=4, **LOGITS)\n"
        "print(output.sources, first_logits(output).tolist(), output.new_token_ids)\n"
    )
    command = [sys.executable, str(script), str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=without_hub())
    assert done.stdout.strip() == f"{{'disk': 192}} {first_logits(here).tolist()} {here.new_token_ids}"


def test_a_directory_that_another_cache_holds_is_missed_not_fatal(model, tmp_path):
    prompt = tokens(100)
    with PrefixCache(model, tiers(tmp_path)), PrefixCache(model, tiers(tmp_path)) as second:
        state, reason = second.tier_states()["disk"]
        assert state is TierState.DOWN
        assert reason
        second.generate(prompt, max_new_tokens=1)
        assert second.generate(prompt, max_new_tokens=1).sources == {"primary": 96}


def test_more_prompt_than_memory_keeps_the_answers_right(model, tmp_path):
    """The primary holds a handful of blocks: what does not fit is computed."""
    prompt = tokens(600)
    block_bytes = 3 * 2 * 2 * 16 * 4 * 32
    expected = split_prefill(model, prompt, 576)
    with PrefixCache(model, tiers(tmp_path, memory=6 * block_bytes)) as cache:
        for _ in range(3):
            output = cache.generate(prompt, max_new_tokens=8)
            assert output.new_token_ids == expected.token_ids
        cache.manager.check_invariants()


def test_a_request_by_hand_serves_any_way_of_running_the_model(model):
    prompt = tokens(100)
    with PrefixCache(model, MEMORY_ONLY) as cache:
        cache.generate(prompt, max_new_tokens=1)
        with cache.request(prompt) as request:
            request.restore()
            assert request.past_key_values.get_seq_length() == request.restored_tokens == 96
            with torch.inference_mode():
                output = model.generate(
                    prompt, past_key_values=request.past_key_values, do_sample=False, max_new_tokens=40
                )
            request.store(output)
        assert output[0].tolist() == plain_greedy(model, prompt, 40)
        assert cache.generate(output, max_new_tokens=1).restored_tokens == 128


def test_a_model_that_fails_leaves_no_request_behind():
    model = tiny_llama()
    with PrefixCache(model, MEMORY_ONLY) as cache:
        broken = model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: args[0] @ torch.ones(1, 1))
        with pytest.raises(RuntimeError):
            cache.generate(tokens(40), max_new_tokens=1)
        broken.remove()
        cache.generate(tokens(40), max_new_tokens=1)
        cache.manager.check_invariants()
        assert not cache.manager.has_pending_work()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_processors_speed_is_measured_in_each_type(dtype):
    assert measure_operations(dtype) > 1e8


def test_a_large_model_on_a_cpu_is_guessed_to_compute_slowly():
    with torch.device("meta"):
        large = LlamaForCausalLM(LlamaConfig(num_hidden_layers=8)).eval()
    assert 0.0 < guess_prefill_rate(large) < 100 * torch.get_num_threads()
    assert guess_prefill_rate(tiny_llama()) == MAX_GUESSED_RATE


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ConfigError, match=r"model\.eval\(\)"):
        PrefixCache(tiny_llama().train(), MEMORY_ONLY)


@pytest.mark.parametrize(
    "wrong", [{"blocks_per_chunk": 2}, {"block_size": 0}, {"cpu_bites": 1}, {"secondary_tiers": [{}]}]
)
def test_a_wrong_configuration_is_one_line(model, wrong):
    with pytest.raises(ConfigError) as error, PrefixCache(model, {**MEMORY_ONLY, **wrong}):
        pass
    assert "\n" not in str(error.value)
    assert next(iter(wrong)) in str(error.value)


def test_a_request_takes_one_prompt(model):
    with PrefixCache(model, MEMORY_ONLY) as cache, pytest.raises(ValueError, match="one prompt"):
        cache.request(torch.zeros((2, 8), dtype=torch.long))


def test_use_before_open_says_so(model):
    with pytest.raises(RuntimeError, match="not open"):
        PrefixCache(model, MEMORY_ONLY).generate(tokens(8))


def test_a_cache_is_opened_once(model):
    with PrefixCache(model, MEMORY_ONLY) as cache:
        with pytest.raises(RuntimeError, match="opened once: make a new one"):
            cache.open()
        assert cache.generate(tokens(8), max_new_tokens=1).sequences.shape == (1, 9)
    with pytest.raises(RuntimeError, match="opened once: make a new one"):
        cache.open()


def test_layers_of_unlike_shape_are_restored(model):
    config = LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 2})
    odd = LlamaForCausalLM(config).eval()
    odd.model.layers[1].self_attn.k_proj = torch.nn.Linear(64, 16, bias=False)
    odd.model.layers[1].self_attn.v_proj = torch.nn.Linear(64, 16, bias=False)
    odd.model.layers[1].self_attn.num_key_value_groups = 4
    expected = plain_greedy(odd, tokens(100), 8)
    with PrefixCache(odd, MEMORY_ONLY) as cache:
        answers = [cache.generate(tokens(100), max_new_tokens=8) for _ in range(2)]
    assert [answer.restored_tokens for answer in answers] == [0, 96]
    assert all(answer[0].tolist() == expected for answer in answers)


@pytest.mark.parametrize("fork", ALL_WAYS)
def test_a_forked_child_answers_as_without_a_cache(model, tmp_path, fork):
    prompts = [tokens(150, seed) for seed in (1, 2)]
    expected = [plain_greedy(model, prompt, 6) for prompt in prompts]
    with PrefixCache(model, tiers(tmp_path)) as cache:
        cache.generate(prompts[0], max_new_tokens=6)

        def child():
            torch.set_num_threads(1)  # the threads that the parent computes with are not there
            answers = [cache.generate(prompt, max_new_tokens=6) for prompt in [*prompts, *prompts]]
            cache.close()
            cache.close()
            assert [answer.sequences[0].tolist() for answer in answers] == [*expected, *expected]
            return [[answer.restored_tokens, answer.stored_blocks] for answer in answers]

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # OpenMP's pool does not survive a fork
        try:
            assert tell(fork, child) == [[0, 0]] * 4
        finally:
            torch.set_num_threads(threads)
        answer = cache.generate(prompts[0], max_new_tokens=6)
        assert (answer.restored_tokens, answer.sequences[0].tolist()) == (128, expected[0])


def fill_memory(cache):
    for number in range(12):
        cache.generate([(7 * number + token) % 300 for token in range(100, 230)], max_new_tokens=1)


def test_a_hint_keeps_a_prompts_blocks(model):
    small = MEMORY_ONLY | {"cpu_bytes_to_use": "1MiB", "retain_share": 0.5}
    with PrefixCache(model, small) as cache:
        kept, others = list(range(65)), list(range(65, 0, -1))
        cache.generate(kept, max_new_tokens=1, hint={"retain": "10m", "priority": "high"})
        cache.generate(others, max_new_tokens=1)
        fill_memory(cache)
        assert cache.manager.get_stats()["primary.kept_blocks"] > 0
        assert cache.generate(kept, max_new_tokens=1).restored_tokens == 64
        assert cache.generate(others, max_new_tokens=1).restored_tokens == 0


def test_a_malformed_hint_changes_no_answer(model):
    with PrefixCache(model, MEMORY_ONLY) as cache:
        plain = cache.generate(list(range(65)), max_new_tokens=4)
        for wrong in ("10m", {"retain": "soon"}, {"unknown": 1}, 7):
            again = cache.generate(list(range(65)), max_new_tokens=4, hint=wrong)
            assert torch.equal(again.sequences, plain.sequences)
        assert cache.manager.get_stats()["ignored_hints"] == 4
