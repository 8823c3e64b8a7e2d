"""The benchmark runs, and says what it should; its figures are judged by people, on a quiet machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_quick_run_prints_a_table_and_writes_json(tmp_path):
    pytest.importorskip("moto", reason="moto, from PyPI, is not installed")
    path = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "object.py"), "--quick", "--server", "moto"]
    done = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True, check=True)
    assert "requests a block" in done.stdout
    figures = json.loads(path.read_text())
    assert [row["block_bytes"] // 1024 for row in figures["rows"]] == [64, 512]
    for row in figures["rows"]:
        blocks = min(64, (4 << 20) // row["block_bytes"])
        assert row["packed write requests"] == 1 / blocks, "a pack is one request"
        assert row["packed read requests"] == 1 / blocks
        assert row["single write requests"] == 1
        assert row["packed read bytes"] == row["block_bytes"] + 128
    assert figures["lookups"]["requests"] == 0
    assert max(index["memory_bytes"] for index in figures["index"]) < 600
