"""`kvtier bench disk` as a process."""

import functools
import json
import mmap
import signal
import subprocess
import sys
from dataclasses import fields

import pytest

from kvtier.cli.bench import advise
from kvtier.cli.disk_speed.measure import Figures
from kvtier.cli.disk_speed.raw import REQUEST_BYTES, RawFile
from kvtier.testing.patience import wait_for


def run(*arguments):
    command = [sys.executable, "-m", "kvtier", "bench", "disk", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def figures(block_bytes, load, ratio):
    known = {"block_bytes": block_bytes, "load": load, "ratio": ratio, "direct": True}
    return Figures(**{item.name: known.get(item.name, 1.0) for item in fields(Figures)})


def test_it_measures_says_what_to_set_and_leaves_nothing(tmp_path):
    done = run(tmp_path, "--quick", "--block", "2MiB", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert [row["load"] for row in answer["rows"]] == [False, True]
    assert all(row["tier"] > 0 and row["raw"] > 0 for row in answer["rows"])
    assert answer["advice"]["block_bytes"] == 2 << 20
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("missing",), "a directory that exists"),
        ((".", "--block", "nonsense"), "block="),
        ((".", "--block", "1000"), "a multiple of 4096 bytes"),
        ((".", "--block", "2GiB"), "up to 256.0 MiB"),
        (("taken/0123456789abcdef0123456789abcdef",), "belongs to a disk tier"),
        (("taken",), "belongs to a disk tier"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken" / "0123456789abcdef0123456789abcdef").mkdir(parents=True)
    (tmp_path / "taken" / "lock").touch()
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ended_early_it_leaves_nothing(tmp_path, number):
    command = [sys.executable, "-m", "kvtier", "bench", "disk", str(tmp_path), "--block", "2MiB"]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # in the background it may be ignored
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=heed, **pipes) as process:
        wait_for(lambda: list(tmp_path.glob("kvtier-bench-*/*")), "it has files")
        process.send_signal(number)
        shown, said = process.communicate()
    assert (process.returncode, shown) == (130, "")
    assert said.strip() == "kvtier: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_block_that_is_fast_enough_is_recommended():
    rows = [figures(size, load, ratio) for size, ratio in ((1, 0.7), (2, 0.93), (4, 0.99)) for load in (False, True)]
    assert advise(rows)["block_bytes"] == 2
    assert advise(rows[:2])["block_bytes"] == 1
    rows[3] = figures(2, True, 0.8)
    assert advise(rows)["block_bytes"] == 4


def test_a_device_is_measured_under_a_kernel_without_transparent_huge_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(mmap, "MADV_NOHUGEPAGE", 9999)  # no kernel knows it: EINVAL, as for a kernel built without them
    file = RawFile(tmp_path / "raw", 4 * REQUEST_BYTES)
    assert all(file.move(write=False, small=small)["seconds"] > 0 for small in (True, False))
