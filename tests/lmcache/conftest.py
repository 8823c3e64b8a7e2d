"""Memory and tiers for the tests under LMCache, which has an environment of its own: `make test-lmcache`."""

import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

HAS_LMCACHE = "lmcache" in packages_distributions()
collect_ignore_glob = [] if HAS_LMCACHE else ["test_*.py"]

sys.path.append(str(Path(__file__).parents[1] / "vllm"))  # its engines and models serve here, too

KINDS = ("disk", "shared", "resp", "object", "stack")


def pytest_terminal_summary(terminalreporter):
    if not HAS_LMCACHE:
        terminalreporter.write_line("LMCACHE IS NOT INSTALLED: tests/lmcache was left out, `make test-lmcache` runs it")


@pytest.fixture(scope="session")
def memory():
    """LMCache's own host memory."""
    from adapters import HostMemory

    made = HostMemory()
    yield made
    made.close()


@pytest.fixture(params=KINDS)
def tiers(request, tmp_path):
    """Tiers of each kind, as in the configuration."""
    from adapters import bucket, disk, resp, shared

    kind = request.param
    if kind == "resp":
        return [resp(request.getfixturevalue("valkey"))]
    if kind == "object":
        return [bucket(request.getfixturevalue("moto_s3"))]
    if kind == "stack":
        return [disk(tmp_path), shared(tmp_path)]
    return [disk(tmp_path) if kind == "disk" else shared(tmp_path)]
