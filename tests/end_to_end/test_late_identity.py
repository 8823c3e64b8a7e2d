"""An engine that serves before it knows whose blocks are whose: host memory at once, tiers that outlive it later."""

import logging
import threading

import pytest
from whole_engine import WholeEngine, make_keys

from kvtier.events import TierState
from kvtier.namespace import Namespace
from kvtier.testing.patience import wait_for
from kvtier.types import LookupResult

KEYS = make_keys(6, "late")
OURS, OTHERS = Namespace({"weights": "ours"}), Namespace({"weights": "others"})


@pytest.fixture
def late(tmp_path):
    """Return a function that makes an engine over one directory, which says later whose blocks are whose."""
    made = []

    def make(**options):
        made.append(WholeEngine(tmp_path / "disk", said={"namespace_follows": True}, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def fill(engine, keys=KEYS):
    engine.store(keys)
    engine.idle()


def test_host_memory_serves_before_and_the_disk_after(late):
    engine = late()
    fill(engine)
    assert engine.manager.tier_states() == {
        "disk": (TierState.STARTING, "the engine has not said yet which model this is")
    }
    assert engine.restore(KEYS) == 6
    assert engine.manager.lookup(make_keys(1, "other")[0], engine.request()) is LookupResult.MISS
    engine.spec.identify(OURS)
    engine.start()
    fill(engine, make_keys(4, "stored after"))
    engine.close()

    again = late()
    assert again.restore(make_keys(4, "stored after")) == 0
    again.spec.identify(OURS)
    again.start()
    assert again.restore(make_keys(4, "stored after")) == 4
    again.manager.check_invariants()


def test_the_disk_is_that_of_the_namespace_that_came(late):
    engine = late()
    engine.spec.identify(OURS)
    engine.start()
    fill(engine)
    engine.close()
    again = late()
    again.spec.identify(OTHERS)
    again.start()
    assert again.restore(KEYS) == 0


def test_what_was_reset_before_the_identity_came_is_of_a_new_epoch(late):
    engine = late()
    engine.spec.identify(OURS)
    engine.start()
    fill(engine)
    engine.close()
    again = late()
    again.step()
    again.manager.reset_cache()  # engines do that when weights changed: the identity that comes is of the earlier ones
    again.spec.identify(OURS)
    again.start()
    assert again.restore(KEYS) == 0
    fill(again)
    again.manager.check_invariants()


def test_without_an_identity_the_disk_stays_down_and_it_is_said_once(late, caplog):
    engine = late()
    engine.spec.remain_unidentified("the weights are elsewhere")
    for _ in range(3):
        fill(engine)
    assert engine.manager.tier_states() == {"disk": (TierState.DOWN, "the weights are elsewhere")}
    assert engine.restore(KEYS) == 6
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "kvtier: tier disk cannot be used, and the engine runs without it: the weights are elsewhere"
    ]


def test_a_late_tier_that_cannot_be_made_turns_off_only_itself(late, tmp_path, monkeypatch):
    engine = late()
    monkeypatch.setattr("kvtier.spec.tiering.construct_tier", lambda *_: 1 / 0)
    engine.spec.identify(OURS)
    fill(engine)
    assert engine.manager.tier_states() == {"disk": (TierState.DOWN, "ZeroDivisionError: division by zero")}
    assert engine.restore(KEYS) == 6


def test_an_engine_ends_whether_its_identity_came_or_not(late):
    late().close()
    engine = late()
    engine.spec.identify(OURS)
    late_tier = engine.tier
    engine.close()  # nobody had taken the tier that came
    assert late_tier.take_successor() is None
    engine = late()
    engine.manager.shutdown()
    engine.spec.identify(OURS)
    assert engine.tier.state is TierState.CLOSED


def test_the_identity_may_come_on_another_thread_while_the_engine_works(late):
    engine = late()
    thread = threading.Thread(target=engine.spec.identify, args=(OURS,))
    thread.start()
    for number in range(30):
        fill(engine, make_keys(3, f"work {number}"))
    thread.join()
    wait_for(lambda: engine.state() is TierState.UP, "the disk's opening")
    fill(engine)
    assert engine.restore(KEYS) == 6


def test_tiers_that_do_not_outlive_the_engine_wait_for_nothing(late):
    engine = late(tier={"type": "memory", "capacity": "1MiB"})
    engine.start()
    engine.spec.identify(OURS)
    assert engine.state() is TierState.UP
