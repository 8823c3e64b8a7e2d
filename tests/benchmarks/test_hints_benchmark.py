"""The benchmark of hints runs, and a session that says when it ends does no harm."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_prints_hits_by_hint(tmp_path):
    figures, trace = tmp_path / "figures.json", ROOT / "tests" / "data" / "agent_prompts.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "hints.py"), str(trace), "--tokens-per-block", "64"]
    shown = subprocess.run([*command, "--json", str(figures)], capture_output=True, text=True, check=True).stdout
    assert "no hints" in shown
    rows = json.loads(figures.read_text())
    assert all(0 < hits < 100 for row in rows.values() for hits in row.values())
    assert rows["sessions say when they end"]["20%"] >= rows["no hints"]["20%"]
