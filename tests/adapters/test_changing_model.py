"""Weights, adapters and settings that change while a cache is open: the answer is always that of the model as it is."""

import functools
import logging
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft", reason="PEFT IS NOT INSTALLED: switching adapters was not checked; run: make test")

import peft
import torch
from adapters_models import LOGITS, first_logits, tiers, tiny_llama, tokens
from greedy import decode_greedily
from peft.utils.hotswap import hotswap_adapter
from transformers import AttentionInterface, DynamicCache, GenerationConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvtier.adapters.model_watch import ModelIdentity
from kvtier.adapters.transformers import PrefixCache
from kvtier.adapters.weights_digest import digest_tensors
from kvtier.errors import ConfigError
from kvtier.testing.patience import PATIENCE_SECONDS

MEMORY_ONLY = {"cpu_bytes_to_use": "32MiB"}
PROMPT = tokens(140)
BOUNDARY = 128


def lora(rank=4, dropout=0.0):
    targets = ["q_proj", "k_proj", "v_proj"]
    return peft.LoraConfig(r=rank, target_modules=targets, init_lora_weights=False, lora_dropout=dropout)


def with_adapters():
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny_llama(), lora(), adapter_name="one")
    model.add_adapter("two", lora())
    return model.eval()


def expected(model, prompt=PROMPT, split=BOUNDARY):
    model.eval()
    cache = DynamicCache(config=model.config)
    return decode_greedily(model, prompt, cache, splits=(split,), max_new_tokens=4)


def ask(cache, prompt=PROMPT):
    """Answer a prompt, check every bit of it, and return how many tokens were restored."""
    answer = cache.generate(prompt, max_new_tokens=4, **LOGITS)
    right = expected(cache.model, prompt)
    assert torch.equal(first_logits(answer), right.first_logits.float())
    assert answer.new_token_ids == right.token_ids
    cache.manager.check_invariants()
    return answer.restored_tokens


def add_to_a_row(model):
    with torch.no_grad():
        model.model.embed_tokens.weight[int(PROMPT[0, 0])] += 1


def load_state(model):
    model.load_state_dict(tiny_llama(seed=5).state_dict())


def assign_state(model):
    model.load_state_dict(tiny_llama(seed=5).state_dict(), assign=True)


def replace_parameter(model):
    model.model.layers[0].self_attn.v_proj.weight = torch.nn.Parameter(torch.randn(32, 64))


def replace_data(model):
    model.model.layers[0].self_attn.v_proj.weight.data = torch.randn(32, 64)


def swap_tensor(model):
    """As torch does in `load_state_dict`, if it is told to; it refuses tensors with weak references."""
    torch.utils.swap_tensors(model.model.layers[0].self_attn.v_proj.weight, torch.nn.Parameter(torch.randn(32, 64)))


def replace_module(model):
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 96, bias=False).eval()


def add_bias(model):
    model.model.layers[0].self_attn.k_proj.bias = torch.nn.Parameter(torch.ones(32))


def change_buffer(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def change_setting(model):
    model.model.layers[0].self_attn.scaling *= 2


def patch_forward(model):
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(hidden) * 2


def write_in_inference_mode(model):
    with torch.inference_mode():
        model.model.layers[0].self_attn.v_proj.weight.add_(1)


def change_class(model):
    class Doubled(type(model.model.layers[0].mlp)):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    model.model.layers[0].mlp.__class__ = Doubled


def drop_a_layer(model):
    del model.model.layers[2]
    model.config.num_hidden_layers = 2


def take_a_step(model, **how):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **how)
    model(input_ids=tokens(8), labels=tokens(8)).loss.backward()
    optimizer.step()


def take_a_fused_step(model):
    take_a_step(model, fused=True)


def take_a_step_at_a_time(model):
    take_a_step(model, foreach=False)


