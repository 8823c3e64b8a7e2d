"""The comparison with other stores of blocks names what is not installed, and finds out who moves wrong bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORGETFUL = """
from peer import Peer
from kvtier.types import JobResult

class Forgetful(Peer):
    def __init__(self, place):
        self.tier, self.block_bytes, self.place, self.ended = self, place.block_bytes, place, []
    def can_store(self, num_blocks): return True
    def submit_store(self, job): self.ended.append(JobResult(job.job_id, True))
    submit_load = submit_store
    def get_finished_jobs(self): ended, self.ended = self.ended, []; return ended
    def on_schedule_end(self, context): pass
    def forget(self, keys): pass
    def close(self): pass
"""


def test_what_is_not_installed_is_named_with_its_command(tmp_path):
    path, empty, folder = tmp_path / "figures.json", tmp_path / "cache", tmp_path / "disk"
    folder.mkdir()
    command = [sys.executable, str(ROOT / "benchmarks" / "disk"), "--peers", "--json", str(path)]
    command += ["--folder", str(folder), "--bytes", "8MiB", "--rounds", "1", "--blocks", "128KiB"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(empty)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.count("NOT MEASURED") == 3
    assert done.stdout.count("make peers-environment") == 2
    rows = {row["name"]: row for row in json.loads(path.read_text())["peers"]}
    assert list(rows) == [
        "raw limit",
        "raw limit, summed",
        "raw limit, small pages",
        "kvtier",
        "kvtier, small pages",
    ]
    for name in ("kvtier", "kvtier, small pages"):
        for direction in ("store", "load"):
            (figures,) = rows[name][direction]
            assert min(figures.values()) > 0
            assert set(figures) == {"gb_per_second", "cpu_per_gb", "thread_us", "ratio"}
    assert rows["kvtier, small pages"]["memory"] == "4 KiB pages"
    assert not list(folder.iterdir()), "the benchmark leaves files behind"


def test_a_peer_that_loads_other_bytes_is_found_out(tmp_path):
    (tmp_path / "forgetful.py").write_text(FORGETFUL)
    order = {"module": "forgetful", "class_name": "Forgetful", "folder": str(tmp_path / "peer"), "arena_path": None}
    order |= {"block_bytes": 4096, "job_blocks": 2, "num_blocks": 8, "huge_pages": "off"}
    process = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "disk" / "peer_process.py")],
        input=f"{json.dumps(order)}\nstore 0\nload 0\n",
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
    )
    assert len(process.stdout.splitlines()) == 2  # its memory, and the store's figures
    assert "WRONG BYTES" in process.stderr
    assert process.returncode
