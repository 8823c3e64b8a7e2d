"""vLLM's own tests of offloading, from its source distribution, with kvtier's classes where the interfaces match."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvtier

SOURCES = Path(sys.prefix, "sources")

OTHER_BY_DESIGN = [
    "test_config_info_keys_match_the_filled_values",  # of a label that only vLLM's example tier has
    "test_reset_holds_promotions_until_flushed",  # kvtier's tiers forget their blocks at a reset
]


def run_own_tests(path, plugin):
    """Run tests of vLLM's with a plugin of ours, and return the last line of pytest's output."""
    if not (SOURCES / ".complete").exists():
        pytest.skip("VLLM'S SOURCES ARE NOT HERE: `make vllm-environment` fetches them")
    here, root = Path(__file__).parent, Path(kvtier.__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-p", plugin, "-p", "no:cacheprovider", "--noconftest", "-q"]
    command += ["-c", os.devnull, "--rootdir", str(SOURCES), "--tb=short", "--show-capture=no", path]
    command += ["-k", " and ".join(f"not {name}" for name in OTHER_BY_DESIGN)]
    places = os.pathsep.join(map(str, (SOURCES, here, root)))  # the package `tests` is vLLM's there
    done = subprocess.run(
        command, cwd=SOURCES, env=os.environ | {"PYTHONPATH": places}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_vllms_manager_over_tiers_of_kvtier():
    said = run_own_tests("tests/v1/kv_offload/tiering/test_tiering_offloading.py", "own_tests")
    assert int(said.split(" passed")[0].split()[-1]) >= 60, said
