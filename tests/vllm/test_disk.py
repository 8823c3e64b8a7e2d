"""Engines that come and go over one directory."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from vllm_engine import Engine, prompt, wait_until_up, written

from kvtier.testing.patience import wait_for

PROMPTS = [prompt(seed, 700) for seed in (100, 101)]
TOKENS = 5 * 128
"""Tokens of each prompt that whole blocks hold."""


def over(directory, **keys):
    return {"secondary_tiers": [{"type": "disk", "path": str(directory), "capacity": "64MiB", **keys}]}


@pytest.fixture(scope="module")
def filled(model, baseline, tmp_path_factory):
    """Return a directory that an engine has filled with the blocks of PROMPTS and left in peace."""
    folder = tmp_path_factory.mktemp("filled")
    with Engine(model, folder / "log", kvtier=over(folder / "disk")) as engine:
        wait_until_up(engine)
        assert [engine.generate(asked)[0] for asked in PROMPTS] == baseline(*PROMPTS)
        wait_for(lambda: written(engine) == 10, what="writing 10 blocks")
    return folder / "disk"


def ask_again(model, directory, log, **options):
    """Return (answers, tokens from kvtier, metrics, log) of a new engine over a copy of the directory."""
    with Engine(model, log, **({"kvtier": over(directory)} | options)) as engine:
        wait_until_up(engine)
        answers = [engine.generate(asked)[0] for asked in PROMPTS]
        return answers, engine.external_hits(), engine.metrics(), engine.log()


def copy_of(directory, tmp_path):
    return Path(shutil.copytree(directory, tmp_path / "disk"))


def test_a_new_process_reads_what_the_last_one_wrote(model, baseline, filled, tmp_path):
    answers, hits, metrics, _ = ask_again(model, copy_of(filled, tmp_path), tmp_path / "log")
    assert answers == baseline(*PROMPTS)
    assert hits == 2 * TOKENS
    assert metrics["kvtier_hit_blocks.disk"] == 10


def test_after_a_reset_of_the_connector_the_disk_misses_too(model, baseline, filled, tmp_path):
    with Engine(model, tmp_path / "log", kvtier=over(copy_of(filled, tmp_path))) as engine:
        wait_until_up(engine)
        assert engine.generate(PROMPTS[0]) == baseline(PROMPTS[0])
        assert engine.external_hits() == TOKENS
        assert engine.reset(reset_connector=True)
        assert [engine.generate(asked)[0] for asked in PROMPTS] == baseline(*PROMPTS)
        assert engine.external_hits() == TOKENS
        assert engine.metrics()["kvtier_resets"] == 1


def test_flipped_bits_are_misses(model, baseline, filled, tmp_path):
    directory = copy_of(filled, tmp_path)
    flipped = 0
    for file in directory.rglob("data-*"):
        raw = bytearray(file.read_bytes())
        for position in range(1000, len(raw), 4096):
            raw[position] ^= 1
        file.write_bytes(raw)
        flipped += 1
    assert flipped
    answers, hits, metrics, _ = ask_again(model, directory, tmp_path / "log")
    assert (answers, hits) == (baseline(*PROMPTS), 0)
    assert metrics["kvtier_failed_blocks.corrupt.disk"] == 10


def test_other_weights_under_the_same_path_miss(model, filled, tmp_path):
    from vllm_models import save_llama

    path = tmp_path / "model"
    shutil.copytree(model, path)
    directory = copy_of(filled, tmp_path)
    _, hits, _, _ = ask_again(path, directory, tmp_path / "log-moved")
    assert hits == 2 * TOKENS  # the same weights elsewhere
    save_llama(path, seed=1)
    answers, hits, _, _ = ask_again(path, directory, tmp_path / "log-changed")
    assert hits == 0
    with Engine(path, tmp_path / "log-plain", enable_prefix_caching=False) as plain:
        assert answers == [plain.generate(asked)[0] for asked in PROMPTS]


def test_killed_at_work_and_started_again(model, baseline, tmp_path):
    before = set(os.listdir("/dev/shm"))
    engine = Engine(model, tmp_path / "log", processes=True, kvtier=over(tmp_path / "disk"))
    try:
        wait_until_up(engine)
        assert [engine.generate(asked)[0] for asked in PROMPTS] == baseline(*PROMPTS)
        wait_for(lambda: written(engine) == 10, what="writing 10 blocks")
        pids = engine.pids()
        core = next(pid for pid in pids if "EngineCore" in Path(f"/proc/{pid}/comm").read_text() or is_core(pid))
        os.kill(core, signal.SIGKILL)
    finally:
        engine.kill()
    wait_for(lambda: not any(is_io_process_of(pid, tmp_path) for pid in all_pids()), what="the I/O process's end")
    assert {name for name in set(os.listdir("/dev/shm")) - before if "kvtier" in name} == set()
    answers, hits, metrics, _ = ask_again(model, tmp_path / "disk", tmp_path / "log-again")
    assert (answers, hits) == (baseline(*PROMPTS), 2 * TOKENS)
    assert metrics["kvtier_hit_blocks.disk"] == 10


def is_core(pid):
    return b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()


def all_pids():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def is_io_process_of(pid, folder):
    """Whether a process is one of kvtier's, over a tier in this folder."""
    try:
        links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False
    return any(link.startswith(str(folder / "disk")) for link in links)
