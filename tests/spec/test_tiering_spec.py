import logging
import re
import sys
from functools import partial
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


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"type": "CrashingTier"}, "ZeroDivisionError: a defect"),
        ({"type": "UnavailableTier"}, "nobody home"),
        ({"type": "OwnTier", "path": "p", "mood": "bad"}, "secondary_tiers[0].mood='bad': good only"),
        ({"type": "StubbornTier"}, "host='x': another host"),
        ({"type": "LeavingTier"}, "SystemExit: 3"),
        ({"type": "HalfStartedTier"}, "OSError: half way"),
        ({"type": "ForgetfulTier"}, "AttributeError"),
        ({"type": "ImpatientTier"}, "probe_deadline=-1"),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_a_tier_that_cannot_be_used_costs_that_tier_only(broken, reason, caplog):
    recorder = Recorder()
    name = broken["type"]
    tier = {**own(name), **broken}
    with (
        caplog.at_level(logging.ERROR),
        spec_of(tier, own("OpenTier"), keywords={"observers": [recorder]}) as spec,
    ):
        manager = spec.get_manager()
        store(manager, KEYS[:1])
        assert spec.wait_for_tiers(0) == {name: TierState.DOWN, "OpenTier": TierState.UP}
        state, said = manager.tier_states()[name]
        assert state is TierState.DOWN
        assert reason in said
        stats = manager.get_stats()
        assert (stats[f"{name}.up"], stats["OpenTier.up"]) == (0.0, 1.0)
        manager.reset_cache()
        manager.check_invariants()
    down = [event for event in recorder.events if isinstance(event, TierStateChanged) and event.tier == name]
    assert [event.state for event in down] == [TierState.DOWN]
    assert reason in down[0].reason
    lines = [record.getMessage() for record in caplog.records if name in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith(f"kvtier: tier {name} cannot be used, and the engine runs without it: ")


def test_a_tier_that_could_not_start_is_ended():
    from own_classes import HalfStartedTier  # found through the path that the fixture adds

    HalfStartedTier.ends = 0
    with spec_of(own("HalfStartedTier")) as spec:
        spec.get_manager()
        assert HalfStartedTier.ends == 1


WRONG_HERE = [
    ({"type": "disk", "path": "x", "capacity": "1KiB"}, "capacity"),
    ({"type": "disk", "path": "x", "capacity": "1GiB", "eviction_policy": "none"}, "eviction_policy"),
    ({"type": "disk", "path": ["x", "y"], "capacity": "1KiB"}, "capacity"),
    ({"type": "disk", "path": "x", "capacity": "1GiB", "secret_env": "KVTIER_NOT_SET"}, "secret_env"),
    ({"type": "disk", "path": "x", "capacity": "1GiB", "secret_file": "/nowhere/secret"}, "secret_file"),
    ({"type": "disk", "path": "x", "capacity": "1GiB", "encrypt": True}, "encrypt"),
    ({"type": "filesystem", "path": "x", "capacity": "1KiB"}, "capacity"),
    ({"type": "filesystem", "path": "x", "capacity": "1GiB", "secret_env": "KVTIER_NOT_SET"}, "secret_env"),
    ({"type": "memory", "capacity": "1B"}, "capacity"),
    ({"type": "memory", "capacity": "1GiB", "threads": 0}, "threads"),
    ({"type": "example", "custom_param": True}, "custom_param"),
    ({"type": "resp", "url": "http://host"}, "url"),
    ({"type": "resp", "url": "redis://host", "connections": 0}, "connections"),
    ({"type": "resp", "url": "redis://host", "password_env": "KVTIER_NOT_SET"}, "password_env"),
    ({"type": "resp", "url": "redis://host", "password_file": "/nowhere/password"}, "password_file"),
    ({"type": "resp", "url": "rediss://host", "tls_ca_file": "/nowhere/ca.pem"}, "tls_ca_file"),
    ({"type": "object", "url": "s3://bucket", "capacity": "1KiB"}, "capacity"),
    ({"type": "object", "url": "s3://bucket", "capacity": "1GiB", "tls_ca_file": "/nowhere/ca.pem"}, "tls_ca_file"),
]


@pytest.mark.parametrize(("tier", "key"), WRONG_HERE, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_options_are_refused_when_the_spec_is_made(tier, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVTIER_NOT_SET", raising=False)
    with pytest.raises(ConfigError, match=rf"^secondary_tiers\[0\]\.{key}") as caught:
        spec_of(tier)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())  # nothing is made by looking


@pytest.mark.parametrize(
    ("tier", "package", "extra"),
    [
        ({"type": "resp", "url": "redis://host"}, "redis", "kvtier[redis]"),
        ({"type": "object", "url": "s3://bucket", "capacity": "1GiB"}, "obstore", "kvtier[object]"),
        ({"type": "memory", "capacity": "1GiB"}, None, ""),
        ({"type": "disk", "path": "x", "capacity": "1GiB", "secret_env": "SECRET"}, "blake3", "kvtier[secure]"),
    ],
)
def test_a_missing_package_is_found_where_the_spec_is_made(tier, package, extra, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "long enough to be one")
    if package is None:
        spec_of(tier)
        return
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ConfigError, match=re.escape(extra)):
        spec_of(tier)


def test_a_fault_after_the_check_turns_off_only_that_tier(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "long enough to be one")
    guarded = {"type": "disk", "path": str(tmp_path / "x"), "capacity": "16MiB", "secret_env": "SECRET"}
    with spec_of(guarded, own("OpenTier")) as spec:
        monkeypatch.delenv("SECRET")
        states = spec.get_manager().tier_states()
        assert {name: state for name, (state, _) in states.items()} == {
            "disk": TierState.DOWN,
            "OpenTier": TierState.UP,
        }
        assert "secret_env" in states["disk"][1]


def test_an_io_process_that_cannot_load_its_store_turns_off_only_its_tier(caplog):
    with (
        caplog.at_level(logging.WARNING),
        spec_of(own("TierOfNothing"), own("ClientlessTier"), own("OpenTier")) as spec,
    ):
        states = spec.wait_for_tiers(PATIENCE_SECONDS)
        assert [states[name] for name in states] == [TierState.DOWN, TierState.DOWN, TierState.UP]
        reasons = spec.get_manager().tier_states()
        assert "no_such_module" in reasons["TierOfNothing"][1]
        assert "no client here" in reasons["ClientlessTier"][1]
        store(spec.get_manager(), KEYS[:1])
    lines = [record.getMessage() for record in caplog.records if "is down" in record.getMessage()]
    assert len(lines) == 2
    assert all("kvtier" in line for line in lines)


def test_a_tier_of_nobodys_blocks_costs_that_tier_only(tmp_path):
    disk = {"type": "disk", "path": str(tmp_path / "x"), "capacity": "16MiB"}
    config = OffloadingConfig(
        {"cpu_bytes_to_use": 1 << 20, "secondary_tiers": [disk, own("OpenTier")]}, (KVCacheGroup(16),), 4096
    )
    with TieringOffloadingSpec(config) as spec:
        states = spec.get_manager().tier_states()
        assert {name: state for name, (state, _) in states.items()} == {
            "disk": TierState.DOWN,
            "OpenTier": TierState.UP,
        }
        assert "namespace" in states["disk"][1]


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
    with spec_of(tier, prefill_rate=1.0) as spec:  # so slow that a busy machine does not compute instead
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
            f"secondary_tiers[1].path={str(path)!r}: a separate directory: this one and"
            " secondary_tiers[0].path contain each other"
        )
    assert len(spec_of(one, own("OwnTier", path=str(tmp_path / "one-more"))).tiers) == 2


