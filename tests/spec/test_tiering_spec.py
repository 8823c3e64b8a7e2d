import logging
from pathlib import Path

import pytest

from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.errors import ConfigError
from kvtier.events import TierState, TierStateChanged
from kvtier.keys import make_offload_key
from kvtier.namespace import Namespace
from kvtier.registry import EvictionPolicyFactory
from kvtier.spec.tiering import TieringOffloadingSpec
from kvtier.testing.patience import PATIENCE_SECONDS, wait_for
from kvtier.types import Admission, LookupResult, ReqContext, ScheduleEndContext

KEYS = [make_offload_key(bytes([i]) * 32, 0) for i in range(4)]
SAID = {
    "groups": (KVCacheGroup(16, ("layer.0",)),),
    "engine_block_bytes": 4096,
    "namespace": Namespace({"model": "m"}),
}


@pytest.fixture(autouse=True)
def _modules_of_others(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "out_of_tree")


class Recorder:
    def __init__(self):
        self.events = []

    def on_event(self, event):
        self.events.append(event)


def own(class_name, /, **keys):
    return {"type": class_name, "module_path": "own_classes"} | keys


def spec_of(*tiers, said=None, keywords=None, **keys):
    extra = {"cpu_bytes_to_use": "64KiB", "secondary_tiers": list(tiers)} | keys
    return TieringOffloadingSpec(OffloadingConfig(extra, **(SAID | (said or {}))), **(keywords or {}))


