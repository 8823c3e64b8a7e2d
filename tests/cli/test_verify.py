"""`kvtier verify` as a process."""

import functools
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from slab_rigs import BLOCK, as_json, at_a_terminal, flip, kvtier, make_slab, refused, used_by_an_engine

from kvtier.abc import StoreContext
from kvtier.namespace import Namespace
from kvtier.stores.slab import SlabStore
from kvtier.stores.slab.inspection import survey_namespace
from kvtier.testing.patience import wait_for


@pytest.fixture(name="slab")
def _slab(tmp_path):
    make_slab(tmp_path / "slab")
    return tmp_path / "slab"


def test_everything_right(slab):
    done = kvtier("verify", slab)
    assert (done.returncode, done.stderr) == (0, "")
    assert "10 blocks good (640.0 KiB in" in done.stdout
    report = as_json("verify", slab)
    assert report["ok"] is True
    (namespace,) = report["directories"][0]["namespaces"]
    assert (namespace["good"], namespace["bad"], namespace["bytes"]) == (10, {}, 10 * BLOCK)


def test_corrupt_blocks_are_found_and_emptied(slab, tmp_path):
    folder = next(path for path in slab.iterdir() if path.is_dir())
    flip(folder, 2)
    flip(folder, 7)
    done = kvtier("verify", slab)
    assert done.returncode == 1
    assert "wrong: 2 corrupt" in done.stdout
    report = as_json("verify", slab, "--repair", code=1)
    (namespace,) = report["directories"][0]["namespaces"]
    assert (report["ok"], namespace["good"], namespace["bad"], namespace["emptied"]) == (False, 8, {"corrupt": 2}, 2)
    assert as_json("verify", slab)["directories"][0]["namespaces"][0]["good"] == 8
    assert as_json("inspect", slab)["directories"][0]["namespaces"][0]["blocks"] == 8


@pytest.mark.parametrize("name", ["headers", "data-00000"])
def test_a_repair_never_grows_a_file(slab, name):
    """A sparse file of terabytes has some KiB on disk, and keeps them."""
    folder = next(path for path in slab.iterdir() if path.is_dir())
    flip(folder, 2)
    os.truncate(folder / name, 1 << 40)
    before = sum(file.stat().st_blocks for file in folder.iterdir())
    kvtier("verify", slab, "--repair")
    assert sum(file.stat().st_blocks for file in folder.iterdir()) <= before
    assert kvtier("verify", slab).returncode in (0, 1)


def test_a_directory_in_use_is_verified_and_not_repaired(slab):
    folder = next(path for path in slab.iterdir() if path.is_dir())
    flip(folder, 2)
    with used_by_an_engine(slab) as pid:
        report = as_json("verify", slab, code=1)
        assert report["directories"][0]["namespaces"][0]["bad"] == {"corrupt": 1}
        assert f"held by another process (pid {pid})" in refused("verify", "--repair", slab)
        assert f"pid {pid}" in as_json("verify", "--repair", slab, code=2)["error"]
    assert kvtier("verify", "--repair", slab).returncode == 1
    assert kvtier("verify", "--repair", slab).returncode == 0


def test_a_namespace_that_says_nothing_readable_is_wrong(slab):
    next(slab.glob("*/namespace.json")).write_text("{")
    done = kvtier("verify", slab)
    assert done.returncode == 1
    assert "namespace.json cannot be read" in done.stdout


def test_a_terminal_shows_a_bar_and_the_time_that_is_left(tmp_path):
    make_slab(tmp_path / "slab", blocks=30)
    code, shown = at_a_terminal("verify", tmp_path / "slab", "--rate", "1MiB", "--threads", "1")
    assert code == 0
    assert "━" in shown
    assert re.search(r"\d:\d\d:\d\d.{0,20}left", shown)
    assert "30 blocks good" in shown


