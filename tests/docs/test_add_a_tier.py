"""The files that docs/add-a-tier.md prints work as printed, and programs print what it says they print."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = REPOSITORY / "docs" / "add-a-tier.md"
FENCE = re.compile(r"^```(?P<language>\w*)(?: (?P<key>file|run)=(?P<name>\S+))?\n(?P<text>.*?)^```$", re.M | re.S)
SUITES = "test_sqlite_tier.py"


def blocks(key):
    return [(found["name"], found["text"]) for found in FENCE.finditer(DOCUMENT.read_text()) if found["key"] == key]


def environment(directory):
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(directory), str(REPOSITORY)])}


def run(directory, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=environment(directory),
        capture_output=True,
        text=True,
    )


@pytest.fixture(name="directory")
def _directory(tmp_path):
    for name, text in blocks("file"):
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_document_is_read_whole():
    names = [name for name, _ in blocks("file")]
    assert len(names) == len(set(names)) == DOCUMENT.read_text().count("```python")
    assert {name for name, _ in blocks("run")} <= set(names)
    assert SUITES in names


def test_every_python_file_is_one_that_something_runs_or_imports(directory):
    texts = dict(blocks("file"))
    run_names = {name for name, _ in blocks("run")} | {SUITES}
    for name in texts.keys() - run_names:
        module = name.removesuffix(".py")
        assert any(module in text for other, text in texts.items() if other != name), f"nothing uses {name}"


def test_programs_print_what_the_document_says(directory):
    printed = [(name, run(directory, name)) for name, _ in blocks("run")]
    for (name, expected), (_, done) in zip(blocks("run"), printed, strict=True):
        assert done.stdout == expected, f"{name}\n{done.stderr}"
        assert done.returncode == 0, f"{name}\n{done.stderr}"


def test_the_tier_passes_the_suites(directory):
    done = run(directory, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(directory), SUITES)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) > 30, "the suites were not collected"


def test_the_store_is_as_short_as_promised():
    text = dict(blocks("file"))["sqlite_store.py"]
    store = text[text.index("class SQLiteStore") :]
    assert sum(bool(line.strip()) for line in store.splitlines()) < 40


@pytest.mark.parametrize("command", [["check"], ["format", "--check", "--diff"]], ids=["lint", "format"])
def test_the_examples_are_written_as_kvtier_is(directory, command):
    rules = ["--select", "E,F,W,I,B,UP,SIM,RUF,C4,RET,PIE"] if command == ["check"] else []
    known = ["--config", "lint.isort.known-third-party = ['kvtier', 'numpy']"] if rules else []
    pytest.importorskip("ruff", reason="ruff is not installed")
    done = run(directory, "-m", "ruff", *command, "--isolated", "--line-length", "120", *rules, *known, ".")
    assert done.returncode == 0, done.stdout + done.stderr
