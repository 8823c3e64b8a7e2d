"""What a `PrefixCache` takes for the same model: all bytes of its weights, and what it computes with besides."""

import copy
import functools
import random
import threading
from types import MethodType

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from adapters_models import tiers, tiny_llama, tokens
from transformers import AutoModelForCausalLM
from transformers.activations import GELUActivation

from kvtier.adapters.cache_shape import inspect_cache
from kvtier.adapters.model_watch import ModelIdentity
from kvtier.adapters.transformers import PrefixCache
from kvtier.adapters.weights_digest import PIECE_BYTES, digest_tensors, weights_digest
from kvtier.errors import ConfigError

MEMORY_ONLY = {"cpu_bytes_to_use": "32MiB"}


def namespace(model, **more):
    with PrefixCache(model, {**MEMORY_ONLY, **more}) as cache:
        return cache.namespace.fingerprint


def identity(model, **limits):
    found = ModelIdentity(model, **limits)
    found.close()
    return found.current()


def holding(**tensors):
    """Return a module with these tensors."""
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module.eval()


def test_models_are_told_apart():
    model = tiny_llama()
    same = namespace(model)
    assert namespace(tiny_llama()) == same
    others = [
        namespace(tiny_llama(seed=1)),
        namespace(tiny_llama(dtype=torch.bfloat16)),
        namespace(tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})),
        namespace(tiny_llama(attn_implementation="eager")),
        namespace(tiny_llama(rms_norm_eps=1e-5)),
        namespace(model, block_size=16),
    ]
    assert same not in others
    assert len(set(others)) == len(others)


def test_a_model_loaded_from_a_folder_is_the_model_that_was_saved(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "here")
    model.save_pretrained(tmp_path / "there")
    loaded = [AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("here", "there")]
    assert {namespace(one) for one in loaded} == {namespace(model)}


def edit_embedding_row(model):
    model.model.embed_tokens.weight.data[77] += 0.5


def edit_one_bit(model):
    model.model.layers[2].mlp.down_proj.weight.data.view(-1).view(torch.int32)[-1] ^= 1


def edit_layer_norms(model):
    for layer in model.model.layers:
        layer.input_layernorm.weight.data += 2**-10


def edit_bias(model):
    model.model.layers[0].self_attn.q_proj.bias.data[3] = 1.0


def edit_buffer(model):
    model.model.rotary_emb.inv_freq.data[0] *= 2


def edit_setting(model):
    model.model.layers[1].input_layernorm.variance_epsilon = 1e-3


def edit_activation(model):
    model.model.layers[1].mlp.act_fn = GELUActivation()


@pytest.mark.parametrize(
    "edit",
    [
        edit_embedding_row,
        edit_one_bit,
        edit_layer_norms,
        edit_bias,
        edit_buffer,
        edit_setting,
        edit_activation,
    ],
)
def test_any_edit_makes_another_model(edit, tmp_path):
    model = tiny_llama(attention_bias=True, vocab_size=5000)
    prompt = tokens(100)
    with PrefixCache(model, tiers(tmp_path)) as cache:
        cache.generate(prompt, max_new_tokens=1)
    edited = copy.deepcopy(model)
    edit(edited)
    assert identity(edited) != identity(model)
    with PrefixCache(edited, tiers(tmp_path)) as cache:
        assert cache.generate(prompt, max_new_tokens=1).restored_tokens == 0
    with PrefixCache(copy.deepcopy(model), tiers(tmp_path)) as cache:
        assert cache.generate(prompt, max_new_tokens=1).sources == {"disk": 96}


def test_every_byte_of_a_large_tensor_counts():
    digest = functools.partial(digest_tensors, piece_bytes=1 << 12)
    weight = torch.zeros(300, 700, dtype=torch.bfloat16)
    expected = identity(holding(weight=weight), digest=digest)
    rng = random.Random(5)
    for _ in range(100):
        changed = weight.clone()
        changed[rng.randrange(300), rng.randrange(700)] = 2**-20
        assert identity(holding(weight=changed), digest=digest) != expected
    assert identity(holding(weight=weight.clone()), digest=digest) == expected
    assert identity(holding(other=weight), digest=digest) != expected
    assert identity(holding(weight=weight.view(700, 300)), digest=digest) != expected


def test_a_digest_depends_on_bytes_and_not_on_where_they_are_in_memory():
    """Neither gaps, transposition, the size of pieces nor the number of threads change it."""
    tensor = torch.randn(64, 3, 96)
    apart = torch.randn(64, 3, 192)[:, :, ::2].copy_(tensor)
    turned = tensor.transpose(0, 2).contiguous().transpose(0, 2)
    expected = digest_tensors([tensor])
    for piece_bytes in (PIECE_BYTES, 4096, 100):
        assert digest_tensors([tensor, apart, turned] * 5, piece_bytes=piece_bytes) == expected * 15


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int8, torch.float64])
def test_tensors_of_every_type_have_bytes(dtype):
    values = torch.tensor([0.0, 1.0, 0.0]).to(dtype)
    others = torch.tensor([0.0, 1.0, 1.0]).to(dtype)
    assert identity(holding(w=values)) == identity(holding(w=values.clone()))
    assert identity(holding(w=values)) != identity(holding(w=others))
    assert identity(holding(w=values[0])) != identity(holding(w=values[:1]))
    assert identity(holding(w=values[:0])) == identity(holding(w=values[:0].clone()))


