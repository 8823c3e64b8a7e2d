import json
import shlex

import pytest
from typer.testing import CliRunner

from kvtier.cli import app


def run(*arguments):
    return CliRunner().invoke(app, ["vllm-config", *arguments])


def test_prints_the_option_that_vllm_takes():
    result = run(
        "--cpu", "8GiB", "--disk", "/cache:200GiB", "--option", "load_deadline=1.5", "--option", "on_reset=keep"
    )
    assert result.exit_code == 0
    flag, value = shlex.split(result.stdout)
    assert flag == "--kv-transfer-config"
    assert json.loads(value) == {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "KVTierOffloadingSpec",
            "cpu_bytes_to_use": "8GiB",
            "secondary_tiers": [{"type": "disk", "path": "/cache", "capacity": "200GiB"}],
            "load_deadline": 1.5,
            "on_reset": "keep",
        },
    }


def test_kvtiers_connector_computes_what_could_not_be_loaded():
    result = run("--cpu", "8GiB", "--connector", "kvtier")
    assert result.exit_code == 0
    assert json.loads(shlex.split(result.stdout)[1]) == {
        "kv_connector": "KVTierConnector",
        "kv_connector_module_path": "kvtier.adapters.vllm.connector",
        "kv_load_failure_policy": "recompute",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"spec_name": "KVTierOffloadingSpec", "cpu_bytes_to_use": "8GiB"},
    }
    assert run("--cpu", "8GiB", "--connector", "other").exit_code == 2


def test_prints_the_same_configuration_in_every_form():
    arguments = ("--cpu", "8GiB", "--disk", "/it's:200GiB")
    wanted = json.loads(shlex.split(run(*arguments).stdout)[1])
    assert json.loads(run(*arguments, "--format", "json").stdout) == wanted
    name, value = run(*arguments, "--format", "yaml").stdout.split(": ", 1)
    assert name == "kv-transfer-config"
    assert json.loads(value.strip()[1:-1].replace("''", "'")) == wanted  # YAML's single quotes
    program = run(*arguments, "--format", "python").stdout
    kept = {}
    exec(program.replace("from vllm.config import KVTransferConfig", "KVTransferConfig = dict"), kept)
    assert kept["kv_transfer_config"] == wanted
    assert run(*arguments, "--format", "toml").exit_code == 2


