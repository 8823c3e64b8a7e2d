"""The benchmark of weights runs, and prints both rates."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "weights.py"


def test_the_benchmark_prints_the_rate_and_the_raw_limit():
    command = [sys.executable, str(SCRIPT), "--mib", "9", "--rounds", "2"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("read " in line and "told apart " in line for line in lines)
