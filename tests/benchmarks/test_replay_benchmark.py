"""The benchmark of replays runs, and compares like with like."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "replay.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_quick_run_prints_a_table_and_writes_json(tmp_path):
    prefixes = (ROOT / "tests" / "data" / "conversation_prefixes.jsonl").read_text().splitlines()[:300]
    trace, figures = tmp_path / "trace.jsonl", tmp_path / "figures.json"
    requests = [
        {"timestamp": number * 1000, "input_length": 512 * len(ids), "output_length": 1, "hash_ids": ids}
        for number, ids in enumerate(map(json.loads, prefixes))
    ]
    trace.write_text("".join(json.dumps(request) + "\n" for request in requests))
    assert "trace.jsonl" in run("--quick", "--json", str(figures), str(trace))
    one_tier, two_tiers = json.loads(figures.read_text())
    assert one_tier["disk_blocks"] == 0 < two_tiers["disk_blocks"]
    for row in (one_tier, two_tiers):
        assert min(row["replayed"], row["bare"], row["ratio"]) > 0


def test_without_a_trace_it_says_so():
    assert "no trace given" in run()