def test_names():
    tiers = spec_of(own("OpenTier"), own("OpenTier"), own("OpenTier", name="ssd"), own("OwnTier", path="p")).tiers
    assert [tier.name for tier in tiers] == ["OpenTier-0", "OpenTier-1", "ssd", "OwnTier"]
    assert error_of(own("OpenTier", name="a"), own("OpenTier", name="a")) == (
        "secondary_tiers[1].name='a': another name: secondary_tiers[0] has this one"
    )
    assert error_of(own("OpenTier", name="primary")) == (
        "secondary_tiers[0].name='primary': another name: the primary tier has this one"
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
    assert (of_many.options["path"], of_many.options["capacity"]) == ("/somewhere/dp0", 2**30)
    (alone,) = spec_of(tier).tiers
    assert (alone.options["path"], alone.options["capacity"]) == ("/somewhere", 2**30)
    assert tier == {"type": "disk", "path": "/somewhere", "capacity": "1GiB"}


def test_data_parallel_ranks_share_a_directory_that_hosts_share():
    tier = {"type": "filesystem", "path": "/somewhere", "capacity": "1GiB"}
    for size in (4, None):
        (mine,) = spec_of(tier, said={"data_parallel_index": 1, "data_parallel_size": size}).tiers
        assert (mine.options["path"], mine.options["capacity"]) == ("/somewhere", 2**30)


@pytest.mark.parametrize(
    "tier", [own("LastingTier", path="/a"), {"type": "disk", "path": "/a", "capacity": "1GiB"}], ids=["own", "disk"]
)
def test_lasting_tiers_trust_no_adapter_names_unasked(tier):
    message = error_of(own("OpenTier"), tier, said={"uses_lora": True})
    assert message.startswith(
        "allow_lora=False: true expected, since secondary_tiers[1] keeps blocks and the engine uses LoRA: "
    )
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


def test_says_how_much_memory_a_long_prompt_needs(caplog):
    keys = [make_offload_key(bytes([1, index]) * 16, 0) for index in range(48)]
    tier = {"type": "memory", "capacity": "1MiB"}
    with spec_of(tier, promotion_budget=0.5, keywords={"inline_io": True}) as spec:
        manager = spec.get_manager()
        for start in range(0, 48, 8):
            store(manager, keys[start : start + 8])
            wait_for(partial(has_written, manager, start + 8), "the cascade")
        reader = ReqContext("reader", num_prompt_tokens=12 * 16)
        manager.on_new_request(reader)
        for key in keys[:12]:  # long gone from 16 slots
            manager.lookup(key, reader)
        manager.on_schedule_end(ScheduleEndContext())
    (said,) = [line for line in caplog.messages if "promotion_budget" in line]
    assert "computes 4 blocks that a tier has: with 64.0 KiB of host memory at most 8 blocks" in said
    assert "with cpu_bytes_to_use of 96.0 KiB these would have had room" in said


def has_written(manager, num_blocks):
    manager.on_schedule_end(ScheduleEndContext())
    return manager.get_stats().get("memory.blocks") == num_blocks
