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


def test_a_shared_server_stands_behind_the_disks():
    result = run("--cpu", "8GiB", "--disk", "/cache:200GiB", "--resp", "redis://host:6379")
    assert result.exit_code == 0
    tiers = json.loads(shlex.split(result.stdout)[1])["kv_connector_extra_config"]["secondary_tiers"]
    assert [tier["type"] for tier in tiers] == ["disk", "resp"]
    assert tiers[1]["url"] == "redis://host:6379"


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
        (("--cpu", "1GiB", "--disk", "/cache:1GiB", "--disk", "/cache/sub:1GiB"), "a directory of its own"),
        (("--cpu", "1GiB", "--option", "load_dedline=2"), 'did you mean "load_deadline"?'),
        (("--cpu", "1GiB", "--option", "load_deadline"), "KEY=VALUE expected"),
    ],
)
def test_refuses_what_the_engine_would_refuse(arguments, complaint):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert complaint in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
