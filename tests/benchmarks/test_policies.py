"""The benchmark of policies runs on any trace, and its bound is a bound."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.eviction.built_in import BUILT_IN_POLICIES

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "policies.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", ["agent_prompts.jsonl:64", "coding_agents.jsonl:1024"])
def test_the_manager_hits_what_the_policy_alone_does_and_lru_what_the_textbook_does(tmp_path, name):
    figures = tmp_path / "figures.json"
    assert "belady" in run("--quick", "--json", str(figures), str(ROOT / "tests" / "data" / name))
    (rows,) = json.loads(figures.read_text()).values()
    assert set(rows) == {*BUILT_IN_POLICIES, "textbook lru", "belady"} - {"auto"}, "a replay differs from the manager"
    assert rows["lru"] == rows["textbook lru"]
    for share in ("1.0%", "5.0%", "20.0%"):
        assert all(0 < row[share] <= rows["belady"][share] for row in rows.values())


def test_with_a_disk_it_prints_all_hits_and_those_from_memory(tmp_path):
    figures, trace = tmp_path / "figures.json", ROOT / "tests" / "data" / "agent_prompts.jsonl"
    run("--disk", "1", "--shares", "0.05", "--policies", "lru,prefix", "--json", str(figures), f"{trace}:64")
    (rows,) = json.loads(figures.read_text()).values()
    assert set(rows) == {"lru", "lru, from memory", "prefix", "prefix, from memory"}
    assert all(rows[f"{name}, from memory"]["5.0%"] < rows[name]["5.0%"] for name in ("lru", "prefix"))


def test_without_a_trace_it_says_so():
    assert "no trace given" in run()
