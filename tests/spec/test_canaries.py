"""A secret put into any option of any tier is shown by nothing: no error, log, representation, dump or recording.

The options are those that the registered tiers declare, so that a new one is covered from its first day.
"""

import functools
import inspect
import io
import json
import logging
import traceback
from pathlib import Path

import pytest

from kvtier.config import KVCacheGroup, OffloadingConfig, TieringConfig, parse_config
from kvtier.errors import KVTierError
from kvtier.events import TierState
from kvtier.log import logger
from kvtier.namespace import Namespace
from kvtier.options import options_type_of
from kvtier.redaction import is_secret, shown_option
from kvtier.registry import TIERS, construct_tier
from kvtier.spec.tiering import TieringOffloadingSpec
from kvtier.testing.patience import PATIENCE_SECONDS, wait_for
from kvtier.types import ScheduleEndContext

CANARY = "c4n4ry-Sup3rS3cret"
GOOD = {
    "disk": {"path": "disk", "capacity": "4MiB"},
    "resp": {"url": "redis://127.0.0.1:1"},
    "object": {"url": "s3://bucket/kvtier", "capacity": "1GiB", "endpoint": "https://127.0.0.1:1", "region": "x"},
    "filesystem": {"path": "shared", "capacity": "64MiB"},
    "memory": {"capacity": "1MiB"},
    "mooncake": {"master": "127.0.0.1:1"},
    "example": {},
}
ADDRESSES = [
    f"redis://user:{CANARY}@127.0.0.1:1",
    f"redis://{CANARY}@127.0.0.1:1",
    f"redis://127.0.0.1:1?password={CANARY}",
    f"redis://127.0.0.1:1/0?password={CANARY}",
    f"redis://127.0.0.1:1/{CANARY}",
    f"redis://127.0.0.1:1#{CANARY}",
    f"redis://user:{CANARY}/x@127.0.0.1:1",
    f"redis://user:a@{CANARY}@127.0.0.1:1",
    f"redis://user:{CANARY}@127.0.0.1:port",
    f"redis://127.0.0.1:{CANARY}",
    f"rediss://[{CANARY}",
    f"valkey://u:{CANARY}@h:1,redis://h:2",
    f"http://u:{CANARY}@127.0.0.1:1",
    f"https://u:{CANARY}@127.0.0.1:1",
    f"https://127.0.0.1:1?sig={CANARY}",
    f"https://127.0.0.1:1/#{CANARY}",
    f"s3://{CANARY}:x@bucket/prefix",
    f"s3://bucket/prefix?X-Amz-Signature={CANARY}",
    f"az://u:{CANARY}@container",
    f"unix://u:{CANARY}@/run/valkey.sock",
]
SECRETS = [
    "password",
    "secret",
    "secret_access_key",
    "aws_secret_access_key",
    "account_key",
    "token",
    "auth",
    "api_key",
    "pwd",
    "sas_token",
    "credentials",
    "connection_string",
]


def options_of(tier_type):
    """Return the names of a tier's options: fields of its struct, or keywords of its constructor."""
    tier_class = TIERS.load(tier_type)
    if (options_type := options_type_of(tier_class)) is not None:
        return sorted(options_type.__struct_fields__)
    keywords = inspect.signature(tier_class.__init__).parameters.values()
    return sorted(parameter.name for parameter in keywords if parameter.kind is parameter.KEYWORD_ONLY)


def plants():
    for tier_type in TIERS.names():
        if tier_type not in GOOD:
            continue  # registered by another test
        for option in options_of(tier_type):
            values = [*ADDRESSES, [ADDRESSES[0]], [ADDRESSES[2], ADDRESSES[2]], {"url": ADDRESSES[0]}]
            if is_secret(option):
                values += [CANARY, f"/nowhere/{CANARY}", f"{CANARY}\0", f"{CANARY}\ud800", [CANARY], CANARY.encode()]
            if option in ("url", "endpoint"):
                values += [CANARY, f"user:{CANARY}@host:1", f"//user:{CANARY}@host", f":{CANARY}@host:6379"]
            for value in values:
                yield tier_type, {option: value}
        for option in SECRETS:
            for value in (CANARY, [CANARY], {"value": {option: CANARY}}, 12345):
                yield tier_type, {option: value}


