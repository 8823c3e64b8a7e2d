"""Releases of vLLM that share a namespace compute the same keys and the same bytes, and an upgrade keeps the disk."""

import os
import shutil
from importlib.metadata import distribution
from pathlib import Path

import pytest
import vllm
from vllm_engine import Engine, prompt, wait_until_up, written

import kvtier
from kvtier.adapters.vllm.identity import alike_release
from kvtier.testing.patience import wait_for

pytestmark = pytest.mark.timeout(1800)

HERE = vllm.__version__.removesuffix("+cpu")
COMPARED = ("0.28.0", "0.30.0", "0.32.0", "0.33.0")
OTHERS = [release for release in COMPARED if release != HERE]
PROMPTS = [prompt(1400, 700), prompt(1401, 900, prefix=prompt(1400, 700)[:300])]
BLOCKS, TOKENS = 5 + 5, (5 + 7) * 128
"""The second prompt shares two blocks with the first."""


def python_of(release):
    """Return the interpreter of another release's environment."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    python = Path(base, "kvtier", f"vllm-{release}", "bin", "python")
    if not python.exists():
        pytest.skip(f"VLLM {release} IS NOT INSTALLED: `make vllm-environment VLLM={release}` does it")
    return python


@pytest.fixture(scope="module")
def path_to_kvtier(tmp_path_factory):
    """Return an environment in which another release finds this kvtier, which is not installed there.

    A path to the sources is not enough: vLLM looks for the entry points of installed packages.
    """
    found = tmp_path_factory.mktemp("found") / "kvtier-0.dist-info"
    found.mkdir()
    (found / "entry_points.txt").write_text(distribution("kvtier").read_text("entry_points.txt"))
    paths = [str(found.parent), str(Path(kvtier.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def over(directory):
    return {"secondary_tiers": [{"type": "disk", "path": str(directory), "capacity": "64MiB"}]}


@pytest.fixture(scope="module", params=["llama", "gemma"])
def shape(request, tmp_path_factory):
    from vllm_models import save_gemma, save_llama

    save = {"llama": save_llama, "gemma": save_gemma}[request.param]
    return save(tmp_path_factory.mktemp("released") / request.param)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def computed_here(request, shape, tmp_path_factory):
    """Return (model, dtype, blocks, answers, directory) of this release."""
    folder = tmp_path_factory.mktemp("computed")
    blocks, answers, _ = compute(shape, request.param, folder)
    return shape, request.param, blocks, answers, folder / "disk"


def compute(model, dtype, folder, **options):
    """Return what an engine computed, what it answered, and how much of it came from the disk."""
    with Engine(model, folder / "log", kvtier=over(folder / "disk"), dtype=dtype, **options) as engine:
        wait_until_up(engine)
        answers = [engine.generate(asked)[0] for asked in PROMPTS]
        blocks, hits = engine.ask("blocks"), engine.external_hits()
        wait_for(lambda: hits or written(engine) >= len(blocks), "writing the blocks")
        return blocks, answers, hits


@pytest.mark.parametrize("release", OTHERS)
def test_another_release_computes_the_same_and_finds_it_on_the_disk(computed_here, release, path_to_kvtier, tmp_path):
    model, dtype, blocks, answers, directory = computed_here
    there = {"python": python_of(release), "environment": path_to_kvtier}
    (tmp_path / "new").mkdir()
    theirs, their_answers, _ = compute(model, dtype, tmp_path / "new", **there)
    # Which windows of a sliding layer are offered differs from release to release.
    common = blocks.keys() & theirs.keys()
    assert len(common) >= BLOCKS
    assert [key for key in sorted(common) if theirs[key] != blocks[key]] == []
    assert their_answers == answers
    (tmp_path / "kept").mkdir()
    shutil.copytree(directory, tmp_path / "kept" / "disk")
    _, their_answers, hits = compute(model, dtype, tmp_path / "kept", **there)
    assert their_answers == answers
    assert hits > 0


def test_this_release_is_one_of_them():
    if HERE not in COMPARED:
        pytest.skip(f"VLLM {HERE} IS NOT AMONG THE RELEASES THAT WERE COMPARED: its disk is its own")
    assert alike_release(vllm.__version__, "cpu") == alike_release("0.28.0", "cpu")
