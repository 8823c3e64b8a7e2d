"""What cannot be written is refused before anything is replayed."""

import os

import pytest
from typer.testing import CliRunner

from kvtier.cli import app

PRICES = ("--model", "Llama-3.1-8B", "--gpu-rate", "4", "--dram-price", "4", "--disk-price", "0.1")


def run(command, option, path):
    """Run a command on a trace that is not there: whoever complains about it has begun."""
    prices = PRICES if command == "plan" else ()
    return CliRunner().invoke(app, [command, "no-such-trace.jsonl", *prices, option, str(path)])


@pytest.mark.parametrize("command", ["simulate", "plan"])
@pytest.mark.parametrize("option", ["--plot", "--json"])
@pytest.mark.parametrize(("place", "why"), [("missing/out", "there is no folder"), (".", "this is a folder")])
def test_refuses_paths_that_are_no_file(tmp_path, command, option, place, why):
    result = run(command, option, tmp_path / place)
    assert result.exit_code == 2
    assert f"{option[2:]}=" in result.stderr
    assert why in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="ROOT MAY WRITE EVERYTHING: folders without permission were not tried")
@pytest.mark.parametrize("command", ["simulate", "plan"])
def test_refuses_a_folder_without_permission(tmp_path, command):
    tmp_path.chmod(0o500)
    assert "permission denied" in run(command, "--json", tmp_path / "out").stderr


@pytest.mark.parametrize("command", ["simulate", "plan"])
def test_looks_without_leaving_a_file(tmp_path, command):
    result = run(command, "--json", tmp_path / "out")
    assert "No such file" in result.stderr
    assert not (tmp_path / "out").exists()
