"""The benchmark of many engines runs over each shared tier; its figures are judged by people, on a quiet machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mooncake_server import why_not

ROOT = Path(__file__).parents[2]
FIGURES = {"store_gb", "load_gb", "look_p50_ms", "look_p99_ms", "open_ms", "descriptors", "threads", "kib"}


def run(path, *kinds):
    command = [sys.executable, str(ROOT / "benchmarks" / "scale.py"), "--kinds", *kinds, "--engines", "1", "3"]
    command += ["--rounds", "1", "--blocks", "6", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "NOT MEASURED" not in done.stderr
    rows = json.loads(path.read_text())
    assert [(row["kind"], row["engines"]) for row in rows] == [(kind, count) for kind in kinds for count in (1, 3)]
    for row in rows:
        assert set(row) == {"kind", "engines", "server_kib", *FIGURES}
        assert row["store_gb"] > 0
        assert row["load_gb"] > 0
    return rows


def test_every_engine_moves_its_blocks(tmp_path):
    rows = run(tmp_path / "figures.json", "resp", "filesystem", "object", "object-in-memory")
    assert all(row["descriptors"] >= 1 for row in rows if row["kind"] == "resp"), "each has a connection of its own"


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_every_engine_has_a_client_of_mooncakes(tmp_path):
    rows = run(tmp_path / "figures.json", "mooncake")
    assert all(row["threads"] >= 1 for row in rows)