def test_one_row_of_many_changes_the_digest_of_named_tensors():
    weight = torch.randn(2000, 64)
    digest = weights_digest({"w": weight})
    assert weights_digest({"w": weight.clone()}) == digest
    assert weights_digest({"v": weight}) != digest
    for row in range(0, 2000, 100):
        changed = weight.clone()
        changed[row] += 1
        assert weights_digest({"w": changed}) != digest


def test_tied_weights_are_read_once():
    model = tiny_llama(tie_word_embeddings=True)
    read = []

    def digest(tensors, deadline):
        read.extend(tensor.data_ptr() for tensor in tensors)
        return digest_tensors(tensors, deadline)

    ModelIdentity(model, digest=digest).close()
    assert read.count(model.lm_head.weight.data_ptr()) == 1
    assert len(read) == len(set(read))


class Halves(torch.Tensor):
    """A wrapper of two tensors, as quantized weights are."""

    @staticmethod
    def __new__(cls, first, second):
        shape = (first.shape[0] + second.shape[0], *first.shape[1:])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=first.dtype)

    def __init__(self, first, second):
        self.first, self.second = first, second

    def __tensor_flatten__(self):
        return ["first", "second"], {"kind": "halves"}

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].first, args[0].second)
        raise NotImplementedError(function)


def test_wrappers_are_their_parts():
    first, second = torch.randn(4, 4), torch.randn(4, 4)
    module = torch.nn.Module().eval()
    module.register_buffer("weight", Halves(first, second))
    found = ModelIdentity(module)
    before = found.current()
    second[0] += 1
    changed = found.current()
    assert changed != before
    module.weight = Halves(first, second.clone())
    assert found.current() == changed
    second[0] += 1  # no part of it any more
    assert found.current() == changed
    found.close()


@pytest.mark.parametrize("place", ["meta", "sparse"])
def test_weights_that_cannot_be_read_are_refused_in_one_line(place):
    model = tiny_llama()
    weight = model.lm_head.weight.data
    model.lm_head.weight = torch.nn.Parameter(weight.to("meta") if place == "meta" else weight.to_sparse())
    with pytest.raises(ConfigError, match=r"lm_head\.weight") as error:
        inspect_cache(model)
    assert "\n" not in str(error.value)


def test_offloaded_weights_are_refused_in_one_line():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(tiny_llama(), execution_device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="offload") as error:
        PrefixCache(model, MEMORY_ONLY)
    assert "\n" not in str(error.value)


def test_weights_offloaded_later_are_refused(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_llama()
    with PrefixCache(model, MEMORY_ONLY) as cache:
        cache.generate(tokens(40), max_new_tokens=1)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        with pytest.raises(ConfigError, match="offload"):
            cache.generate(tokens(40), max_new_tokens=1)


def test_angles_that_depend_on_the_length_of_the_prompt_are_refused():
    parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ConfigError, match="dynamic"):
        PrefixCache(tiny_llama(rope_parameters=parameters, max_position_embeddings=64), MEMORY_ONLY)


def test_what_cannot_be_described_is_like_nothing_but_itself(tmp_path):
    """A closure may compute anything: its KV is found as long as it is there, and never by another model."""
    model, prompt = tiny_llama(), tokens(100)
    layer = model.model.layers[0].mlp
    scale = 2.0
    with PrefixCache(model, tiers(tmp_path)) as cache:
        cache.generate(prompt, max_new_tokens=1)
        hook = layer.register_forward_hook(lambda module, args, output: output * scale)
        assert cache.generate(prompt, max_new_tokens=1).restored_tokens == 0
        assert cache.generate(prompt, max_new_tokens=1).restored_tokens == 96
        hook.remove()
        assert cache.generate(prompt, max_new_tokens=1).restored_tokens == 96
        layer.register_forward_hook(lambda module, args, output: output * scale)
        assert cache.generate(prompt, max_new_tokens=1).restored_tokens == 0
    with PrefixCache(model, tiers(tmp_path)) as cache:
        assert cache.generate(prompt, max_new_tokens=1).restored_tokens == 0


def scaled(module, hidden, scale):
    return type(module).forward(module, hidden) * scale


class Scaled:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, module, hidden):
        return scaled(module, hidden, self.scale)


def test_methods_without_a_name_of_their_own():
    """torchao binds a partial function to each layer whose weights it quantizes."""

    def with_method(function):
        model = tiny_llama()
        layer = model.model.layers[0].mlp
        layer.forward = MethodType(function, layer)
        return identity(model)

    doubled = with_method(functools.partial(scaled, scale=2.0))
    assert with_method(functools.partial(scaled, scale=2.0)) == doubled
    assert with_method(functools.partial(scaled, scale=3.0)) != doubled
    assert (
        len({with_method(function) for function in (Scaled(2.0), Scaled(2.0), lambda *_: None, lambda *_: None)}) == 4
    )


def test_hashing_does_not_depend_on_who_else_hashes():
    model = tiny_llama(hidden_size=512, intermediate_size=4096, vocab_size=9000)
    found = []
    threads = [threading.Thread(target=lambda: found.append(identity(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