def reads_payloads(pid):
    """Whether a process has a slab's data file open."""
    try:
        return any("/data-" in os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:
        return False


def test_interrupted(tmp_path):
    make_slab(tmp_path / "slab", blocks=100)
    command = [sys.executable, "-m", "kvtier", "verify", str(tmp_path / "slab"), "--rate", "16KiB", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Started in the background, this process may ignore the signal, and its children would, too.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, preexec_fn=heed, **pipes) as process:
        try:
            wait_for(lambda: reads_payloads(process.pid), "it reads payloads")
            process.send_signal(signal.SIGINT)
            shown, said = process.communicate()
        finally:
            process.kill()
    assert process.returncode == 130
    assert "interrupted" in said
    assert "interrupted" in shown
    assert "Traceback" not in said


def test_blocks_that_a_secret_guards(tmp_path):
    secret, other, slab = tmp_path / "secret", tmp_path / "other", tmp_path / "slab"
    secret.write_text("correct horse battery staple")
    other.write_text("another secret of some length")
    folders = []
    for blocks, options in ((10, {}), (11, {"secret_file": str(secret)}), (12, {"encrypt": True})):
        make_slab(slab, blocks=blocks, **({"secret_file": str(secret), **options} if options else {}))
        folders += [path for path in slab.iterdir() if path.is_dir() and path not in folders]
    before = [(folder / "headers").read_bytes() for folder in folders]
    done = kvtier("verify", slab, "--repair")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "10 blocks good" in done.stdout
    for blocks in (11, 12):
        assert f"{blocks} blocks not verified: a secret guards them: name it with --secret-env" in done.stdout
    report = as_json("verify", slab, "--repair", "--secret-file", other, code=2)
    assert report["ok"] is False
    assert sorted(entry["unverified"] for entry in report["directories"][0]["namespaces"]) == [0, 11, 12]
    assert [(folder / "headers").read_bytes() for folder in folders] == before
    for folder in folders:
        flip(folder, 3)
    environment = {**os.environ, "KVTIER_SECRET": secret.read_text()}
    report = as_json("verify", slab, "--repair", "--secret-env", "KVTIER_SECRET", code=1, env=environment)
    found = {entry["id"]: entry for entry in report["directories"][0]["namespaces"]}
    assert [(found[folder.name]["good"], found[folder.name]["bad"]) for folder in folders] == [
        (good, {"corrupt": 1}) for good in (9, 10, 11)
    ]
    assert [survey_namespace(folder).num_blocks for folder in folders] == [9, 10, 11]


def test_a_namespace_without_blocks_needs_no_secret(tmp_path):
    secret, slab = tmp_path / "secret", tmp_path / "slab"
    secret.write_text("correct horse battery staple")
    make_slab(slab)
    make_slab(slab, blocks=0, secret_file=str(secret))
    assert [entry["unverified"] for entry in as_json("verify", slab)["directories"][0]["namespaces"]] == [0, 0]


def test_nothing_to_verify_and_wrong_options(tmp_path, slab):
    (tmp_path / "empty").mkdir()
    assert as_json("verify", tmp_path / "empty") == {"ok": True, "directories": []}
    assert "rate='fast'" in refused("verify", slab, "--rate", "fast")
    assert "No such file" in refused("verify", tmp_path / "nothing")
    assert "secret_file='***'" in refused("verify", slab, "--secret-file", "nowhere")


def test_a_namespace_without_a_good_block(tmp_path):
    """One that stored nothing yet, one whose data are gone; the others are verified all the same."""
    slab, capacity = tmp_path / "roomy", 1 << 30
    folder = make_slab(slab, capacity=capacity)
    make_slab(slab, blocks=4, model="good", capacity=capacity)
    (folder / "data-00000").unlink()
    context = StoreContext(Namespace({"model": "new", "kvtier.block_bytes": BLOCK}), block_bytes=BLOCK)
    SlabStore.open({"path": str(slab), "capacity": capacity}, context).close()
    report = as_json("verify", slab, "--repair", code=1)
    found = {entry["id"]: entry for entry in report["directories"][0]["namespaces"]}
    assert found[folder.name]["bad"] == {"corrupt": 10}
    assert sorted((entry["good"], entry["emptied"]) for entry in found.values()) == [(0, 0), (0, 10), (4, 0)]
    assert kvtier("verify", slab).returncode == 0


def test_what_may_not_be_opened_is_not_emptied(slab):
    """A limit on open files, or a data file that is a link now, says nothing of the blocks."""
    folder = next(path for path in slab.iterdir() if path.is_dir())
    elsewhere = slab.parent / "elsewhere"
    (folder / "data-00000").rename(elsewhere)
    (folder / "data-00000").symlink_to(elsewhere)
    before = (folder / "headers").read_bytes()
    assert "symbolic links" in refused("verify", "--repair", slab)
    assert (folder / "headers").read_bytes() == before
    (folder / "data-00000").unlink()
    elsewhere.rename(folder / "data-00000")
    assert as_json("verify", slab)["directories"][0]["namespaces"][0]["good"] == 10


def test_more_data_files_than_a_process_may_open_at_first(slab, monkeypatch):
    few = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (8, 4096))
    done = kvtier("verify", slab, preexec_fn=few)
    assert "10 blocks good" in done.stdout, done.stderr


def test_blocks_that_a_secret_may_guard_are_not_emptied(tmp_path):
    """Without the description nothing says so: they would look corrupt, all of them."""
    secret, slab = tmp_path / "secret", tmp_path / "slab"
    secret.write_text("correct horse battery staple")
    plain = make_slab(slab, blocks=0)
    for options in ({}, {"encrypt": True}):
        make_slab(slab, secret_file=str(secret), **options)
    for folder in slab.glob("*/"):
        if folder != plain:
            (folder / "namespace.json").write_text("")
    before = {path: path.read_bytes() for path in slab.glob("*/headers")}
    for arguments in ((), ("--secret-file", secret)):
        done = kvtier("verify", "--repair", *arguments, slab)
        assert done.returncode == 1
        assert done.stdout.count("blocks not verified: the namespace's description cannot be read") == 2, done.stdout
    assert {path: path.read_bytes() for path in slab.glob("*/headers")} == before
    make_slab(slab, blocks=0, secret_file=str(secret))
    report = as_json("verify", "--secret-file", secret, slab)
    assert sorted(entry["good"] for entry in report["directories"][0]["namespaces"]) == [0, 10]


def test_a_directory_named_twice_is_verified_once(slab, tmp_path):
    (tmp_path / "link").symlink_to(slab)
    report = as_json("verify", "--repair", slab, tmp_path / "link")
    assert [len(directory["namespaces"]) for directory in report["directories"]] == [1]