CHANGES = [
    *(add_to_a_row, load_state, assign_state, replace_parameter, replace_data, swap_tensor, replace_module, add_bias),
    *(change_buffer, change_setting, patch_forward, write_in_inference_mode, change_class, drop_a_layer),
    *(take_a_step, take_a_fused_step, take_a_step_at_a_time),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_requests_is_followed(change):
    model = tiny_llama()
    with PrefixCache(model, MEMORY_ONLY) as cache:
        assert ask(cache) == 0
        assert ask(cache) == BOUNDARY
        change(model)
        assert ask(cache) == 0
        assert ask(cache) == BOUNDARY


def test_earlier_weights_find_their_blocks_again(tmp_path):
    first, second = tiny_llama(seed=1).state_dict(), tiny_llama(seed=2).state_dict()
    model = tiny_llama(seed=1)
    with PrefixCache(model, tiers(tmp_path)) as cache:
        assert ask(cache) == 0
        model.load_state_dict(second)
        assert ask(cache) == 0
        model.load_state_dict(first)
        assert ask(cache) == BOUNDARY
    with PrefixCache(tiny_llama(seed=2), tiers(tmp_path)) as cache:
        assert cache.generate(PROMPT, max_new_tokens=4).sources == {"disk": BOUNDARY}


def test_only_changed_tensors_are_hashed_again():
    model, hashed = tiny_llama(), []

    def digest(tensors, deadline):
        hashed.extend(tensors)
        return digest_tensors(tensors, deadline)

    with PrefixCache(model, MEMORY_ONLY, make_identity=functools.partial(ModelIdentity, digest=digest)) as cache:
        hashed.clear()
        ask(cache)
        ask(cache)
        assert hashed == []
        add_to_a_row(model)
        ask(cache)
        assert [tuple(tensor.shape) for tensor in hashed] == [(300, 64)]


def test_weights_that_cannot_be_hashed_in_time_count_as_new_weights(tmp_path, caplog):
    model = tiny_llama()
    hurried = functools.partial(ModelIdentity, hashing_seconds=0.0)
    with PrefixCache(model, tiers(tmp_path), make_identity=hurried) as cache, caplog.at_level(logging.WARNING):
        assert ask(cache) == 0
        for _ in range(3):
            load_state(model)
            assert ask(cache) == 0
            assert ask(cache) == BOUNDARY
    assert len([record for record in caplog.records if "more weights changed" in record.message]) == 1
    with PrefixCache(model, tiers(tmp_path)) as cache:
        assert ask(cache) == 0


def test_another_data_type_gets_tiers_of_its_own(tmp_path):
    model = tiny_llama()
    with PrefixCache(model, tiers(tmp_path)) as cache:
        with cache.request(PROMPT) as begun:
            ask(cache)
            model.to(torch.bfloat16)
            assert ask(cache) == 0
            assert ask(cache) == BOUNDARY
            begun.restore()
            assert begun.restored_tokens == 0
        assert cache.flush()
    with PrefixCache(tiny_llama(dtype=torch.bfloat16), tiers(tmp_path)) as cache:
        assert cache.generate(PROMPT, max_new_tokens=1).sources == {"disk": BOUNDARY}
    with PrefixCache(tiny_llama(), tiers(tmp_path)) as cache:
        assert cache.generate(PROMPT, max_new_tokens=1).sources == {"disk": BOUNDARY}


def test_autocast_is_another_arithmetic():
    model = tiny_llama()
    with PrefixCache(model, MEMORY_ONLY) as cache:
        ask(cache)
        with torch.autocast("cpu", torch.bfloat16):
            assert ask(cache) == 0
            ask(cache)
        assert ask(cache) == BOUNDARY


@pytest.mark.parametrize("kind", ["module_forward_pre_hook", "module_forward_hook"])
def test_hooks_of_all_modules_are_part_of_the_model(kind):
    def triple(module, *values):
        is_linear = isinstance(module, torch.nn.Linear)
        return None if not is_linear else 3 * values[-1] if kind == "module_forward_hook" else (3 * values[0][0],)

    with PrefixCache(tiny_llama(), MEMORY_ONLY) as cache:
        ask(cache)
        hook = getattr(torch.nn.modules.module, f"register_{kind}")(triple)
        try:
            assert ask(cache) == 0
        finally:
            hook.remove()
        assert ask(cache) == BOUNDARY


def test_attention_that_a_user_registers_is_known_by_what_it_is_and_not_by_its_name(tmp_path):
    def own_attention(scale):
        def attend(module, query, key, value, mask, **more):
            return sdpa_attention_forward(module, scale * query, key, value, mask, **more)

        return attend

    model = tiny_llama()
    AttentionInterface.register("own", own_attention(1))
    try:
        model.set_attn_implementation("own")
        with PrefixCache(model, tiers(tmp_path)) as cache:
            assert ask(cache) == 0
            assert ask(cache) == BOUNDARY
            AttentionInterface.register("own", own_attention(2))
            assert ask(cache) == 0
        with PrefixCache(model, tiers(tmp_path)) as cache:
            assert ask(cache) == 0
    finally:
        del AttentionInterface._global_mapping["own"]


NEW_WORDS_FOR_PRECISION = """
import sys
sys.path[:0] = {folders!r}
import torch
from adapters_models import LOGITS, first_logits, tiny_llama, tokens
from kvtier.adapters.transformers import PrefixCache
with PrefixCache(tiny_llama(), {{"cpu_bytes_to_use": "32MiB"}}) as cache:
    restored = [cache.generate(tokens(140), max_new_tokens=1).restored_tokens for _ in range(2)]
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    restored += [cache.generate(tokens(140), max_new_tokens=1).restored_tokens for _ in range(2)]
print(restored)
"""


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="THIS TORCH HAS NO fp32_precision: update it")
def test_the_precision_of_products_may_be_set_in_either_of_the_ways_of_torch():
    tests = Path(__file__).parent
    code = NEW_WORDS_FOR_PRECISION.format(folders=[str(tests), str(tests.parent)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[0, 128, 0, 128]\n"), done.stderr


def test_tensors_without_versions_are_read_at_each_request():
    with torch.inference_mode():
        model = tiny_llama()
    with PrefixCache(model, MEMORY_ONLY) as cache:
        assert ask(cache) == 0
        assert ask(cache) == BOUNDARY
        with torch.inference_mode():
            model.model.embed_tokens.weight[int(PROMPT[0, 0])] += 1
        assert ask(cache) == 0


def test_many_tensors_without_versions_are_refused():
    with torch.inference_mode():
        model = tiny_llama()
    strict = functools.partial(ModelIdentity, max_unmarked_bytes=1 << 10)
    with pytest.raises(ConfigError, match="inference_mode"), PrefixCache(model, MEMORY_ONLY, make_identity=strict):
        pass


def test_training_mode_is_refused_when_it_comes():
    model = with_adapters()
    with PrefixCache(model, MEMORY_ONLY) as cache:
        ask(cache)
        model.train()
        with pytest.raises(ConfigError, match=r"model\.eval\(\)"):
            cache.generate(PROMPT)
        model.eval()
        assert ask(cache) == BOUNDARY
        model.add_adapter("three", lora(dropout=0.5))
        model.set_adapter("three")  # its dropout is in training mode
        with pytest.raises(ConfigError, match=r"model\.eval\(\)"):
            cache.generate(PROMPT)


# -- adapters ---------------------------------------------------------------------------------------------


def switch(model):
    model.set_adapter("two")


def scale(model):
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("one", 3.0)


def merge(model):
    model.merge_adapter()


def merge_safely(model):
    model.merge_adapter(safe_merge=True)


def disable(model):
    model.base_model.disable_adapter_layers()


def train_adapter(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    take_a_fused_step(model)


def combine(model):
    model.base_model.set_adapter(["one", "two"])


def delete(model):
    model.delete_adapter("one")


def reload(model):
    state = peft.get_peft_model_state_dict(model, adapter_name="two")
    peft.set_peft_model_state_dict(model, state, adapter_name="one")


def hotswap(model, folder, **settings):
    """Give the weights of a new adapter, and its scale, to the one in use."""
    torch.manual_seed(11)
    newer = peft.get_peft_model(tiny_llama(seed=7), lora(**settings))
    newer.save_pretrained(folder)
    hotswap_adapter(model, str(folder), adapter_name="one", torch_device="cpu")


@pytest.mark.parametrize(
    "change", [switch, scale, merge, merge_safely, disable, train_adapter, combine, delete, reload]
)
@pytest.mark.parametrize("inside", [False, True], ids=["wrapper", "base"])
def test_a_change_of_adapters_is_followed(change, inside):
    model = with_adapters()
    with PrefixCache(model.get_base_model() if inside else model, MEMORY_ONLY) as cache:
        assert ask(cache) == 0
        assert ask(cache) == BOUNDARY
        change(model)
        assert ask(cache) == 0
        assert ask(cache) == BOUNDARY


@pytest.mark.parametrize("rank", [2, 8], ids=["smaller", "larger"])
def test_an_adapter_that_is_exchanged_in_place_with_its_scale_is_read_again(tmp_path, rank):
    model = with_adapters()
    with PrefixCache(model, MEMORY_ONLY) as cache:
        assert ask(cache) == 0
        hotswap(model, tmp_path, rank=rank)
        assert ask(cache) == 0
        assert ask(cache) == BOUNDARY
        with PrefixCache(model, MEMORY_ONLY) as another:
            assert another.namespace == cache.namespace


def test_an_adapter_that_is_exchanged_in_place_and_keeps_its_scale_needs_a_reset(tmp_path):
    model = with_adapters()
    with PrefixCache(model, MEMORY_ONLY) as cache:
        assert ask(cache) == 0
        hotswap(model, tmp_path)
        cache.reset()
        assert ask(cache) == 0
        assert ask(cache) == BOUNDARY


def test_an_adapter_finds_its_blocks_again_and_another_never(tmp_path):
    model = with_adapters()
    with PrefixCache(model, tiers(tmp_path)) as cache:
        assert ask(cache) == 0
        switch(model)
        assert ask(cache) == 0
        model.set_adapter("one")
        assert ask(cache) == BOUNDARY
        with model.disable_adapter():
            assert ask(cache) == 0
            assert ask(cache) == BOUNDARY
        assert ask(cache) == BOUNDARY
        model.add_adapter("three", lora())
        assert ask(cache) == BOUNDARY  # loaded, not active
        model.delete_adapter("two")
        assert ask(cache) == BOUNDARY
    for name in ("two", "one", "two"):
        other = with_adapters()
        other.set_adapter(name)
        with PrefixCache(other, tiers(tmp_path)) as cache:
            assert cache.generate(PROMPT, max_new_tokens=4).sources == {"disk": BOUNDARY}
            assert ask(cache) == BOUNDARY
    other.set_adapter("one")
    train_adapter(other)
    with PrefixCache(other.eval(), tiers(tmp_path)) as cache:
        assert ask(cache) == 0


def test_merging_and_back_leaves_other_bits(tmp_path):
    """PEFT adds adapters to the weights through `.data` and subtracts them again, which rounds."""
    model = with_adapters()
    with PrefixCache(model, tiers(tmp_path)) as cache:
        ask(cache)
        weight = model.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer().weight
        before = weight.detach().clone()
        merge(model)
        assert ask(cache) == 0
        model.unmerge_adapter()
        assert not torch.equal(weight, before)
        assert ask(cache) == 0
        base = model.merge_and_unload()
    with PrefixCache(base, tiers(tmp_path)) as cache:
        assert ask(cache) == 0


def test_merging_for_good_in_an_open_cache():
    model = with_adapters()
    base = model.get_base_model()
    with PrefixCache(base, MEMORY_ONLY) as cache:
        ask(cache)
        with model.disable_adapter():
            ask(cache)
        assert model.merge_and_unload() is base
        assert ask(cache) == 0


def test_adapters_added_by_transformers_itself():
    model = tiny_llama()
    with PrefixCache(model, MEMORY_ONLY) as cache:
        ask(cache)
        for name in ("one", "two"):
            model.add_adapter(lora(), adapter_name=name)
            model.eval()
            assert ask(cache) == 0
        model.set_adapter("one")
        assert ask(cache) == BOUNDARY
        model.disable_adapters()
        assert ask(cache) == 0
        model.enable_adapters()
        model.set_adapter("two")
        assert ask(cache) == BOUNDARY
        model.delete_adapter("one")
        assert ask(cache) == BOUNDARY


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
        ),
        peft.LoHaConfig(r=2, target_modules=["k_proj"], init_weights=False),
        peft.LNTuningConfig(target_modules=["input_layernorm"]),
        peft.VeraConfig(r=2, target_modules=["k_proj"], init_weights=False),
        peft.LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["embed_tokens"], use_dora=True),
        peft.LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices=[int(PROMPT[0, 0])]),
    ],
    ids=["ia3", "loha", "layer-norms", "vera", "dora-and-embedding", "one-token"],
)
def test_adapters_of_other_kinds(config):
    model = peft.get_peft_model(tiny_llama(), config).eval()
    patient = functools.partial(ModelIdentity, hashing_seconds=PATIENCE_SECONDS)
    with PrefixCache(model, MEMORY_ONLY, make_identity=patient) as cache:
        assert ask(cache) == 0
        assert ask(cache) == BOUNDARY
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        assert ask(cache) == 0
        with model.disable_adapter():
            assert ask(cache) == 0
        assert ask(cache) == BOUNDARY


