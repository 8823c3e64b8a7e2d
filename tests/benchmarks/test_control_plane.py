"""The benchmark runs, and says what it should; its figures are judged by people, on a quiet machine."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_quick_run_prints_a_table_and_writes_json(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "control_plane.py"), "--quick", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "dict.get" in done.stdout
    figures = json.loads(path.read_text())
    assert {(row["keys"], row["policy"]) for row in figures["rows"]} == {
        (size, policy) for size in (64, 512, 8192) for policy in ("lru", "arc")
    }
    for row in figures["rows"]:
        assert all(row[operation] > 0 for operation in figures["targets"]), row
    assert "longest calls" in done.stdout
    assert {(row["requests"], row["policy"]) for row in figures["waits"]} == {
        (count, policy) for count in (1, 25) for policy in ("lru", "arc")
    }
    for row in figures["waits"]:
        calls = ("plan", "step", "expiry", "finish after expiry", "prepare_load", "complete_load", "finish")
        assert all(row[call] >= 0 for call in calls), row
