import logging

import msgspec
import pytest

from kvtier.config import (
    CPUConfig,
    KVCacheGroup,
    OffloadingConfig,
    TieringConfig,
    TrustedWeights,
    engine_blocks_per_block,
    json_schema,
    parse_config,
    primary_blocks,
)
from kvtier.errors import ConfigError
from kvtier.tier_config import parse_tier
from kvtier.tiering.settings import ResetPolicy, TieringSettings
from kvtier.types import Admission

SIZED = {"cpu_bytes_to_use": "1MiB"}
GROUPS = (KVCacheGroup(16, ("layer.0",)),)


def error_of(call, *args, **keywords):
    with pytest.raises(ValueError) as caught:
        call(*args, **keywords)
    assert isinstance(caught.value, ConfigError)
    message = str(caught.value)
    assert "\n" not in message
    return message


def parse(kind=TieringConfig, **keys):
    return parse_config(SIZED | keys, kind)


@pytest.mark.parametrize(
    ("keys", "start"),
    [
        ({"evction_policy": "lru"}, "evction_policy='lru': unknown key, did you mean \"eviction_policy\"? known are "),
        ({"cpu_bytes_to_use": 0}, 'cpu_bytes_to_use=0: an int or a string like "10GiB", at least 1 bytes'),
        ({"cpu_bytes_to_use": -1}, "cpu_bytes_to_use=-1: an int or a string"),
        ({"cpu_bytes_to_use": "10 XB"}, "cpu_bytes_to_use='10 XB': an int or a string"),
        ({"cpu_bytes_to_use": True}, "cpu_bytes_to_use=True: an int or a string"),
        ({"cpu_bytes_to_use": 1.5}, "cpu_bytes_to_use=1.5: an int or a string"),
        ({"block_size": "16"}, "block_size='16': expected int | None, got str"),
        ({"block_size": True}, "block_size=True: expected int | None, got bool"),
        ({"block_size": 0}, "block_size=0: expected int >= 1"),
        ({"blocks_per_chunk": -2}, "blocks_per_chunk=-2: expected int >= 1"),
        ({"eviction_policy": 3}, "eviction_policy=3: expected str, got int"),
        ({"load_deadline": 0}, "load_deadline=0: expected float > 0.0"),
        ({"probe_deadline": float("nan")}, "probe_deadline=nan: expected float > 0.0"),
        ({"lease_timeout": float("inf")}, "lease_timeout=inf: a finite number expected"),
        ({"drain_timeout": -1}, "drain_timeout=-1: expected float > 0.0"),
        ({"tier_deadline": True}, "tier_deadline=True: expected float, got bool"),
        ({"promotion_budget": 1.5}, "promotion_budget=1.5: expected float"),
        ({"promotion_budget": 0}, "promotion_budget=0: expected float"),
        ({"prefill_rate": 0}, "prefill_rate=0: expected float > 0.0"),
        ({"on_reset": "maybe"}, 'on_reset=\'maybe\': one of "new_epoch", "keep"'),
        ({"allow_lora": "yes"}, "allow_lora='yes': expected bool, got str"),
        ({"trust_weights": "names"}, 'trust_weights=\'names\': one of "contents", "name"'),
        ({"trust_weights": True}, 'trust_weights=True: one of "contents", "name"'),
        ({"offload_prompt_only": 1}, "offload_prompt_only=1: expected bool | None, got int"),
        ({"self_describing_kv_events": None}, "self_describing_kv_events=None: expected bool, got None"),
        ({"sync_load_budget_bytes": -1}, "sync_load_budget_bytes=-1: expected int >= 0"),
        ({"secondary_tiers": {"type": "disk"}}, "secondary_tiers={'type': 'disk'}: expected list, got mapping"),
        ({"secondary_tiers": ["disk"]}, "secondary_tiers[0]='disk': expected mapping, got str"),
        (
            {"canonical_layout": True},
            "canonical_layout=True: false only: kvtier stores each rank's own layout, and the namespace keeps ranks",
        ),
        ({7: 1}, "7=1: unknown key; known are "),
    ],
)
def test_every_wrong_key_is_named(keys, start):
    assert error_of(parse_config, SIZED | keys, TieringConfig).startswith(start)


def test_weights_are_told_apart_by_their_contents_unless_names_are_trusted():
    assert parse().trust_weights is TrustedWeights.CONTENTS
    assert parse(trust_weights="name").trust_weights is TrustedWeights.NAME


def test_the_size_is_required():
    assert error_of(parse_config, {}, CPUConfig).startswith("cpu_bytes_to_use=None: an int or a string")


def test_only_the_tiering_spec_has_tiers():
    assert error_of(parse, CPUConfig, secondary_tiers=[]) == (
        'secondary_tiers=[]: spec_name "TieringOffloadingSpec" has tiers, this one has none'
    )


def test_what_vllm_reads_from_the_same_mapping_is_known():
    user = parse(
        spec_name="X",
        spec_module_path="a.b",
        block_size=32,
        offload_prompt_only=True,
        self_describing_kv_events=True,
        sync_load_budget_bytes=1 << 20,
        canonical_layout=False,
    )
    assert (user.block_size, user.offload_prompt_only) == (32, True)


def test_defaults_are_those_of_the_settings():
    assert parse().settings(0, False) == TieringSettings()
    assert parse(on_reset="keep").settings(16, True) == TieringSettings(
        tokens_per_block=16, kv_events=True, on_reset=ResetPolicy.KEEP
    )


