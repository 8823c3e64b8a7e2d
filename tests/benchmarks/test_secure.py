"""The benchmark of seals and encryption runs, and prints every rate."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "secure.py"
IN_MEMORY = ["copy", "AES-256-GCM alone", "plain seal", "plain verify", "secret seal", "secret verify"]
ON_DISK = [f"disk {way}, {mode}" for way in ("write", "read") for mode in ("plain", "secret", "encrypted")]


def test_the_benchmark_prints_every_rate(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--json", "--path", str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True)
    results = json.loads(done.stdout)
    assert list(results) == ["128 KiB", "2048 KiB"]
    for rates in results.values():
        assert list(rates) == [*IN_MEMORY, "encrypt", "decrypt", *ON_DISK]
        assert all(rate > 0 for rate in rates.values())
    assert list(tmp_path.iterdir()) == []
