"""The benchmark of seals runs, and prints every rate."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "secure.py"


def test_the_benchmark_prints_every_rate():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--json"], check=True, capture_output=True, timeout=60
    )
    results = json.loads(done.stdout)
    assert list(results) == ["128 KiB", "2048 KiB"]
    for rates in results.values():
        assert list(rates) == ["copy", "plain seal", "plain verify", "secret seal", "secret verify"]
        assert all(rate > 0 for rate in rates.values())