def test_adapters_made_for_causal_models_find_their_blocks_in_the_next_process(tmp_path, caplog):
    settings = peft.LoraConfig(r=4, target_modules=["k_proj"], init_lora_weights=False, task_type="CAUSAL_LM")

    def adapted():
        return peft.get_peft_model(tiny_llama(), settings).eval()

    model = adapted()
    with caplog.at_level(logging.WARNING), PrefixCache(model, tiers(tmp_path)) as cache:
        assert ask(cache) == 0
    assert not [record for record in caplog.records if "cannot be described" in record.message]
    other = adapted()
    other.load_state_dict(model.state_dict())
    with PrefixCache(other, tiers(tmp_path)) as cache:
        assert cache.generate(PROMPT, max_new_tokens=4).sources == {"disk": BOUNDARY}


INVOCATION = PROMPT[0, 20:23].tolist()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (
            peft.LoraConfig(target_modules=["k_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=INVOCATION),
            "ALora",
        ),
        (peft.LilyConfig(target_modules=["k_proj"], r=4), "Lily"),
        (peft.PolyConfig(target_modules=["k_proj"], r=4, n_tasks=2, n_skills=2), "task_ids"),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5), "keys and values"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5), "layers"),
    ],
    ids=["activated", "lily", "poly", "prompt", "prefix"],
)
def test_adapters_whose_kv_depends_on_more_than_the_tokens_before_are_refused(config, named):
    with (
        pytest.raises(ConfigError, match=named),
        PrefixCache(peft.get_peft_model(tiny_llama(), config).eval(), MEMORY_ONLY),
    ):
        pass


