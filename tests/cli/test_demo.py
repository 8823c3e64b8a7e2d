"""The demonstration as its user runs it: a process, its output, its exit code."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from adapters_models import save_tiny_model, tiny_llama, without_hub

from kvtier.adapters.transformers import PrefixCache
from kvtier.cli.demonstration.conversation import read_document

QUICK = ("--threads", "1", "--turns", "2", "--max-new-tokens", "4")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, read_document())
    return folder


def demo(*options):
    command = [sys.executable, "-m", "kvtier", "demo", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, env=without_hub(), check=False)


def refused(done):
    """Return the one line that a refused demonstration says."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_the_whole_demonstration(model_folder, tmp_path):
    report_path = tmp_path / "report.json"
    done = demo("--model", model_folder, *QUICK, "--json", report_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "second process" in done.stdout
    assert "checks passed" in done.stdout
    report = json.loads(report_path.read_text())
    assert report["passed"] is True
    assert [turn["label"] for turn in report["turns"]] == ["cold", "memory", "memory emptied", "second process"]
    assert [list(turn["answer"]["sources"]) for turn in report["turns"]] == [[], ["primary"], ["disk"], ["disk"]]
    assert all(turn["same_logits"] for turn in report["turns"])
    assert all(turn["answer"]["restored_tokens"] > 1000 for turn in report["turns"][1:])


@pytest.mark.soak
def test_one_process_fills_a_server_and_another_answers_from_it(model_folder, tmp_path, valkey):
    report_path = tmp_path / "report.json"
    tiers = {"cpu_bytes_to_use": "64MiB", "secondary_tiers": [{"type": "resp", "url": valkey.url}]}
    done = demo("--model", model_folder, *QUICK, "--tiers", json.dumps(tiers), "--json", report_path)
    assert done.returncode == 0, done.stdout + done.stderr
    turns = json.loads(report_path.read_text())["turns"]
    assert [list(turn["answer"]["sources"]) for turn in turns] == [[], ["primary"], ["resp"], ["resp"]]
    assert turns[-1]["answer"]["restored_tokens"] > 1000
    assert valkey.info("db0")["keys"] >= turns[-1]["answer"]["restored_tokens"] // 32


def test_memory_alone_is_a_demonstration_too(model_folder):
    done = demo("--model", model_folder, *QUICK, "--tiers", '{"cpu_bytes_to_use": "64MiB"}')
    assert done.returncode == 0, done.stdout + done.stderr
    assert "second process" not in done.stdout


def test_nothing_restored_is_a_failure(model_folder, tmp_path):
    """Blocks longer than the prompts: the answers are right, but no turn can have a hit."""
    (tmp_path / "tiers.json").write_text(json.dumps({"cpu_bytes_to_use": "16MiB", "block_size": 8192}))
    done = demo("--model", model_folder, *QUICK, "--tiers", f"@{tmp_path / 'tiers.json'}")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED tokens were restored from the primary tier" in done.stdout


def test_a_directory_that_another_process_holds(model_folder, tmp_path):
    disk = {"type": "disk", "path": str(tmp_path / "blocks"), "capacity": "64MiB"}
    tiers = {"cpu_bytes_to_use": "64MiB", "secondary_tiers": [disk]}
    with PrefixCache(tiny_llama(), tiers):
        line = refused(demo("--model", model_folder, *QUICK, "--tiers", json.dumps(tiers)))
    assert "tier disk" in line
    assert "lock" in line


@pytest.mark.parametrize(
    ("tiers", "word"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ("/no/such/file.json", "readable file of JSON or YAML"),
        ('{"cpu_bytes_to_use": "64MiB", "evection_policy": "lru"}', "evection_policy"),
    ],
)
def test_a_wrong_configuration_is_one_line(model_folder, tiers, word):
    assert word in refused(demo("--model", model_folder, *QUICK, "--tiers", tiers))


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    assert "cannot be loaded" in refused(demo("--model", tmp_path / "nothing", *QUICK))


def test_help_names_every_option():
    done = subprocess.run(
        [sys.executable, "-m", "kvtier", "demo", "--help"], capture_output=True, text=True, check=True
    )
    for option in ("--model", "--tiers", "--dtype", "--turns", "--json", "--work-dir"):
        assert option in done.stdout
    assert "--from-disk" not in done.stdout