def error_of(*tiers, **keys):
    with pytest.raises(ConfigError) as caught:
        spec_of(*tiers, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def store(manager, keys):
    request = ReqContext("writer")
    manager.on_new_request(request)
    assert manager.prepare_store(keys, request).keys_to_store == keys
    manager.complete_store(keys, request)
    manager.on_request_finished(request)
    manager.on_schedule_end(ScheduleEndContext())


def test_no_tier_is_allowed():
    with spec_of() as spec:
        assert spec.get_manager().tier_states() == {}
        assert spec.wait_for_tiers(0) == {}


def test_tiers_are_made_and_started_once():
    config = own("OpenTier", size=3)
    with spec_of(config) as spec:
        assert spec.secondary_tier_configs == [config]
        manager = spec.get_manager()
        assert spec.get_manager() is manager
        assert spec.wait_for_tiers(0) == {"OpenTier": TierState.UP}


def test_options_are_checked_before_anything_is_made():
    assert error_of(own("OwnTier", path="p"), own("OwnTier", path="q", ways="4")) == (
        "secondary_tiers[1].ways='4': expected int, got str"
    )
    assert error_of({"path": "p"}) == "secondary_tiers[0].type=None: required, the type of the tier"
    assert error_of({"type": "tape"}).startswith("secondary_tiers[0].type='tape': supported are ")
    assert error_of({"type": "example", "custom": 1}) == (
        'secondary_tiers[0].custom=1: unknown key, did you mean "custom_param"? known are custom_param'
    )


def test_a_constructor_that_refuses_an_option_stops():
    spec = spec_of(own("OwnTier", path="p", mood="bad"))
    with pytest.raises(ConfigError) as caught:
        spec.get_manager()
    assert str(caught.value) == "secondary_tiers[0].mood='bad': good only"


def test_a_start_that_refuses_an_option_ends_the_tiers_before_it():
    from own_classes import OpenTier  # found through the path that the fixture adds

    ended = []
    original, OpenTier.shutdown = OpenTier.shutdown, lambda tier: ended.append(tier)
    try:
        with pytest.raises(ConfigError, match="host='x': another host"):
            spec_of(own("OpenTier"), own("StubbornTier")).get_manager()
    finally:
        OpenTier.shutdown = original
    assert [type(tier).__name__ for tier in ended] == ["OpenTier"]


@pytest.mark.parametrize(("broken", "reason"), [("CrashingTier", "a defect"), ("UnavailableTier", "nobody home")])
def test_a_tier_that_cannot_start_leaves_the_engine_running(broken, reason, caplog):
    recorder = Recorder()
    with (
        caplog.at_level(logging.ERROR),
        spec_of(own(broken), own("OpenTier"), keywords={"observers": [recorder]}) as spec,
    ):
        store(spec.get_manager(), KEYS[:1])
        assert spec.wait_for_tiers(0) == {broken: TierState.DOWN, "OpenTier": TierState.UP}
    down = [event for event in recorder.events if isinstance(event, TierStateChanged) and event.tier == broken]
    assert [event.state for event in down] == [TierState.DOWN]
    assert reason in down[0].reason
    assert sum(f"tier {broken} cannot be used" in record.getMessage() for record in caplog.records) == 1


def test_a_tier_over_an_unusable_directory_leaves_the_engine_running(tmp_path):
    (tmp_path / "file").write_text("no directory")
    with spec_of({"type": "disk", "path": str(tmp_path / "file"), "capacity": "16MiB"}) as spec:
        assert spec.wait_for_tiers(PATIENCE_SECONDS) == {"disk": TierState.DOWN}
        store(spec.get_manager(), KEYS[:1])


def test_blocks_come_back_from_the_disk(tmp_path):
    tier = {"type": "disk", "path": str(tmp_path), "capacity": "64MiB"}
    with spec_of(tier) as spec:
        assert spec.wait_for_tiers(PATIENCE_SECONDS) == {"disk": TierState.UP}
        manager = spec.get_manager()
        for slot in range(4):
            spec.arena.row(slot)[:] = bytes([slot]) * spec.block_bytes
        store(manager, KEYS)
        wait_for(lambda: manager.tier_states() and manager.get_stats().get("disk.blocks") == 4)
    with spec_of(tier) as spec:
        assert spec.wait_for_tiers(PATIENCE_SECONDS) == {"disk": TierState.UP}
        manager, request = spec.get_manager(), ReqContext("reader")
        manager.on_new_request(request)

        def all_hit():
            answers = [manager.lookup(key, request) for key in KEYS]
            manager.on_schedule_end(ScheduleEndContext())
            return answers == [LookupResult.HIT] * 4

        wait_for(all_hit)
        slots = manager.prepare_load(KEYS, request).block_ids
        found = [bytes(spec.arena.row(int(slot))) for slot in slots]
        manager.complete_load(KEYS, request)
        manager.on_request_finished(request)
        contents = {payload[:1] for payload in found}
        assert contents == {bytes([slot]) for slot in range(4)}
        assert all(payload == payload[:1] * spec.block_bytes for payload in found)


def test_two_tiers_need_two_directories(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "one")
    (tmp_path / "one").mkdir()
    one = own("OwnTier", path=str(tmp_path / "one"))
    for path in (
        tmp_path / "one",
        tmp_path / "link",
        tmp_path / "one" / ".." / "one",
        tmp_path / "one" / "in",
        tmp_path,
    ):
        assert error_of(one, own("OwnTier", path=str(path))) == (
            f"secondary_tiers[1].path={str(path)!r}: a directory of its own, neither in nor around that of"
            " secondary_tiers[0].path"
        )
    assert len(spec_of(one, own("OwnTier", path=str(tmp_path / "one-more"))).tiers) == 2


def test_names():
    tiers = spec_of(own("OpenTier"), own("OpenTier"), own("OpenTier", name="ssd"), own("OwnTier", path="p")).tiers
    assert [tier.name for tier in tiers] == ["OpenTier-0", "OpenTier-1", "ssd", "OwnTier"]
    assert error_of(own("OpenTier", name="a"), own("OpenTier", name="a")) == (
        "secondary_tiers[1].name='a': another name, secondary_tiers[0] has this one"
    )
    assert error_of(own("OpenTier", name="primary")) == (
        "secondary_tiers[0].name='primary': another name, the primary tier has this one"
    )


@pytest.mark.parametrize(
    ("given", "tiers", "admissions", "prompts_only"),
    [
        (None, [None], ["always"], False),
        (None, [], [], False),
        (None, ["prompt_only"], ["prompt_only"], True),
        (None, ["prompt_only", "second_touch"], ["prompt_only", "second_touch"], False),
        (True, [None, "always"], ["prompt_only", "always"], True),
        (False, [None, "prompt_only"], ["always", "prompt_only"], False),
        (False, ["prompt_only"], ["prompt_only"], False),
        (True, [], [], True),
    ],
)
def test_prompts_only_follows_from_admission(given, tiers, admissions, prompts_only):
    configs = [own("OpenTier") | ({} if rule is None else {"admission": rule}) for rule in tiers]
    spec = spec_of(*configs, **({} if given is None else {"offload_prompt_only": given}))
    assert [tier.admission for tier in spec.tiers] == [Admission(rule) for rule in admissions]
    assert spec.offload_prompt_only is prompts_only


def test_each_data_parallel_rank_has_a_directory_and_a_share():
    tier = {"type": "disk", "path": "/somewhere", "capacity": "1GiB"}
    (mine,) = spec_of(tier, said={"data_parallel_index": 1, "data_parallel_size": 4}).tiers
    assert (mine.options["path"], mine.options["capacity"]) == ("/somewhere/dp1", 2**28)
    (of_many,) = spec_of(tier, said={"data_parallel_index": 0, "data_parallel_size": None}).tiers
    assert (of_many.options["path"], of_many.options["capacity"]) == ("/somewhere/dp0", "1GiB")
    (alone,) = spec_of(tier).tiers
    assert (alone.options["path"], alone.options["capacity"]) == ("/somewhere", "1GiB")
    assert tier == {"type": "disk", "path": "/somewhere", "capacity": "1GiB"}


@pytest.mark.parametrize(
    "tier", [own("LastingTier", path="/a"), {"type": "disk", "path": "/a", "capacity": "1GiB"}], ids=["own", "disk"]
)
def test_lasting_tiers_trust_no_adapter_names_unasked(tier):
    message = error_of(own("OpenTier"), tier, said={"uses_lora": True})
    assert message.startswith("allow_lora=False: must be true for secondary_tiers[1] to start with LoRA: ")
    assert len(spec_of(tier, said={"uses_lora": True}, allow_lora=True).tiers) == 1
    assert len(spec_of(tier).tiers) == 1
    assert len(spec_of({"type": "memory", "capacity": "1MiB"}, said={"uses_lora": True}).tiers) == 1


def test_registered_policies_reach_the_tiers():
    name = "own-for-tiers"
    EvictionPolicyFactory.register_policy(name, "own_classes", "OwnPolicy")
    spec = spec_of({"type": "disk", "path": "/a", "capacity": "1GiB", "eviction_policy": name})
    assert {key: kind.__name__ for key, kind in spec.tier_context.policies.items()} == {name: "OwnPolicy"}


def test_first_interface_tiers_see_the_engine_s_config():
    with spec_of(own("FirstInterfaceTier", size=2)) as spec:
        assert spec.vllm_config is None
        assert spec.wait_for_tiers(0) == {"FirstInterfaceTier": TierState.UP}
        store(spec.get_manager(), KEYS[:1])