def test_an_adapter_that_is_refused_is_refused_when_it_comes_into_use():
    model = with_adapters()
    activated = peft.LoraConfig(target_modules=["k_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=INVOCATION)
    with PrefixCache(model, MEMORY_ONLY) as cache:
        ask(cache)
        model.add_adapter("activated", activated)
        assert ask(cache) == BOUNDARY
        model.set_adapter("activated")
        with pytest.raises(ConfigError, match="ALora"):
            cache.generate(PROMPT)
        model.set_adapter("one")
        assert ask(cache) == BOUNDARY


# -- requests that have begun -----------------------------------------------------------------------------


def test_a_request_begun_before_a_change_restores_and_stores_nothing():
    model = with_adapters()
    with PrefixCache(model, MEMORY_ONLY) as cache:
        ask(cache)
        with cache.request(PROMPT) as late, cache.request(tokens(100, seed=9)) as early:
            with torch.inference_mode():
                model(input_ids=tokens(100, seed=9), past_key_values=early.past_key_values, use_cache=True)
            switch(model)
            late.restore()
            assert late.restored_tokens == late.past_key_values.get_seq_length() == 0
            assert early.store(tokens(100, seed=9)) == 0
        for name in ("two", "one"):
            model.set_adapter(name)
            assert cache.generate(tokens(100, seed=9), max_new_tokens=1).restored_tokens == 0


def test_a_change_that_another_request_noticed_and_that_was_undone_keeps_a_request_from_storing():
    model = with_adapters()
    with PrefixCache(model, MEMORY_ONLY) as cache:
        with cache.request(PROMPT) as request:
            switch(model)  # as another thread may, while this one's model runs
            cache.generate(tokens(40), max_new_tokens=1)
            decode_greedily(model, PROMPT, request.past_key_values, max_new_tokens=1)
            model.set_adapter("one")
            assert request.store(PROMPT) == 0
        assert ask(cache) == 0


def test_reset_finds_nothing_that_was_stored_before(tmp_path):
    model = tiny_llama()
    with PrefixCache(model, tiers(tmp_path)) as cache:
        ask(cache)
        with cache.request(PROMPT) as begun:
            model.model.embed_tokens.weight.data.add_(1)  # leaves no mark
            cache.reset()
            begun.restore()
            assert begun.restored_tokens == 0
        assert ask(cache) == 0
        assert ask(cache) == BOUNDARY
        cache.reset()
        assert ask(cache) == 0
    with PrefixCache(model, tiers(tmp_path)) as cache:
        assert ask(cache) == 0
    with PrefixCache(tiny_llama(), tiers(tmp_path)) as cache:
        assert ask(cache) == BOUNDARY


def test_reset_before_open_says_so():
    with pytest.raises(RuntimeError, match="not open"):
        PrefixCache(tiny_llama(), MEMORY_ONLY).reset()


def test_a_wrapped_model_generates_with_the_settings_of_its_wrapper():
    settings = peft.LoraConfig(r=4, target_modules=["k_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_llama(), settings).eval()
    model.generation_config = GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.8)
    torch.manual_seed(5)
    expected = model.generate(input_ids=PROMPT)
    with PrefixCache(model, MEMORY_ONLY) as cache:
        for restored in (0, BOUNDARY):
            torch.manual_seed(5)
            answer = cache.generate(PROMPT)
            assert (answer.restored_tokens, answer.output.tolist()) == (restored, expected.tolist())
