"""Threads that cannot be killed: an abandoned life touches the arena no more, whatever wakes up in it."""

import threading

import numpy as np
import pytest

from kvtier.executors.base import StoreDescription
from kvtier.executors.protocol import IndexEnd, Part, PartResult
from kvtier.executors.threads import ThreadExecutor
from kvtier.namespace import Namespace
from kvtier.primary.arena import arena_rows
from kvtier.testing.patience import PATIENCE_SECONDS, wait_for
from kvtier.testing.stores import make_key

BLOCK_BYTES = 4096


FAULTY = "kvtier.testing.faulty_stores:FaultyBlockStore"


class Rig:
    def __init__(self, *plan):
        self.memory = np.zeros((16, BLOCK_BYTES), dtype=np.uint8)
        self.rows = arena_rows(memoryview(self.memory))
        options = {
            "inner": "kvtier.stores.memory:MemoryStore",
            "inner_options": {"capacity": 1 << 20},
            "plan": list(plan),
        }
        description = StoreDescription(FAULTY, options, Namespace({"m": 1}), 16, BLOCK_BYTES, threads=2)
        self.executor = ThreadExecutor(description, self.rows)
        self.reports = []
        self.executor.start()
        self.wait(lambda: IndexEnd() in self.reports)

    def wait(self, condition):
        def look():
            self.executor.wait(0.01)
            self.reports += self.executor.poll()
            return condition()

        wait_for(look, "a report")

    def results(self):
        return [report for report in self.reports if isinstance(report, PartResult)]

    def move(self, serial, is_load, numbers, first_slot):
        slots = list(range(first_slot, first_slot + len(numbers)))
        self.executor.submit(Part.of(serial, 0, is_load, [make_key(number) for number in numbers], slots))


def test_fewer_threads_than_wanted_do_the_work(monkeypatch, caplog):
    start, started = threading.Thread.start, []

    def start_one(thread):
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    rig = Rig()
    rig.memory[:4] = 7
    rig.move(1, False, range(4), 0)
    rig.wait(lambda: len(rig.results()) == 1)
    rig.move(2, True, range(4), 8)
    rig.wait(lambda: len(rig.results()) == 2)
    assert (rig.memory[8:12] == 7).all()
    assert "works with 1 threads: can't start" in caplog.text
    rig.executor.retire()
    rig.executor.kill()


def test_an_abandoned_load_writes_nothing(tmp_path):
    (tmp_path / "hang").touch()
    rig = Rig({"fault": "hang", "calls": ["read_into"], "while_path": str(tmp_path / "hang")})
    rig.memory[:4] = 7
    rig.move(1, False, range(4), 0)
    rig.wait(lambda: len(rig.results()) == 1)
    rig.move(2, True, range(4), 8)
    assert not rig.executor.has_ended()
    rig.executor.kill()
    assert rig.executor.has_ended()
    rig.memory[8:12] = 99  # the slots are somebody else's
    (tmp_path / "hang").unlink()
    wait_for(lambda: not rig.executor._opener.is_alive(), "the threads go home")
    assert (rig.memory[8:12] == 99).all()


def test_an_abandoned_store_reads_nothing_any_more(tmp_path):
    (tmp_path / "hang").touch()
    rig = Rig({"fault": "hang", "calls": ["write"], "while_path": str(tmp_path / "hang")})
    rig.memory[:] = 7
    for serial in range(1, 9):
        rig.move(serial, False, [serial], serial)
    rig.executor.kill()
    (tmp_path / "hang").unlink()
    wait_for(lambda: not rig.executor._opener.is_alive(), "the threads go home")
    assert not any(any(result.successes) for result in rig.results())


def test_a_retired_life_ends_when_its_threads_are_home(tmp_path):
    (tmp_path / "hang").touch()
    rig = Rig({"fault": "hang", "calls": ["write"], "while_path": str(tmp_path / "hang")})
    rig.move(1, False, [1], 1)
    rig.executor.retire()
    assert rig.executor.has_ended() is not rig.executor._opener.is_alive()
    (tmp_path / "hang").unlink()
    rig.executor.wait(PATIENCE_SECONDS)
    assert rig.executor.has_ended()


@pytest.mark.parametrize("is_load", [True, False])
def test_what_waits_can_be_cancelled(tmp_path, is_load):
    (tmp_path / "hang").touch()
    rig = Rig({"fault": "hang", "while_path": str(tmp_path / "hang")})
    for serial in range(1, 7):
        rig.move(serial, is_load, [serial], serial)
    rig.executor.cancel(range(1, 7))
    rig.wait(lambda: len(rig.results()) >= 4)
    (tmp_path / "hang").unlink()
    rig.wait(lambda: len(rig.results()) == 6)
    assert sorted(result.serial for result in rig.results()) == list(range(1, 7))
    rig.executor.kill()
