"""The script for a machine with a GPU runs where there is none: minutes on a GPU are not spent on its faults."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="TORCH IS NOT INSTALLED: benchmarks/gpu.py was not tried")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def test_every_part_runs_on_the_cpu(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--json", str(figures)]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads(figures.read_text())
    assert found["bytes"].endswith("all bytes equal")
    assert all(row["store"] > 0 and row["load whole"] > 0 for row in found["copies"])
    assert found["first_token"]["disk"] > 0


def test_without_a_device_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device: `make test-gpu` runs the script on it")
    done = subprocess.run([sys.executable, str(SCRIPT)], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("NO CUDA DEVICE")
