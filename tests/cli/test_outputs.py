"""What cannot be written is refused before anything is replayed."""

import os
import socket

import pytest
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.cli.result_files import check_outputs, write_result
from kvtier.errors import ConfigError

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


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("loop", "Too many levels of symbolic links"),
        ("dangling", "there is no folder "),
        ("socket", "this is a socket"),
        ("long", "File name too long"),
        ("below a file", "Not a directory"),
    ],
)
def test_refuses_before_the_work_what_could_not_be_written_after_it(tmp_path, kind, why):
    path = tmp_path / ("n" * 300 if kind == "long" else kind)
    if kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "missing" / "out")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    elif kind == "below a file":
        path.write_text("")
        path /= "out"
    with pytest.raises(ConfigError, match=why):
        check_outputs(json=path)


def test_a_link_to_a_file_that_is_not_there_yet_can_be_written(tmp_path):
    (tmp_path / "link").symlink_to("out")
    check_outputs(json=tmp_path / "link")
    write_result(tmp_path / "link", "text")
    assert (tmp_path / "out").read_text() == "text"


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
