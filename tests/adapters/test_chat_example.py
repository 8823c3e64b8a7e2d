"""The chat on transformers, as a user runs it, with a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from adapters_models import save_tiny_model, without_hub

from kvtier.testing.patience import wait_for

REPOSITORY = Path(__file__).parents[2]
QUESTIONS = [f"Tell me about the lighthouse number {number}, please, and about its keeper." for number in range(3)]


def chat(folder, *questions):
    command = [sys.executable, REPOSITORY / "examples" / "transformers_chat.py", folder / "model"]
    options = ["--blocks", folder / "blocks", "--max-new-tokens", "40"]
    environment = {**without_hub(), "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*map(str, command), *map(str, options)],
        input="\n".join(questions),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("[") and line.endswith("]")]


def test_later_turns_and_later_runs_restore_the_conversation(tmp_path):
    save_tiny_model(tmp_path / "model", "x")  # knows no words, so that each letter is a token
    first, *later = chat(tmp_path, *QUESTIONS)
    assert first.endswith("restored: none]")
    assert len(later) == 2
    assert all("'primary'" in turn for turn in later)
    # While the disk is still slow to start, computing so few tokens is sooner.
    wait_for(lambda: "'disk'" in chat(tmp_path, QUESTIONS[0])[0], "a later run restores from disk")
