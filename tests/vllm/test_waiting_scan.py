"""The benchmark of waiting requests runs; its figures are judged by people, on a quiet machine."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_repeated_scan_costs_a_part_of_the_first(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "waiting_scan.py"), "--quick", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    full, window = json.loads(path.read_text())
    assert full["keys"] == window["keys"] == 512
    assert full["scan_us"] < full["first_scan_us"] / 10
    assert window["scan_us"] < 10 * window["raw_us"]
