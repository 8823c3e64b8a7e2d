"""The benchmark runs, and says what it should; its figures are judged by people, on a quiet machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_quick_run_prints_a_table_and_writes_json(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "resp.py"), "--quick", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "redis-py" in done.stdout
    assert "existence of 8,192 keys" in done.stdout
    figures = json.loads(path.read_text())
    assert [row["block_bytes"] // 1024 for row in figures["rows"]] == [128, 512, 2048, 8192]
    for row in figures["rows"]:
        assert min(row["ratio write"], row["ratio read"]) > 0, row
    assert figures["probes_ms"]["a prefix held"] > 0


def test_without_lmcache_the_tier_is_measured_and_the_missing_client_is_named(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "resp.py"), "--peer", "--quick", "--json", str(path)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "NOT MEASURED: LMCache" in done.stderr
    assert "make peers-environment" in done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [(row["block_bytes"] // 1024, row["way"]) for row in rows] == [
        (size, way) for size in (128, 512, 2048) for way in ("store", "load")
    ]
    assert all(row["kvtier gb_per_second"] > 0 for row in rows)
