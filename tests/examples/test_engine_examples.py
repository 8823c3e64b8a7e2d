"""The examples that need no model run as their first lines say."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def run(name, *options):
    """Run an example as a user does, and return its lines."""
    command = [sys.executable, str(REPOSITORY / "examples" / name), *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_an_own_engine_loads_what_it_has_computed(tmp_path):
    first = run("own_engine.py", "--blocks", tmp_path / "blocks")
    assert first[0].endswith("restored: none")
    assert first[1:] == [f"question {n}: 403 tokens, restored: {{'primary': 400}}" for n in range(1, 5)]
    again = run("own_engine.py", "--blocks", tmp_path / "blocks")
    assert again[0] == "question 0: 403 tokens, restored: {'disk': 400}"


def test_loaded_pages_hold_what_the_model_would_compute(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "examples")
    from own_engine import Engine

    prompt = list(range(100))
    engine = Engine({"type": "disk", "path": str(tmp_path / "blocks"), "capacity": "64MiB"})
    computed, sources = engine.answer(prompt)
    assert sources == []
    engine.pages[:] = 0
    loaded, sources = engine.answer(prompt)
    assert sources == ["primary"] * 6
    assert (loaded == computed).all()
    engine.close()


def test_a_custom_tier(tmp_path):
    assert run("custom_tier.py", "--blocks", tmp_path) == ["200 tokens, 0 blocks restored from nowhere"]
    assert run("custom_tier.py", "--blocks", tmp_path) == ["200 tokens, 12 blocks restored from ['ZippedTier']"]


def test_a_recording_in_pandas(tmp_path):
    recording = tmp_path / "engine.rec"
    run("own_engine.py", "--blocks", tmp_path / "blocks", "--record", recording)
    lines = run("recording_with_pandas.py", recording, "--every", "1s")
    assert lines[0].endswith("blocks of 16 tokens in host memory, policy lru")
    means = next(line for line in lines if line.startswith("mean")).split()
    assert means == ["mean", "25.0", "20.0", "25.0"]
