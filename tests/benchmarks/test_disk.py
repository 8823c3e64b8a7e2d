"""The benchmark runs, and says what it should; its figures are judged by people, on a quiet machine."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_tiny_run_prints_tables_and_joins_its_json(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "disk"), "--quick", "--json", str(path)]
    command += ["--folder", str(tmp_path), "--bytes", "8MiB", "--rounds", "1", "--jobs", "16"]
    pieces = [["--blocks", "128KiB", "--index", "0"], ["--blocks", "--index", "3000"]]
    for piece in pieces:
        done = subprocess.run([*command, *piece], capture_output=True, text=True, check=True)
    assert "3,000 blocks" in done.stdout
    figures = json.loads(path.read_text())
    assert [(row["block_bytes"], row["job_blocks"], row["load"]) for row in figures["rows"]] == [
        (128 << 10, 16, False),
        (128 << 10, 16, True),
    ]
    for row in figures["rows"]:
        assert row["raw"] > 0
        assert row["tier"] > 0
        assert row["cpu"] > 0
        assert set(row["steps_ms"]) == {"idle", "raw", "tier"}
        assert row["job_us"] > 0
        assert min(row["lookups"].values()) > 0
    assert figures["index"]["num_blocks"] == 3000
    assert 128 <= figures["index"]["disk_bytes"] < 150
    assert list(tmp_path.iterdir()) == [path], "the benchmark leaves files behind"
