"""Engines one after the other over one tier, all defaults, on a busy machine: the next one finds what was stored."""

import os
import subprocess
import sys
import time

import pytest
from proxy import Faults, Proxy
from whole_engine import WholeEngine, make_keys

from kvtier.secondary.resp import RespTierManager

NUM_BLOCKS, NUM_ENGINES = 8, 3
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"


@pytest.fixture
def busy_machine():
    """A process for each processor that takes all the time it gets, until this one ends."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 1)]
    yield
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(params=["disk", "filesystem", "resp"])
def tier(request, tmp_path):
    if request.param == "resp":
        return {"type": "resp", "url": request.getfixturevalue("valkey").url}
    return {"type": request.param, "path": str(tmp_path / "blocks"), "capacity": "64MiB"}


@pytest.mark.parametrize("waits", [True, False], ids=["when the tier is up", "at once"])
def test_the_next_engine_finds_every_block(tier, busy_machine, waits):
    keys, found = make_keys(NUM_BLOCKS, "stored by the first"), []
    first = WholeEngine(None, tier=tier).start()
    first.store(keys)
    first.idle()
    first.close()
    later = (
        tier if waits else {**tier, "probe_deadline": 30.0}
    )  # not to depend on how soon the machine starts a process
    for _ in range(NUM_ENGINES):
        engine = WholeEngine(None, tier=later, load_deadline=30.0)  # nor on how long it takes to copy
        if waits:
            engine.start()
        found.append(engine.restore(keys))
        engine.close()
    assert found == [NUM_BLOCKS] * NUM_ENGINES


def test_a_server_that_never_answers_again_does_not_delay_every_request(valkey):
    proxy = Proxy(valkey.address)
    engine = WholeEngine(None, tier={"type": "resp", "url": proxy.url}).start()
    try:
        assert engine.restore(make_keys(1, "a first question")) == 0
        proxy.faults = Faults(swallow=True)
        started = time.monotonic()
        for number in range(40):
            assert engine.restore(make_keys(4, f"request {number}")) == 0
        assert time.monotonic() - started < 40 * RespTierManager.probe_deadline
    finally:
        engine.close()
        proxy.close()