def test_every_registered_tier_is_planted():
    shipped = {name for name in TIERS.names() if TIERS.load(name).__module__.startswith("kvtier.")}
    assert shipped == set(GOOD)
    assert all(map(options_of, shipped))


def everything_said_by(error):
    """Return all that can be seen of an error, and of those behind it."""
    seen, left = [], [error]
    while left:
        one = left.pop()
        if one is None or one in seen:
            continue
        seen.append(one)
        left += [one.__cause__, one.__context__]
    shown = [f"{one}{one!r}{one.args}{vars(one)}{getattr(one, 'filename', '')}" for one in seen]
    return "".join(shown) + "".join(traceback.format_exception(error))


@pytest.fixture
def log():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root, levels = logging.getLogger(), (logging.getLogger().level, logger.level)
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    logger.setLevel(logging.DEBUG)
    yield stream
    root.removeHandler(handler)
    root.setLevel(levels[0])
    logger.setLevel(levels[1])


def make(tier, **keys):
    extra = {"cpu_bytes_to_use": "64KiB", "secondary_tiers": [tier]} | keys
    config = OffloadingConfig(
        extra, (KVCacheGroup(16, ("layer.0",)),), engine_block_bytes=4096, namespace=Namespace({"model": "m"})
    )
    return config, TieringOffloadingSpec(config)


def test_no_option_of_a_tier_shows_a_secret(tmp_path, monkeypatch, log):
    monkeypatch.chdir(tmp_path)
    leaks, refused = [], 0
    for tier_type, planted in plants():
        said = ""
        try:
            config, spec = make({"type": tier_type} | GOOD[tier_type] | planted)
            said = f"{config!r}{spec!r}{spec.user_config!r}{spec.tiers!r}{spec.tier_context!r}"
            view = memoryview(bytearray(spec.block_bytes)).cast("B", (1, spec.block_bytes))
            for one in spec.tiers:
                tier = construct_tier(one, view, spec)
                said += f"{tier!r}{tier.state}"
        except (KVTierError, UnicodeError) as error:
            said += everything_said_by(error)
            refused += 1
        if CANARY in said or "12345" in said:
            leaks.append((tier_type, planted, said[:300]))
    assert not leaks, f"{len(leaks)}: {leaks[:5]}"
    assert CANARY not in log.getvalue()
    assert refused > 500


def test_no_key_beside_the_tiers_shows_a_secret(tmp_path, monkeypatch, log):
    monkeypatch.chdir(tmp_path)
    names = [*TieringConfig.__struct_fields__, *SECRETS]
    for name in names:
        values = [{"password": CANARY}, [{"type": "resp", "password": CANARY}], [{"type": 3, "url": ADDRESSES[0]}]]
        for value in values + ADDRESSES[:6] + ([CANARY] if is_secret(name) else []):
            said = ""
            try:
                said = repr(parse_config({"cpu_bytes_to_use": "64KiB", name: value}, TieringConfig))
            except KVTierError as error:
                said = everything_said_by(error)
            assert CANARY not in said, (name, value)
    assert CANARY not in log.getvalue()


def test_secrets_in_files_and_in_the_environment_are_shown_by_nothing(tmp_path, monkeypatch, log):
    (tmp_path / "secret").write_text(f"{CANARY}-{'s' * 30}")
    (tmp_path / "password").write_text(CANARY)
    monkeypatch.setenv("PLANTED_SECRET", f"{CANARY}-{'e' * 30}")
    monkeypatch.setenv("PLANTED_PASSWORD", CANARY)
    for guard in ({"secret_file": str(tmp_path / "secret")}, {"secret_env": "PLANTED_SECRET", "encrypt": True}):
        for password in ({"password_file": str(tmp_path / "password")}, {"password_env": "PLANTED_PASSWORD"}):
            name = "-".join([*guard, *password])
            tiers = [
                {"type": "disk", "path": str(tmp_path / name), "capacity": "4MiB"} | guard,
                {"type": "resp", "url": "redis://127.0.0.1:1"} | guard | password,
            ]
            extra = {"cpu_bytes_to_use": "64KiB", "secondary_tiers": tiers, "record": str(tmp_path / f"{name}.rec")}
            groups = (KVCacheGroup(16, ("layer.0",)),)
            config = OffloadingConfig(extra, groups, engine_block_bytes=4096, namespace=Namespace({"model": "m"}))
            spec = TieringOffloadingSpec(config)
            manager = spec.get_manager()
            spec.wait_for_tiers(10)
            said = f"{config!r}{spec!r}{spec.user_config!r}{spec.tiers!r}{manager.tier_states()}{manager.get_stats()}"
            said += "".join(map(repr, (vars(tier) for tier in spec.tiers if hasattr(tier, "__dict__"))))
            said += json.dumps(extra)
            spec.shutdown()
            assert CANARY not in said
    assert CANARY not in log.getvalue()
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.name not in ("secret", "password"):
            assert CANARY.encode() not in file.read_bytes(), file


