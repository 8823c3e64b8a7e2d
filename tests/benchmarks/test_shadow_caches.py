"""The benchmark runs, and says what it should; its figures are judged by people, on a quiet machine."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_quick_run_prints_a_table_and_writes_json(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "shadow_caches.py"), "--quick", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "following" in done.stdout
    figures = json.loads(path.read_text())
    (row,) = figures["rows"]
    assert {"resting %", "following %", "in the long run %"} <= row.keys()
