"""`kvtier bench disk` as a process."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest

from kvtier.cli.bench import advise
from kvtier.cli.disk_speed.measure import Figures


def run(*arguments):
    command = [sys.executable, "-m", "kvtier", "bench", "disk", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


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
        (("taken",), "is a disk tier's"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "lock").touch()
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_smallest_block_that_is_fast_enough_is_recommended():
    rows = [figures(size, load, ratio) for size, ratio in ((1, 0.7), (2, 0.93), (4, 0.99)) for load in (False, True)]
    assert advise(rows)["block_bytes"] == 2
    assert advise(rows[:2])["block_bytes"] == 1
    rows[3] = figures(2, True, 0.8)
    assert advise(rows)["block_bytes"] == 4
