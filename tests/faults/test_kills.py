"""I/O processes killed and stopped at random under load, engines killed while theirs write: nothing wrong is served."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from disk_rigs import QUICK, make_rig, start, striped_tier

from kvtier.events import TierState
from kvtier.secondary.settings import Deadlines
from kvtier.testing.stores import make_key, make_payload
from kvtier.testing.tier_rig import succeeded
from kvtier.types import LookupResult

ROUNDS = 50
"""Each costs the start of a process; `test_slab_kill.py` has as many below the tier."""
NUMBERS = 200


class Load:
    """Random stores and loads, several at once; every slot is scribbled over as soon as its job has answered."""

    def __init__(self, rig, seed):
        self.rig, self.chance = rig, random.Random(seed)
        self.free = list(range(rig.num_blocks))
        self.jobs = {}
        self.loaded = 0

    def step(self):
        self.rig.poll()
        for job in [job for job in self.jobs if job in self.rig.results]:
            is_load, numbers, slots = self.jobs.pop(job)
            for number, slot in zip(numbers, slots, strict=True):
                if is_load and succeeded(self.rig.results[job], make_key(number)):
                    assert self.rig.read(slot) == make_payload(number, self.rig.block_bytes), f"wrong bytes: {number}"
                    self.loaded += 1
                self.rig.fill(slot, bytes([self.chance.randrange(256)]) * self.rig.block_bytes)
            self.free += slots
        if len(self.free) >= 8:
            count = self.chance.randint(1, 8)
            slots = [self.free.pop() for _ in range(count)]
            numbers = self.chance.sample(range(NUMBERS), count)
            is_load = self.chance.random() < 0.5
            if not is_load:
                for number, slot in zip(numbers, slots, strict=True):
                    self.rig.fill(slot, make_payload(number, self.rig.block_bytes))
            job = self.rig.submit([make_key(number) for number in numbers], slots, is_load)
            self.jobs[job] = (is_load, numbers, slots)

    def run(self, seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.step()

    def until_more_come_back(self):
        """Go on until ten more blocks have been loaded: how many are on a busy machine within some time is chance."""
        wanted = self.loaded + 10
        self.rig.wait(lambda: (self.step(), self.loaded >= wanted)[1], "blocks have come back")

    def finish(self):
        self.rig.wait(lambda: set(self.jobs) <= set(self.rig.results), "every job is answered")
        self.rig.assert_each_job_answered_once()


@pytest.fixture
def rig():
    rig = make_rig()
    yield rig
    rig.close()


def test_killed_at_random_under_load(rig, tmp_path):
    """`kill -9` at a random moment of work, or of opening; then everything is read and compared."""
    tier = start(rig, tmp_path / "tier", settings=replace(QUICK, first_backoff=0.01, longest_backoff=0.01))
    load = Load(rig, 7)
    for _ in range(ROUNDS):
        load.run(load.chance.uniform(0.0, 0.03))
        victim = tier.io_pid
        if victim is not None:
            os.kill(victim, signal.SIGKILL)
        rig.wait(lambda victim=victim: (load.step(), tier.io_pid not in (None, victim))[1], "the next life")
        if load.chance.random() < 0.8:
            rig.wait(lambda: (load.step(), tier.state is TierState.UP)[1], "it is up")
    load.until_more_come_back()
    load.finish()
    rig.wait_up()
    held = [number for number in range(NUMBERS) if rig.lookup(number) is LookupResult.HIT]
    for first in range(0, len(held), 30):
        rig.load(held[first : first + 30])  # compares
    assert held


@pytest.mark.parametrize("seed", [1, 2])
def test_stopped_continued_and_killed_at_random(rig, tmp_path, seed):
    """A slot is scribbled over as soon as its job has answered: a process that still wrote or read it would show."""
    deadlines = Deadlines(job=0.3, overtaken_job=2.0, start=10.0, drain=0.5)
    tier = start(rig, tmp_path / "tier", settings=replace(QUICK, deadlines=deadlines, first_backoff=0.01))
    load = Load(rig, seed)
    for _ in range(8):
        load.run(load.chance.uniform(0.02, 0.08))
        pid = tier.io_pid
        if pid is None:
            rig.wait(lambda: (load.step(), tier.io_pid)[1] is not None, "the next life")
            continue
        os.kill(pid, signal.SIGSTOP)
        load.run(load.chance.uniform(0.0, 0.5))  # up to more than the deadline
        with contextlib.suppress(ProcessLookupError):  # it was given up
            os.kill(pid, load.chance.choice([signal.SIGCONT, signal.SIGCONT, signal.SIGKILL]))
    rig.wait(lambda: (load.step(), tier.state is TierState.UP)[1], "it is up")
    load.until_more_come_back()
    load.finish()


ENGINE = """
import sys, threading
from disk_rigs import make_rig, start
from test_kills import Load
rig = make_rig()
start(rig, sys.argv[1])
load = Load(rig, int(sys.argv[2]))
load.until_more_come_back()
print("working", flush=True)
load.run(60)
"""


def test_an_engine_killed_while_its_process_writes_and_restarted_at_once(rig, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = 0
    for number in range(3):
        command = [sys.executable, "-c", ENGINE, str(tmp_path / "tier"), str(number)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as engine:
            assert engine.stdout.readline() == b"working\n"
            try:
                engine.wait(0.02 + 0.05 * number)
            except subprocess.TimeoutExpired:
                engine.kill()
        again = make_rig()
        try:
            start(again, tmp_path / "tier")  # waits until the killed engine's process has let go
            held = [one for one in range(NUMBERS) if again.lookup(one) is LookupResult.HIT]
            for first in range(0, len(held), 30):
                found += len(again.load(held[first : first + 30])[1])  # compares
        finally:
            again.close()
    assert found > 0


def test_stripes_killed_at_random(rig, tmp_path):
    tier = striped_tier(rig, [tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    tier._least_run = 1
    for stripe in tier._stripes:
        stripe._standing.breaker._longest_backoff = stripe._standing.breaker._backoff = 0.5
    tier.start()
    rig.wait_up()
    load = Load(rig, 3)
    for _ in range(10):
        load.run(load.chance.uniform(0.0, 0.1))
        pids = [pid for pid in tier.io_pids if pid is not None]
        if pids:
            os.kill(load.chance.choice(pids), signal.SIGKILL)
    rig.wait(lambda: (load.step(), tier.get_stats()["stripes_up"] == 3)[1], "all are up")
    load.until_more_come_back()
    load.finish()
