"""The comparison with vLLM's own manager runs; its figures are judged by people, on a quiet machine."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    "num_chunks" not in inspect.signature(SharedOffloadRegion).parameters,
    reason="THIS VLLM'S OWN TIERING HAS OTHER CLASSES: it was not compared with kvtier",
)


def test_the_quick_run_prints_both_tables(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "vllm_control_plane.py"), "--quick", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "vLLM / adapter" in done.stdout
    assert "vLLM / kvtier" in done.stdout
    figures = json.loads(path.read_text())
    operations = {row["operation"] for row in figures["memory"]}
    assert {"lookup hit", "lookup miss", "store", "store evicting", "load", "touch", "new request"} <= operations
    assert all(row[name] > 0 for row in figures["memory"] for name in ("vLLM", "adapter", "bare"))
    assert [(row["keys"], row["question"]) for row in figures["disk"]] == [
        (512, question) for question in ("absent", "waiting: a repeated scan", "waiting: end of the step")
    ]
    assert all(row[name] > 0 for row in figures["disk"] for name in ("vLLM", "kvtier"))