def test_the_caller_s_mapping_is_not_changed():
    given = SIZED | {"secondary_tiers": [{"type": "memory", "name": "m", "x": 1}]}
    before = msgspec.json.encode(given)
    parse_tier(parse_config(given, TieringConfig).secondary_tiers[0])
    assert msgspec.json.encode(given) == before


def test_the_engine_block_is_the_default_block():
    assert engine_blocks_per_block(parse(), GROUPS) == 1
    assert engine_blocks_per_block(parse(block_size=64), GROUPS) == 4
    assert engine_blocks_per_block(parse(blocks_per_chunk=3), GROUPS) == 3
    assert engine_blocks_per_block(parse(block_size=48, blocks_per_chunk=3), GROUPS) == 3


def test_a_block_is_whole_engine_blocks():
    assert error_of(engine_blocks_per_block, parse(block_size=40), GROUPS) == (
        "block_size=40: a multiple of the engine block, 16 tokens"
    )
    assert error_of(engine_blocks_per_block, parse(block_size=8), GROUPS).startswith("block_size=8: a multiple")


def test_both_spellings_of_the_block_must_agree():
    assert error_of(engine_blocks_per_block, parse(block_size=64, blocks_per_chunk=2), GROUPS) == (
        "blocks_per_chunk=2: 4, or absent: block_size=64 is 4 engine blocks of 16 tokens"
    )


def test_groups_of_different_blocks_want_the_count():
    groups = (*GROUPS, KVCacheGroup(32))
    assert error_of(engine_blocks_per_block, parse(block_size=64), groups) == (
        "block_size=64: the groups have engine blocks of [16, 32] tokens; set blocks_per_chunk (engine blocks) instead"
    )
    assert engine_blocks_per_block(parse(blocks_per_chunk=2), groups) == 2


def test_the_primary_holds_at_least_one_block():
    assert primary_blocks(parse(cpu_bytes_to_use=8191), 4096) == 1
    assert error_of(primary_blocks, parse(cpu_bytes_to_use="4KiB"), 8192) == (
        "cpu_bytes_to_use='4KiB': at least 8192 bytes, one block"
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"groups": ()}, "groups=(): at least one KV cache group"),
        ({"engine_block_bytes": 0}, "engine_block_bytes=0: an int, at least 1, expected"),
        ({"engine_block_bytes": True}, "engine_block_bytes=True: an int, at least 1, expected"),
        ({"extra_config": None}, "extra_config=None: a mapping of option names to values expected"),
        (
            {"engine_block_bytes": 4097, "world_size": 2},
            "engine_block_bytes=4097: a multiple of world_size=2: each worker has an equal share of a block",
        ),
        ({"rank": 1}, "rank=1: 0 to 0, for world_size=1"),
        (
            {"data_parallel_index": 2, "data_parallel_size": 2},
            "data_parallel_index=2: 0 to 1, for data_parallel_size=2",
        ),
        ({"data_parallel_index": -1, "data_parallel_size": None}, "data_parallel_index=-1: an int, at least 0"),
    ],
)
def test_values_of_the_engine_are_checked(keys, message):
    said = {"extra_config": SIZED, "groups": GROUPS, "engine_block_bytes": 4096} | keys
    assert error_of(lambda: OffloadingConfig(**said)) == message


def test_a_group_has_tokens():
    assert error_of(KVCacheGroup, 0) == "tokens_per_block=0: an int, at least 1, expected"


def test_common_tier_keys_are_taken_out():
    tier = parse_tier({"type": "disk", "admission": "second_touch", "name": "ssd", "path": "/x", "y": 1}, "t[0]")
    assert (tier.tier_type, tier.name, tier.admission) == ("disk", "ssd", Admission.SECOND_TOUCH)
    assert tier.options == {"path": "/x", "y": 1}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "t[0].type=None: required, the type of the tier"),
        ({"type": 3}, "t[0].type=3: expected str, got int"),
        ({"type": ""}, "t[0].type='': expected str of length >= 1"),
        (
            {"type": "disk", "admission": "never"},
            't[0].admission=\'never\': one of "always", "second_touch", "prompt_only"',
        ),
        ({"type": "disk", "module_path": 3}, "t[0].module_path=3: expected str, got int"),
        ("disk", "t[0]='disk': a mapping with at least \"type\" expected"),
    ],
)
def test_common_tier_keys_are_checked(entry, message):
    assert error_of(parse_tier, entry, "t[0]") == message


def test_the_schema_lists_every_key():
    properties = json_schema()["$defs"]["TieringConfig"]["properties"]
    assert set(properties) == {field.name for field in msgspec.structs.fields(TieringConfig)}
    assert json_schema()["$defs"]["TieringConfig"]["additionalProperties"] is False
    assert json_schema()["$defs"]["TieringConfig"]["required"] == ["cpu_bytes_to_use"]
    assert "secondary_tiers" not in json_schema(CPUConfig)["$defs"]["CPUConfig"]["properties"]


def test_an_option_with_a_former_name_still_works_and_is_named_in_the_log(caplog):
    with caplog.at_level(logging.WARNING):
        assert parse(job_deadline=7.0).tier_deadline == 7.0
    assert "kvtier: the option job_deadline is now called tier_deadline" in caplog.text
    with pytest.raises(ConfigError, match="not together with tier_deadline"):
        parse(job_deadline=7.0, tier_deadline=8.0)
    with pytest.raises(ConfigError, match="tier_deadline=True"):
        parse(job_deadline=True)
