import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.errors import ConfigError
from kvtier.spec.cpu import CPUOffloadingSpec
from kvtier.spec.factory import OffloadingSpecFactory, create_spec
from kvtier.spec.tiering import TieringOffloadingSpec


@pytest.fixture(autouse=True)
def _modules_of_others(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "out_of_tree")


def config(**keys):
    return OffloadingConfig({"cpu_bytes_to_use": "64KiB"} | keys, (KVCacheGroup(16),), 4096)


def error_of(call, *args):
    with pytest.raises(ValueError) as caught:
        call(*args)
    assert isinstance(caught.value, ConfigError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_default_is_the_primary_tier_alone():
    assert type(create_spec(config())) is CPUOffloadingSpec
    assert OffloadingSpecFactory.get_spec_cls({}) is CPUOffloadingSpec


def test_specs_by_name():
    spec = create_spec(config(spec_name="TieringOffloadingSpec"))
    assert type(spec) is TieringOffloadingSpec
    assert isinstance(spec, CPUOffloadingSpec)


def test_unknown_names_list_the_supported():
    message = error_of(create_spec, config(spec_name="Tape"))
    assert message.startswith("spec_name='Tape': supported are ")
    assert "CPUOffloadingSpec" in message
    assert "TieringOffloadingSpec" in message
    assert error_of(create_spec, config(spec_name=3)).startswith("spec_name=3: a name expected, supported are ")


def test_a_module_path_loads_an_out_of_tree_spec():
    said = config(spec_name="OwnSpec", spec_module_path="own_classes", anything=1)
    assert create_spec(said).given == (said,)


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("NoSpec", "own_classes", "spec_name='NoSpec': <class 'own_classes.NoSpec'> is no subclass of OffloadingSpec"),
        ("Missing", "own_classes", "spec_name='Missing': module 'own_classes' has no such name"),
        ("X", "no.such", "spec_name='X': module 'no.such' cannot be imported (No module named 'no')"),
        ("X", 3, "spec_module_path=3: the name of a module expected"),
    ],
)
def test_wrong_out_of_tree_specs(name, module, message):
    assert error_of(create_spec, config(spec_name=name, spec_module_path=module)) == message


def test_a_name_is_registered_once():
    name = f"Own-{uuid.uuid4()}"
    OffloadingSpecFactory.register_spec(name, "own_classes", "OwnSpec")
    assert type(create_spec(config(spec_name=name))).__name__ == "OwnSpec"
    with pytest.raises(ValueError, match="already registered"):
        OffloadingSpecFactory.register_spec(name, "own_classes", "OwnSpec")


def pair(**extra):
    engine = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_connector_extra_config={"cpu_bytes_to_use": "1MiB"} | extra, engine_id="engine-7"
        ),
        model_config=SimpleNamespace(model="org/model", dtype="bfloat16"),
        cache_config=SimpleNamespace(block_size=16, cache_dtype="auto"),
        parallel_config=SimpleNamespace(world_size=2),
    )
    cache = SimpleNamespace(
        num_blocks=10,
        kv_cache_tensors=[SimpleNamespace(size=40960), SimpleNamespace(size=40960)],
        kv_cache_groups=[
            SimpleNamespace(layer_names=["a", "b"], kv_cache_spec=SimpleNamespace(block_size=16)),
        ],
    )
    return engine, cache


def test_the_earlier_pair_says_the_same():
    spec = create_spec(*pair(block_size=32))
    said = spec.config
    assert said.groups == (KVCacheGroup(16, ("a", "b")),)
    assert said.engine_block_bytes == 2 * 8192
    assert (said.engine_id, said.world_size, said.uses_lora) == ("engine-7", 2, False)
    assert spec.block_bytes == 2 * 16384
    assert spec.engine_blocks_per_block == 2
    assert spec.tier_context.namespace.identity["model"] == "org/model"
    assert spec.tier_context.namespace.identity["dtype"] == "bfloat16"


def test_out_of_tree_specs_get_the_pair_as_it_was():
    engine, cache = pair(spec_name="OwnSpec", spec_module_path="own_classes")
    assert create_spec(engine, cache).given == (engine, cache)


@pytest.mark.parametrize(
    "path",
    [
        "kv_transfer_config",
        "kv_transfer_config.kv_connector_extra_config",
        "kv_transfer_config.engine_id",
        "model_config.model",
        "cache_config.block_size",
        "cache_config.cache_dtype",
        "parallel_config.world_size",
    ],
)
def test_missing_attributes_of_the_engine_are_named(path):
    engine, cache = pair()
    *parents, last = path.split(".")
    holder = engine
    for name in parents:
        holder = getattr(holder, name)
    delattr(holder, last)
    assert error_of(create_spec, engine, cache).startswith(f"config.{path}=None: missing")


@pytest.mark.parametrize("name", ["num_blocks", "kv_cache_tensors", "kv_cache_groups"])
def test_missing_attributes_of_the_cache_are_named(name):
    engine, cache = pair()
    delattr(cache, name)
    assert error_of(create_spec, engine, cache).startswith(f"kv_cache_config.{name}=None: missing")


def test_missing_attributes_of_parts_are_named():
    engine, cache = pair()
    del cache.kv_cache_tensors[1].size
    assert error_of(create_spec, engine, cache).startswith("kv_cache_config.kv_cache_tensors[1].size=None: missing")
    engine, cache = pair()
    cache.kv_cache_groups[0].kv_cache_spec = None
    assert error_of(create_spec, engine, cache).startswith("kv_cache_config.kv_cache_groups[0].kv_cache_spec=None")


@pytest.mark.parametrize("value", [None, "two", True])
def test_numbers_of_the_pair_must_be_numbers(value):
    engine, cache = pair()
    cache.num_blocks = value
    assert error_of(create_spec, engine, cache) == f"kv_cache_config.num_blocks={value!r}: an int, at least 1, expected"


def test_neither_form_is_an_error():
    assert error_of(create_spec, {"cpu_bytes_to_use": 1}).startswith("config.kv_transfer_config=None: missing on dict")
    assert error_of(create_spec, pair()[0]).startswith("kv_cache_config.num_blocks=None: missing on NoneType")
