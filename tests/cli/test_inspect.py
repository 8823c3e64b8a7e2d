"""`kvtier inspect` as a process."""

import os
import subprocess
import sys

import pytest
from slab_rigs import as_json, flip, folder_of, kvtier, make_slab, refused, used_by_an_engine


def test_it_shows_what_is_there(tmp_path):
    slab = tmp_path / "slab"
    make_slab(slab, blocks=10)
    make_slab(slab, blocks=3, model="another", days_old=9)
    done = kvtier("inspect", slab)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{slab}: not in use" in done.stdout
    lines = done.stdout.splitlines()
    (row,) = [line.split() for line in lines if line.strip().startswith(folder_of(slab).name[:12]) and "KiB" in line]
    assert row[1:4] == ["10", "64.0", "KiB"]
    assert row[-1] == "ok"
    assert "9 days ago" in done.stdout
    assert "  model another" in lines


def test_json_says_the_same_in_numbers(tmp_path):
    slab = tmp_path / "slab"
    make_slab(slab, blocks=10)
    make_slab(slab, blocks=3, model="another", days_old=9)
    (directory,) = as_json("inspect", slab)["directories"]
    assert (directory["path"], directory["used_by"]) == (str(slab), None)
    assert directory["free_bytes"] > 0
    latest, older = directory["namespaces"]
    assert latest["id"] == folder_of(slab).name
    assert latest["identity"] == {"model": "model"}
    assert (latest["blocks"], latest["block_bytes"], latest["format"]) == (10, 65536, 1)
    assert latest["capacity_blocks"] == (folder_of(slab) / "headers").stat().st_size // 128
    assert latest["disk_bytes"] >= 10 * 65536
    assert (latest["broken_records"], latest["problems"]) == ({}, [])
    assert older["age_seconds"] == pytest.approx(9 * 86400, abs=300)
    assert older["last_use"].endswith("+00:00")
    assert directory["disk_bytes"] > latest["disk_bytes"] + older["disk_bytes"]


def test_a_directory_in_use_is_shown_with_who_uses_it(tmp_path):
    slab = tmp_path / "slab"
    make_slab(slab)
    with used_by_an_engine(slab) as pid:
        (directory,) = as_json("inspect", slab)["directories"]
        assert directory["used_by"]["pid"] == pid
        assert directory["used_by"]["parent_pid"] == os.getpid()
        assert "python" in directory["used_by"]["command"]
        assert directory["namespaces"][0]["blocks"] == 10
        assert f"in use by pid {pid} (" in kvtier("inspect", slab).stdout
    assert as_json("inspect", slab)["directories"][0]["used_by"] is None


def test_what_is_wrong_is_said(tmp_path):
    slab = tmp_path / "slab"
    folder = make_slab(slab)
    flip(folder, 3)  # only reading the block shows that
    with open(folder / "headers", "r+b") as file:
        os.pwrite(file.fileno(), b"\xff", 128 * 4 + 60)
    (namespace,) = as_json("inspect", slab)["directories"][0]["namespaces"]
    assert namespace["broken_records"] == {"corrupt": 1}
    assert "wrong: 1 records corrupt" in kvtier("inspect", slab).stdout


def test_data_parallel_ranks_and_several_directories(tmp_path):
    for rank in (0, 1):
        make_slab(tmp_path / "parallel" / f"dp{rank}", blocks=rank + 1)
    make_slab(tmp_path / "single")
    report = as_json("inspect", tmp_path / "parallel", tmp_path / "single")
    paths = [tmp_path / "parallel" / "dp0", tmp_path / "parallel" / "dp1", tmp_path / "single"]
    assert [directory["path"] for directory in report["directories"]] == list(map(str, paths))
    assert [directory["namespaces"][0]["blocks"] for directory in report["directories"]] == [1, 2, 10]


def test_an_empty_directory_is_fine(tmp_path):
    done = kvtier("inspect", tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert "empty" in done.stderr
    assert as_json("inspect", tmp_path) == {"directories": []}


def test_what_is_no_directory_of_a_tier_is_refused(tmp_path):
    (tmp_path / "photo.jpg").write_text("")
    assert "No such file" in refused("inspect", tmp_path / "nothing")
    assert "not a directory" in refused("inspect", tmp_path / "photo.jpg")
    assert "not the directory of a disk tier" in refused("inspect", tmp_path)
    assert "not the directory" in as_json("inspect", tmp_path, code=2)["error"]


STRANGER = """
import contextlib, io, os, sys
import kvtier.cli

path = sys.argv[1]

def inspect(path):
    sys.argv = ["kvtier", "inspect", path]
    kvtier.cli.main()

with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
    inspect("/nothing/here")  # loads everything while this user still can
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
inspect(path)
"""


def test_without_permission_it_says_so(tmp_path):
    slab = tmp_path / "slab"
    make_slab(slab)
    slab.chmod(0o700 if os.geteuid() == 0 else 0)
    try:
        done = subprocess.run([sys.executable, "-c", STRANGER, str(slab)], capture_output=True, text=True, check=False)
    finally:
        slab.chmod(0o700)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "Permission denied" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
