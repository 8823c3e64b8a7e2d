"""benchmarks/jobs.py runs and prints every row."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_cost_of_a_job_is_printed_for_each_size(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "jobs.py"), "--jobs", "2", "--folder", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    for row in (
        "tier, store",
        "tier, load",
        "tier, poll without answers",
        "manager, store",
        "manager, 16 stores a step",
    ):
        assert row in printed
    assert not list(tmp_path.iterdir())
