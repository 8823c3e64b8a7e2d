"""vLLM's own tests of offloading, from its source distribution, with kvtier's classes where the interfaces match."""

import os
import re
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


def run_own_tests(path, *options):
    """Run tests where vLLM's own tests are packages; return how many passed."""
    if not (SOURCES / ".complete").exists():
        pytest.skip("VLLM'S SOURCES ARE NOT HERE: `make vllm-environment` fetches them")
    here, root = Path(__file__).parent, Path(kvtier.__file__).parents[1]
    command = [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", "--noconftest", "-q"]
    command += ["-c", os.devnull, "--rootdir", str(SOURCES), "--tb=short", "--show-capture=no", str(path)]
    places = os.pathsep.join(map(str, (SOURCES, here, root)))  # the package `tests` is vLLM's there
    done = subprocess.run(
        command, cwd=SOURCES, env=os.environ | {"PYTHONPATH": places}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return int(done.stdout.strip().splitlines()[-1].split(" passed")[0].split()[-1])


def test_vllms_manager_over_tiers_of_kvtier():
    wanted = " and ".join(f"not {name}" for name in OTHER_BY_DESIGN)
    path = "tests/v1/kv_offload/tiering/test_tiering_offloading.py"
    passed = run_own_tests(path, "-p", "own_tests", "-k", wanted)
    tests = re.findall(r"^ *def (test_\w+)", Path(SOURCES, path).read_text(), re.MULTILINE)
    assert passed >= len(tests) - len(OTHER_BY_DESIGN)  # some have several cases


def test_lookups_of_parts_of_blocks():
    assert run_own_tests(Path(__file__).with_name("partial_tails.py")) >= 5
