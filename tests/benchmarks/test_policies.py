"""The benchmark of policies runs on any trace, and its bound is a bound."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCKS = {"hash_ids": None}


def run(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "policies.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_quick_run_prints_a_table_and_writes_json(tmp_path):
    lines = (ROOT / "tests" / "data" / "conversation_prefixes.jsonl").read_text().splitlines()[:400]
    trace, figures = tmp_path / "trace.jsonl", tmp_path / "figures.json"
    trace.write_text("".join(json.dumps(BLOCKS | {"hash_ids": json.loads(line)}) + "\n" for line in lines))
    assert "belady" in run("--quick", "--json", str(figures), str(trace))
    rows = json.loads(figures.read_text())["trace.jsonl"]
    assert set(rows) == {"lru", "arc", "s3fifo", "tinylfu", "prefix", "auto", "belady"}
    for share in ("1.0%", "5.0%", "20.0%"):
        assert all(0 < row[share] <= rows["belady"][share] for row in rows.values())


def test_without_a_trace_it_says_so():
    assert "no trace given" in run()
