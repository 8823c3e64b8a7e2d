"""`kvtier purge` as a process."""

import os
import re

import pytest
from slab_rigs import as_json, at_a_terminal, folder_of, kvtier, make_slab, refused, used_by_an_engine

from kvtier.cli.ages import format_age, parse_age
from kvtier.errors import ConfigError


@pytest.fixture(name="slab")
def _slab(tmp_path):
    slab = tmp_path / "slab"
    make_slab(slab)
    make_slab(slab, model="another", days_old=9)
    return slab


def test_everything_goes_but_the_directory_and_what_is_not_ours(slab):
    (slab / "notes.txt").write_text("mine")
    (slab / ("f" * 32)).mkdir()
    (slab / ("f" * 32) / "mine").write_text("")
    done = kvtier("purge", slab, "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    assert "deleted 2 namespaces" in done.stdout
    assert sorted(path.name for path in slab.iterdir()) == sorted(["f" * 32, "lock", "notes.txt"])
    assert "deleted 0 namespaces" in kvtier("purge", slab).stdout


def test_one_namespace(slab):
    report = as_json("purge", slab, "--yes", "--namespace", folder_of(slab, "another").name[:6])
    (gone,) = report["directories"][0]["deleted"]
    assert gone["identity"] == {"model": "another"}
    assert report["freed_bytes"] == gone["disk_bytes"] > 10 * 65536
    assert folder_of(slab).is_dir()
    assert not folder_of(slab, "another").exists()
    assert kvtier("verify", slab).returncode == 0


def test_old_ones(slab):
    assert as_json("purge", slab, "--yes", "--older-than", "10d")["freed_bytes"] == 0
    report = as_json("purge", slab, "--yes", "--older-than", "1w")
    assert [gone["id"] for gone in report["directories"][0]["deleted"]] == [folder_of(slab, "another").name]
    assert folder_of(slab).is_dir()


def test_what_cannot_be_done_deletes_nothing(slab, tmp_path):
    assert "no such namespace; known are: " in refused("purge", slab, "--yes", "--namespace", "0123")
    assert "no such namespace; known are: " in refused("purge", slab, "--yes", "--namespace", "")
    for text in ("soon", "0d"):
        assert "older_than=" in refused("purge", slab, "--yes", f"--older-than={text}")
    assert "No such file" in refused("purge", tmp_path / "nothing", slab, "--yes")
    assert len(list(slab.iterdir())) == 3


def test_a_directory_in_use_is_refused_with_the_pid(slab, tmp_path):
    make_slab(tmp_path / "parallel" / "dp0")
    make_slab(tmp_path / "parallel" / "dp1")
    with used_by_an_engine(tmp_path / "parallel" / "dp1") as pid:
        assert f"held by another process (pid {pid})" in refused("purge", tmp_path / "parallel", "--yes")
        assert f"pid {pid}" in as_json("purge", tmp_path / "parallel", "--yes", code=2)["error"]
    assert folder_of(tmp_path / "parallel" / "dp0").is_dir()
    assert len(as_json("purge", tmp_path / "parallel", "--yes")["directories"]) == 2
    assert not folder_of(tmp_path / "parallel" / "dp1").exists()


def test_it_asks(slab):
    done = kvtier("purge", slab)
    assert done.returncode == 2
    assert "--yes is needed" in done.stderr
    code, shown = at_a_terminal("purge", slab, typed="n\n")
    assert code == 1
    assert "Delete?" in shown
    assert folder_of(slab).is_dir()
    assert at_a_terminal("purge", slab, typed="perhaps\n\n")[0] == 1
    assert at_a_terminal("purge", slab, typed="\x04")[0] == 1, "the end of the input"
    assert folder_of(slab).is_dir()
    code, shown = at_a_terminal("purge", slab, typed="y\n")
    assert code == 0, shown
    assert not folder_of(slab).exists()


def test_what_is_no_text_is_no_answer(slab, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")  # as in most locales
    code, shown = at_a_terminal("purge", slab, typed=b"\xf6\n\n")
    assert code == 1, shown
    assert shown.count("Delete?") == 2
    assert folder_of(slab).is_dir()


def test_times():
    assert [parse_age("x", text) for text in ("90s", "1.5h", "2 w")] == [90, 5400, 14 * 86400]
    for text in ("soon", "7", "0d", "-3d", "7 years", "d", ""):
        with pytest.raises(ConfigError):
            parse_age("x", text)
    ages = [format_age(seconds) for seconds in (-3600, 5, 60, 7300, 86400 * 400)]
    assert ages == ["in the future", "just now", "1 minute ago", "2 hours ago", "400 days ago"]


def test_what_cannot_be_read_is_shown_and_can_be_purged(slab):
    """A folder in place of a file, a length that nothing has, text that nobody can print: the others do not suffer."""
    folders = [make_slab(slab, model=model) for model in ("folder", "long", "odd", "infinite")]
    (folders[0] / "headers").unlink()
    (folders[0] / "headers").mkdir()
    os.truncate(folders[1] / "headers", 8 << 40)
    text = (folders[2] / "namespace.json").read_text()
    (folders[2] / "namespace.json").write_text(text.replace("odd", "\\ud800"))
    (folders[3] / "namespace.json").write_text(re.sub(r'"format": ?\d+', '"format": 1e999', text))
    report = as_json("inspect", slab)
    found = {entry["id"]: entry for entry in report["directories"][0]["namespaces"]}
    assert found[folders[0].name]["problems"] == ["cannot be read: headers: Is a directory"]
    assert found[folders[1].name]["blocks"] == 10
    assert as_json("verify", slab, code=1)["ok"] is False
    for folder in folders:
        assert kvtier("purge", "--yes", "--namespace", folder.name, slab).returncode == 0
    assert [folder.exists() for folder in folders] == [True, False, False, False]
    assert os.listdir(folders[0]) == ["headers"], "kvtier makes no folders there: it is somebody's"
    assert as_json("inspect", slab)["directories"][0]["namespaces"]


def test_strangers_files_stay(slab, caplog):
    folder = next(path for path in slab.iterdir() if path.is_dir())
    (folder / "headers.bak").write_bytes(b"mine")
    assert as_json("inspect", slab)["directories"][0]["namespaces"][0]["blocks"] == 10
    deleted = as_json("purge", "--yes", slab)["directories"][0]["deleted"]
    assert [entry["left"] for entry in deleted if entry["id"] == folder.name] == [["headers.bak"]]
    assert [path.name for path in folder.iterdir()] == ["headers.bak"]
    assert not as_json("inspect", slab)["directories"][0]["namespaces"]
