import uuid
from pathlib import Path

import numpy as np
import pytest

import kvtier.registry as registry
from kvtier.abc import EvictionPolicy, SecondaryTierManager, TierContext
from kvtier.errors import ConfigError
from kvtier.registry import EvictionPolicyFactory, Registry, SecondaryTierFactory, create_secondary_tier
from kvtier.types import ReqContext

OWN = "own_classes"


@pytest.fixture(autouse=True)
def _modules_of_others(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "out_of_tree")


class Spec:
    tier_context = TierContext()


@pytest.fixture
def view():
    return memoryview(np.zeros((4, 4096), np.uint8))


def error_of(call, *args):
    with pytest.raises(ValueError) as caught:
        call(*args)
    assert isinstance(caught.value, ConfigError)
    message = str(caught.value)
    assert "\n" not in message
    return message


def own(class_name, /, **keys):
    return {"type": class_name, "module_path": OWN} | keys


def test_a_name_is_loaded_when_it_is_used():
    names = Registry("shape", EvictionPolicy)
    names.register("absent", "no.such.module", "Absent")
    names.register("own", OWN, "OwnPolicy")
    assert names.names() == ("absent", "own")
    assert "own" in names
    assert names.load("own").__name__ == "OwnPolicy"
    assert error_of(names.load, "absent") == (
        "shape='Absent': module 'no.such.module' cannot be imported (No module named 'no')"
    )


def test_an_alias_is_loaded_and_not_listed():
    names = Registry("shape", EvictionPolicy)
    names.register("own", OWN, "OwnPolicy")
    names.alias("former", "own")
    assert names.load("former") is names.load("own")
    assert names.names() == ("own",)


def test_a_name_is_registered_once():
    names = Registry("shape")
    names.register("round", "a.b", "C")
    with pytest.raises(ValueError, match=r'shape "round" is already registered, as a\.b\.C'):
        names.register("round", "x.y", "Z")


def test_unknown_names_list_the_known():
    names = Registry("shape")
    names.register("round", "a", "b")
    names.register("flat", "a", "b")
    assert error_of(names.load, "edgy") == "shape='edgy': supported are flat, round"
    assert error_of(names.load, ["edgy"]) == "shape=['edgy']: supported are flat, round"


def test_what_is_loaded_must_be_what_was_asked_for():
    names = Registry("shape", EvictionPolicy)
    names.register("no", OWN, "NoSpec")
    names.register("value", OWN, "not_a_class")
    names.register("missing", OWN, "Missing")
    assert error_of(names.load, "no") == (
        "shape='NoSpec': <class 'own_classes.NoSpec'> is no subclass of EvictionPolicy"
    )
    assert error_of(names.load, "value") == "shape='not_a_class': 3 is no subclass of EvictionPolicy"
    assert error_of(names.load, "missing") == f"shape='Missing': module {OWN!r} has no such name"
    calls = Registry("call")
    calls.register("value", OWN, "not_a_class")
    assert error_of(calls.load, "value") == "call='not_a_class': a callable expected"


@pytest.mark.parametrize("name", ["lru", "arc", "s3fifo", "tinylfu", "prefix", "auto"])
def test_policies_by_name(name):
    policy = EvictionPolicyFactory.create_policy(name, 3)
    assert isinstance(policy, EvictionPolicy)
    assert policy.capacity == 3


def test_registered_policies():
    name = f"own-{uuid.uuid4()}"
    EvictionPolicyFactory.register_policy(name, OWN, "OwnPolicy")
    assert type(EvictionPolicyFactory.create_policy(name, 3)).__name__ == "OwnPolicy"
    with pytest.raises(ValueError, match="already registered"):
        EvictionPolicyFactory.register_policy(name, OWN, "OwnPolicy")
    assert error_of(EvictionPolicyFactory.create_policy, "none", 3).startswith("eviction_policy='none': supported are ")


@pytest.mark.parametrize("tier_type", ["disk", "memory", "resp", "filesystem", "mooncake", "example"])
def test_built_in_tiers(tier_type):
    assert issubclass(SecondaryTierFactory.get_tier_class({"type": tier_type}), SecondaryTierManager)


def test_a_tier_gets_its_options_and_nothing_else(view):
    config = own("OwnTier", path="p", ways=3, name="fast", admission="second_touch")
    before = dict(config)
    tier = create_secondary_tier(config, view, Spec)
    assert config == before
    assert (tier.path, tier.ways, tier.tier_type, tier.started) == ("p", 3, "fast", 0)
    assert tier.primary_kv_view is view
    assert tier.offloading_spec is Spec
    assert create_secondary_tier(own("OpenTier", a=1, b=[2]), view, Spec).options == {"a": 1, "b": [2]}


def test_registered_tiers(view):
    name = f"own-{uuid.uuid4()}"
    SecondaryTierFactory.register_tier(name, OWN, "OpenTier")
    assert SecondaryTierFactory.create_secondary_tier({"type": name}, view, Spec).tier_type == name
    with pytest.raises(ValueError, match="already registered"):
        SecondaryTierFactory.register_tier(name, OWN, "OpenTier")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"path": "p"}, "tier_config.type=None: required, the type of the tier"),
        (own("Missing"), f"tier_config.type='Missing': module {OWN!r} has no such name"),
        ({"type": "X", "module_path": "no.such"}, "tier_config.type='X': module 'no.such' cannot be imported"),
        (own("not_a_class"), "tier_config.type='not_a_class': 3 is no class"),
        (own("NoSpec"), "tier_config.type='NoSpec': "),
        (own("OwnTier"), "tier_config.path=None: required, str expected"),
        (own("OwnTier", path=3), "tier_config.path=3: expected str, got int"),
        (own("OwnTier", path="p", ways=True), "tier_config.ways=True: expected int, got bool"),
        (
            own("OwnTier", path="p", wys=1),
            'tier_config.wys=1: unknown key, did you mean "ways"? known are mood, path, ways',
        ),
        (own("OwnTier", path="p", mood="bad"), "tier_config.mood='bad': good only"),
        (own("OpenTier", tier_type="x"), "tier_config.tier_type='x': set by kvtier, not by a configuration"),
    ],
)
def test_wrong_tier_configurations(config, message, view):
    assert error_of(create_secondary_tier, config, view, Spec).startswith(message)


def test_unknown_types_list_the_supported(view):
    message = error_of(create_secondary_tier, {"type": "tape"}, view, Spec)
    assert message.startswith("tier_config.type='tape': supported are ")
    assert all(name in message for name in ("disk", "example", "memory"))


def test_the_first_interface_is_adapted(view):
    tier = create_secondary_tier(own("FirstInterfaceTier", size=7), view, Spec)
    assert isinstance(tier, SecondaryTierManager)
    assert list(tier.get_finished_jobs()) == []
    assert error_of(create_secondary_tier, own("FirstInterfaceTier", siz=7), view, Spec) == (
        'tier_config.siz=7: unknown key, did you mean "size"? known are size'
    )
    tier.on_request_finished(ReqContext("r"))


def test_workers_are_named():
    assert registry.WORKERS.names() == ("cpu-numpy", "torch")
