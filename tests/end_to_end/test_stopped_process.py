"""The nasty one: an I/O process stopped in mid-store, its slots wanted, then continued or killed, then a restart."""

import logging
import os
import signal
import threading
from pathlib import Path

import pytest
from whole_engine import WholeEngine, make_keys

from kvtier.events import TierState
from kvtier.testing.patience import wait_for


@pytest.fixture
def make_engine(tmp_path):
    engines = []

    def make(**options):
        engines.append(WholeEngine(tmp_path / "tier", **options).start())
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def pressure(engine: WholeEngine, rounds: int, name: str) -> tuple[set[int], list]:
    """Store more than the primary holds; return the slots used and the prefixes."""
    used, prefixes = set(), []
    for number in range(rounds):
        prefixes.append(make_keys(4, f"{name}{number}"))
        used.update(engine.store(prefixes[-1]))
    return used, prefixes


@pytest.mark.parametrize("delay_us", [0, 200, 500, 1000, 3000])
def test_stopped_in_mid_store_then_continued(make_engine, delay_us):
    engine = make_engine(tier={"job_deadline": 60.0})
    victims = make_keys(8, "victim")
    slots = engine.store(victims)  # its cascade is on its way; its request is over
    threading.Event().wait(delay_us / 1e6)
    stopped = engine.signal(signal.SIGSTOP)
    wait_for(lambda: Path(f"/proc/{stopped}/stat").read_text().rpartition(")")[2].split()[0] == "T", "the stop")
    engine.step()  # what it answered before it stopped is no longer in flight
    in_flight = {slot for job in engine.manager._tiers[0].jobs.values() for slot in job.slots}
    used, prefixes = pressure(engine, 12, "pressure")
    engine.manager.check_invariants()
    assert used.isdisjoint(in_flight), "a slot was reused that a stopped process may still read"
    assert set(slots) >= in_flight
    engine.signal(signal.SIGCONT)
    engine.idle()
    engine.close()
    again = make_engine()
    restored = sum(again.restore(keys) for keys in [victims, *prefixes])
    assert restored >= 8, "the stopped job was not carried out"


def test_stopped_in_mid_load_then_continued_after_the_request_gave_up(make_engine):
    engine = make_engine(tier={"job_deadline": 60.0}, load_deadline=0.2)
    victims = make_keys(8, "victim")
    engine.store(victims)
    engine.idle()
    _, prefixes = pressure(engine, 6, "pushes them out")
    engine.idle()
    assert not any(key in engine.table for key in victims)
    engine.signal(signal.SIGSTOP)
    assert engine.restore(victims) == 0  # it gave up after its deadline
    (job,) = [job for job in engine.manager._tiers[0].jobs.values() if job.is_promotion]
    slots = engine.store(victims)  # recomputed, and stored again
    assert slots
    assert set(slots).isdisjoint(job.slots)
    used, more = pressure(engine, 6, "more")
    assert used.isdisjoint(job.slots)
    engine.signal(signal.SIGCONT)
    engine.idle()
    assert engine.table.num_quarantined == 0
    for keys in [victims, *prefixes, *more]:
        engine.restore(keys)
    engine.close()
    again = make_engine()
    assert sum(again.restore(keys) for keys in [victims, *prefixes, *more]) > 0


def test_stopped_for_too_long_is_killed_and_its_slots_come_back(make_engine, caplog):
    engine = make_engine(tier={"job_deadline": 0.3})
    stopped = engine.signal(signal.SIGSTOP)
    with caplog.at_level(logging.INFO, "kvtier"):
        engine.store(make_keys(8, "victim"))
        wait_for(lambda: (engine.step(), engine.state() is TierState.DOWN)[1], "the breaker")
        engine.idle()
        with pytest.raises(ProcessLookupError):
            os.kill(stopped, 0)
        assert engine.table.num_quarantined == 0
        for number in range(200):
            engine.store(make_keys(4, f"meanwhile{number}"))
        wait_for(lambda: (engine.step(), engine.state() is TierState.UP)[1], "the next process")
    downs = [record for record in caplog.records if "down" in record.message.lower()]
    assert len(downs) == 1, [record.message for record in downs]
    keys = make_keys(8, "after")
    engine.store(keys)
    engine.idle()
    pressure(engine, 8, "push")
    engine.idle()
    assert engine.restore(keys) == 8


def test_an_engine_killed_in_mid_store_leaves_nothing_wrong(tmp_path):
    """Real `kill -9` of the engine at random moments; what the next one finds is right or missing."""
    import subprocess
    import sys

    script = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from whole_engine import *\n"
        "engine = WholeEngine(sys.argv[1]).start()\n"
        "print('up', flush=True)\n"
        "i = 0\n"
        "while True:\n"
        "    engine.store(make_keys(4, f'killed{i % 40}')); i += 1\n"
    )
    found = 0
    for number in range(4):
        here = str(Path(__file__).parent)
        command = [sys.executable, "-c", script, str(tmp_path / "tier"), here]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"up\n"
            threading.Event().wait(0.05 + 0.07 * number)
            process.kill()
        engine = WholeEngine(tmp_path / "tier", tier={"job_deadline": 60.0})
        try:
            engine.start()  # waits until the killed engine's I/O process has let go of the directory
            found += sum(engine.restore(make_keys(4, f"killed{i}")) for i in range(40))
        finally:
            engine.close()
    assert found > 0