def test_explains_every_key_on_stderr():
    result = run("--cpu", "8GiB", "--disk", "/cache:200GiB", "--option", "load_deadline=1.5", "--explain")
    assert json.loads(shlex.split(result.stdout)[1])
    lines = result.stderr.splitlines()
    assert [line.partition(" = ")[0] for line in lines] == [
        "spec_name",
        "cpu_bytes_to_use",
        "load_deadline",
        "secondary_tiers[0].type",
        "secondary_tiers[0].path",
        "secondary_tiers[0].capacity",
    ]
    assert all(": " in line.partition(" = ")[2] for line in lines)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--disk", "cache:2GiB"),
        ("--disk", "/cache,cache:2GiB"),
        ("--filesystem", "./shared:2GiB"),
        ("--disk", "/cache:2GiB", "--secret-file", "secret"),
        ("--option", "arena_path=tmp"),
    ],
)
def test_a_path_that_depends_on_the_folder_is_refused(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text("a secret that is long enough")
    result = run("--cpu", "8GiB", *arguments)
    assert result.exit_code == 2
    assert "an absolute path expected" in result.stderr


def tiers_of(*arguments):
    result = run("--cpu", "8GiB", *arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(shlex.split(result.stdout)[1])["kv_connector_extra_config"]["secondary_tiers"]


def test_what_is_shared_stands_behind_the_disks():
    shared = ("--filesystem", "/mnt/kvtier:2TiB", "--resp", "redis://host:6379", "--bucket", "s3://bucket/kvtier:20TB")
    assert tiers_of(*shared, "--disk", "/cache:200GiB") == [
        {"type": "disk", "path": "/cache", "capacity": "200GiB"},
        {"type": "resp", "url": "redis://host:6379"},
        {"type": "filesystem", "path": "/mnt/kvtier", "capacity": "2TiB"},
        {"type": "object", "url": "s3://bucket/kvtier", "capacity": "20TB"},
    ]


def test_a_secret_guards_every_tier(tmp_path, monkeypatch):
    secret = "a secret that is long enough"
    (tmp_path / "secret").write_text(secret)
    monkeypatch.setenv("KVTIER_TEST_SECRET", secret)
    tiers = ("--disk", "/cache:200GiB", "--resp", "redis://host:6379")
    guarded = tiers_of(*tiers, "--secret-file", str(tmp_path / "secret"), "--encrypt")
    assert [(tier["secret_file"], tier["encrypt"]) for tier in guarded] == [(str(tmp_path / "secret"), True)] * 2
    guarded = tiers_of(*tiers, "--secret-env", "KVTIER_TEST_SECRET")
    assert [tier["secret_env"] for tier in guarded] == ["KVTIER_TEST_SECRET"] * 2


def test_a_disk_may_be_several_directories():
    assert tiers_of("--disk", "/nvme0/kv,/nvme1/kv:2TiB") == [
        {"type": "disk", "path": ["/nvme0/kv", "/nvme1/kv"], "capacity": "2TiB"}
    ]


def test_a_password_in_a_url_is_not_repeated():
    result = run("--cpu", "8GiB", "--resp", "redis://:hunter2@host")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "password_env" in result.stderr
    assert "hunter2" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--cpu", "lots"), "cpu_bytes_to_use='lots'"),
        (("--cpu", "1GiB", "--disk", "/cache"), "disk='/cache': PATH:SIZE expected"),
        (("--cpu", "1GiB", "--disk", "/cache:many"), "capacity='many'"),
        (("--cpu", "1GiB", "--disk", "~/cache:1GiB"), "path='~/cache': only a shell expands ~"),
        (("--cpu", "1GiB", "--disk", "/cache,~/cache:1GiB"), "path[1]='~/cache': only a shell expands ~"),
        (("--cpu", "1GiB", "--filesystem", "~/cache:1TiB"), "path='~/cache': only a shell expands ~"),
        (
            ("--cpu", "1GiB", "--disk", "/cache,/cache/sub:1GiB"),
            "this one and secondary_tiers[0].path[0] contain each other",
        ),
        (("--cpu", "1GiB", "--disk", "/cache,:1GiB"), "a directory, or a list of directories"),
        (("--cpu", "1GiB", "--mooncake", "pool"), "mooncake='pool': MASTER:PORT:SIZE expected"),
        (("--cpu", "1GiB", "--filesystem", "/mnt/kvtier"), "filesystem='/mnt/kvtier': PATH:SIZE expected"),
        (("--cpu", "1GiB", "--filesystem", "/mnt/kvtier:1KiB"), "64 blocks"),
        (("--cpu", "1GiB", "--bucket", "s3://bucket"), "bucket='s3://bucket': URL:SIZE expected"),
        (("--cpu", "1GiB", "--bucket", "ftp://bucket/kv:1TB"), "s3://BUCKET/PREFIX"),
        (
            ("--cpu", "1GiB", "--disk", "/cache:1GiB", "--disk", "/cache/sub:1GiB"),
            "a separate directory: this one and ",
        ),
        (("--cpu", "1GiB", "--secret-file", "/secret"), "only with --disk"),
        (("--cpu", "1GiB", "--disk", "/cache:1GiB", "--encrypt"), "encrypt="),
        (("--cpu", "1GiB", "--disk", "/cache:1GiB", "--secret-env", "A", "--secret-file", "/b"), "secret_"),
        (("--cpu", "1GiB", "--disk", "/cache:1GiB", "--secret-file", "/no/such/file"), "cannot be read"),
        (("--cpu", "1GiB", "--option", "load_dedline=2"), 'did you mean "load_deadline"?'),
        (("--cpu", "1GiB", "--option", "load_deadline"), "KEY=VALUE expected"),
    ],
)
def test_refuses_what_the_engine_would_refuse(arguments, complaint):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert complaint in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
