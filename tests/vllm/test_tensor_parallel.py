"""Two workers that share an engine's arena."""

import os
import signal
from pathlib import Path

import pytest
from vllm_engine import Engine, prompt, wait_until_up, written

from kvtier.testing.patience import PATIENCE_SECONDS, wait_for

TOKENS = 5 * 128
PROMPTS = [prompt(seed, 700) for seed in (800, 801)]
TWO = {"tensor_parallel_size": 2, "processes": True, "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}}

VLLMS_OWN = ("vllm_dist_", "psm_", "sem.mp-")
"""Names of what vLLM's workers talk through, which outlives a killed one, with kvtier and without."""


def over(directory):
    """Return kvtier's keys; processes that want more than there are processors make loads late."""
    disk = {"type": "disk", "path": str(directory), "capacity": "64MiB", "job_deadline": PATIENCE_SECONDS}
    return {"secondary_tiers": [disk], "load_deadline": PATIENCE_SECONDS, "tier_deadline": PATIENCE_SECONDS}


def workers(engine):
    return [pid for pid in engine.pids() if Path(f"/proc/{pid}/comm").read_text().startswith("VLLM::Worker")]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def answers_of(engine):
    """Return (answers to PROMPTS, tokens that came from kvtier)."""
    before = engine.external_hits()
    return [engine.generate(asked)[0] for asked in PROMPTS], engine.external_hits() - before


@pytest.fixture(scope="module")
def left(model, baseline, tmp_path_factory):
    """Return the directory of an engine that served from host memory, and of which a worker was killed then."""
    folder, before = tmp_path_factory.mktemp("two"), set(os.listdir("/dev/shm"))
    with Engine(model, folder / "log", kvtier=over(folder / "disk"), **TWO) as engine:
        wait_until_up(engine)
        assert answers_of(engine) == (baseline(*PROMPTS), 0)
        engine.reset()
        assert answers_of(engine) == (baseline(*PROMPTS), 2 * TOKENS)
        wait_for(lambda: written(engine) == 10, what="writing 10 blocks")
        assert engine.metrics()["kvtier_hit_blocks.primary"] == 10
        pids = engine.pids()
        assert len(workers(engine)) == 2
        os.kill(workers(engine)[1], signal.SIGKILL)
        with pytest.raises(RuntimeError, match="no reply from the engine"):
            wait_for(lambda: not engine.generate(PROMPTS[0]), what="the engine's end")
    wait_for(lambda: not any(map(is_running, pids)), what="the end of all of the engine's processes")
    left = set(os.listdir("/dev/shm")) - before
    assert [name for name in left if not name.startswith(VLLMS_OWN)] == []
    return folder / "disk"


def test_a_killed_worker_leaves_a_disk_that_the_next_engine_reads(model, baseline, left, tmp_path):
    with Engine(model, tmp_path / "log", kvtier=over(left), **TWO) as engine:
        wait_until_up(engine)
        assert answers_of(engine) == (baseline(*PROMPTS), 2 * TOKENS)
        assert engine.metrics()["kvtier_hit_blocks.disk"] == 10
        engine.reset()
        assert engine.generate(*PROMPTS) == baseline(*PROMPTS)
        assert engine.metrics()["kvtier_hit_blocks.primary"] >= 10
