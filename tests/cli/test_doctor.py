"""`kvtier doctor`: one line for what is found, with the remedy, on this machine and with real tiers."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.cli.checks.findings import Level
from kvtier.cli.checks.machine import check_machine

EXAMPLES = str(Path(__file__).parents[2] / "examples")


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


def findings_of(config):
    result = run(json.dumps(config), "--json")
    findings = json.loads(result.stdout)["findings"]
    return result.exit_code, [(one["level"], one["subject"], one["text"]) for one in findings]


def with_tiers(*tiers):
    return {"cpu_bytes_to_use": "64MiB", "secondary_tiers": list(tiers)}


def of(found, subject):
    return [(level, text) for level, name, text in found if name == subject]


def test_without_a_configuration_the_machine_is_looked_at():
    result = run()
    assert result.exit_code == 0
    for subject in ("kvtier", "vLLM", "memory", "/dev/shm", "huge pages", "sandbox", "clock"):
        assert f"{subject}: " in result.stdout


def test_tiers_that_work_are_tried_and_left_as_they_were(tmp_path):
    tiers = (
        {"type": "disk", "path": str(tmp_path / "disk"), "capacity": "256MiB"},
        {"type": "filesystem", "path": str(tmp_path / "shared"), "capacity": "256MiB"},
        {"type": "memory", "capacity": "256MiB"},
    )
    code, found = findings_of(with_tiers(*tiers))
    assert code == 0
    for name in ("disk", "filesystem", "memory"):
        assert any(level == "ok" and text.startswith("works: ") for level, text in of(found, name)), found
    assert list(tmp_path.iterdir()) == []


def test_it_takes_what_vllm_config_prints(tmp_path):
    arguments = ("--cpu", "64MiB", "--disk", f"{tmp_path}/kv:64MiB", "--format", "json")
    printed = CliRunner().invoke(app, ["vllm-config", *arguments]).stdout
    result = run(printed)
    assert result.exit_code == 0, result.output
    assert "disk: works: " in result.stdout
    (tmp_path / "config.json").write_text(printed)
    assert run(str(tmp_path / "config.json")).exit_code == 0


def test_a_folder_that_is_not_there_is_an_error_with_a_remedy(tmp_path):
    tier = {"type": "disk", "path": str(tmp_path / "mount" / "kv"), "capacity": "256MiB"}
    result = run(json.dumps(with_tiers(tier)))
    assert result.exit_code == 1
    assert f"error   disk: {tmp_path}/mount is not there" in result.stdout
    assert "-> make it, or mount what should be there" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_disk_with_less_room_than_asked_for_is_a_warning(tmp_path):
    code, found = findings_of(with_tiers({"type": "disk", "path": str(tmp_path / "kv"), "capacity": "900TiB"}))
    assert code == 0
    assert ("warning", "disk") in {(level, name) for level, name, text in found if "900.0 TiB asked for" in text}


def test_a_server_that_is_not_there_is_an_error_and_the_others_are_tried(tmp_path):
    disk = {"type": "disk", "path": str(tmp_path / "kv"), "capacity": "256MiB"}
    code, found = findings_of(with_tiers({"type": "resp", "url": "redis://127.0.0.1:1"}, disk))
    assert code == 1
    assert [level for level, _ in of(found, "resp")] == ["error"]
    assert "refused" in of(found, "resp")[0][1]
    assert of(found, "disk")[-1][1].startswith("works: ")


def test_a_server_is_tried_under_an_identity_of_its_own(valkey):
    code, found = findings_of(with_tiers({"type": "resp", "url": valkey.url}))
    assert code == 0
    assert of(found, "resp")[-1][1].startswith("works: ")


def test_a_wrong_configuration_ends_with_one_line():
    result = run(json.dumps({"cpu_bytes_to_use": "64MiB", "secondary_tiers": [{"type": "dsk"}]}))
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "dsk" in result.stderr


def test_more_memory_than_the_machine_has_is_an_error():
    found = {finding.subject: finding for finding in check_machine(1 << 60)}
    assert found["memory"].level is Level.ERROR
    assert "1048576.0 TiB are asked for" in found["memory"].text
    assert found["/dev/shm"].level is Level.WARNING


def test_a_machine_without_huge_pages_is_told_which_command_brings_them(tmp_path):
    for name in ("proc", "sys/kernel/mm/transparent_hugepage"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemAvailable: 1048576 kB\n")
    (tmp_path / "sys/kernel/mm/transparent_hugepage/shmem_enabled").write_text("always advise [never]\n")
    found = {finding.subject: finding for finding in check_machine(1 << 20, tmp_path)}
    assert found["huge pages"].level is Level.WARNING
    assert "shmem_enabled" in found["huge pages"].remedy
    assert "MemAvailable" in found["memory"].text


@pytest.mark.parametrize("plugins", ["other", ""])
def test_plugins_that_leave_kvtier_out_are_an_error_where_vllm_is(monkeypatch, plugins, tmp_path):
    (tmp_path / "vllm-0.32.0.dist-info").mkdir()
    (tmp_path / "vllm-0.32.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    found = {finding.subject: finding for finding in check_machine(None)}
    assert found["vLLM"].level is Level.OK
    assert found["plugin"].level is Level.ERROR
    assert "VLLM_PLUGINS" in found["plugin"].remedy


def test_a_folder_that_this_user_may_not_write_is_an_error(tmp_path, monkeypatch):
    if os.geteuid() == 0:
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everything
    else:
        tmp_path.chmod(0o500)
    code, found = findings_of(with_tiers({"type": "disk", "path": str(tmp_path / "kv"), "capacity": "256MiB"}))
    assert code == 1
    assert "cannot be written by this user" in of(found, "disk")[0][1]


def test_a_folder_that_is_there_is_looked_at_itself(tmp_path, monkeypatch):
    """An administrator may make the tier's folder for a user who may not write the folder above it."""
    (tmp_path / "kv").mkdir()
    may_write = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and may_write(path, mode))
    code, found = findings_of(with_tiers({"type": "disk", "path": str(tmp_path / "kv"), "capacity": "256MiB"}))
    assert code == 0
    assert of(found, "disk")[-1] == (
        "warning",
        f"not tried: {tmp_path}, where the trial would be, cannot be written by this user",
    )


@pytest.mark.root
def test_a_mount_point_is_no_folder_of_a_tier():
    code, found = findings_of(with_tiers({"type": "disk", "path": "/proc", "capacity": "256MiB"}))
    assert code == 0
    assert "on proc" in of(found, "disk")[0][1]
    assert of(found, "disk")[-1][1] == "not tried: /proc is a mount point, and kvtier needs a folder for itself"


def test_a_tier_of_ones_own_is_tried_with_its_own_options(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([EXAMPLES, os.environ.get("PYTHONPATH", "")]))
    tier = {"type": "ZippedTier", "module_path": "zipped_tier", "path": str(tmp_path / "zipped")}
    code, found = findings_of(with_tiers(tier))
    assert code == 0
    assert of(found, "ZippedTier")[-1][1].startswith("works: ")


@pytest.mark.parametrize("wrong", [None, [], "text"], ids=str)
def test_a_transfer_configuration_without_kvtiers_is_one_line(wrong):
    result = run(json.dumps({"kv_connector": "OffloadingConnector", "kv_connector_extra_config": wrong}))
    assert result.exit_code == 2
    assert result.stderr.startswith("kvtier: kv_connector_extra_config=")
    assert result.stderr.count("\n") == 1