def environment_of(manager, tier):
    manager.on_schedule_end(ScheduleEndContext())
    try:
        return Path(f"/proc/{tier.io_pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # between two processes, of a server that is not there
        return b""


def test_a_process_of_a_tier_gets_no_secret_of_the_environment_but_its_own(tmp_path, monkeypatch):
    names = "PLANTED_SECRET", "PLANTED_PASSWORD", "AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_ACCOUNT_KEY"
    planted = dict.fromkeys(names, f"{CANARY}-{'e' * 30}") | {"DATABASE_URL": f"postgres://user:{CANARY}@host/db"}
    for name, value in {**planted, "PLANTED_SETTING": "plain", "HTTPS_PROXY": "http://u:p@127.0.0.1:1"}.items():
        monkeypatch.setenv(name, value)
    tiers = [
        {"type": "disk", "path": str(tmp_path / "guarded"), "capacity": "4MiB", "secret_env": "PLANTED_SECRET"},
        {"type": "filesystem", "path": str(tmp_path / "shared"), "capacity": "4MiB"},
        {"type": "resp", "url": "redis://127.0.0.1:1", "password_env": "PLANTED_PASSWORD"},
        {"type": "object"} | GOOD["object"],
        {"type": "memory"} | GOOD["memory"],
    ]
    (tmp_path / "shared").mkdir()
    extra = {"cpu_bytes_to_use": "64KiB", "secondary_tiers": tiers}
    config = OffloadingConfig(extra, (KVCacheGroup(16, ("layer.0",)),), 4096, namespace=Namespace({"model": "m"}))
    with TieringOffloadingSpec(config) as spec:
        manager = spec.get_manager()
        spec.wait_for_tiers(PATIENCE_SECONDS)
        assert manager.tier_states()["disk"][0] is TierState.UP
        found = []
        for guard in manager._tiers:
            environment = wait_for(functools.partial(environment_of, manager, guard.tier), "a process")
            assert b"PLANTED_SETTING=plain" in environment
            assert b"HTTPS_PROXY=" in environment
            found.append([name for name in planted if f"{name}=".encode() in environment])
    assert found == [["PLANTED_SECRET"], [], ["PLANTED_PASSWORD"], ["AWS_SECRET_ACCESS_KEY"], []]


def test_values_are_hidden_by_name_and_by_shape():
    assert shown_option("password", "hunter2") == "***"
    assert shown_option("t", {"auth_token": "hunter2", "n": 1}) == {"auth_token": "***", "n": 1}
    assert shown_option("password", None) is None
    assert shown_option("tokens_per_block", 16) == 16
    assert shown_option("max_new_tokens", "x") == "x"
    assert shown_option("url", "redis://h:6379") == "redis://h:6379"
    assert shown_option("url", "localhost:6379") == "localhost:6379"
    assert shown_option("url", "hunter2") == "***"
    assert shown_option("path", "/cache/x@y") == "/cache/x@y"
    assert (
        shown_option("what", "see redis://u:p@h and https://h/x?sig=s now") == "see redis://*** and https://h/*** now"
    )


def test_a_long_value_is_looked_through_at_once():
    assert shown_option("path", "x" * 5_000_000) == "x" * 5_000_000
    assert shown_option("path", "://" * 500_000)
