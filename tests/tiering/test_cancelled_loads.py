"""What nobody waits for any more is cancelled where it is queued, and costs no slot for longer than it must."""

import pytest
from engine import DEFERRED, Engine, make_keys, payload

from kvtier.abc import TierContext
from kvtier.events import TierState
from kvtier.namespace import Namespace
from kvtier.secondary.keyed import KeyedTierManager
from kvtier.secondary.settings import TierSettings
from kvtier.testing.patience import wait_for
from kvtier.testing.tier_rig import SuiteSpec
from kvtier.types import JobResult, LookupResult

HIT, MISS, PENDING = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING


def silent(engine):
    engine.tier.auto = False
    return engine


def ask(engine, keys, name):
    context = engine.request(name)
    assert engine.scan(keys, context) == [PENDING] * len(keys)
    engine.step()
    return context


@pytest.mark.parametrize("end", ["ends", "gives up", "gives up and stores", "is preempted"])
def test_a_load_that_its_request_waits_for_no_more_is_cancelled_once(make_engine, end):
    engine, keys = silent(make_engine(num_blocks=16, load_deadline=2.0)), make_keys(4)
    engine.plant(keys)
    context = ask(engine, keys, "leaves")
    assert engine.tier.cancelled == []
    if end == "ends":
        engine.finish(context)
    elif end == "is preempted":
        engine.step(preempted=["leaves"])
        assert engine.tier.cancelled == []  # it asks for them again
        engine.finish(context)
    else:
        engine.clock.advance(2.1)
        assert engine.scan(keys, context) == [MISS]
        if end == "gives up and stores":
            engine.store(keys, context)
    for _ in range(3):
        engine.step()
    assert engine.tier.cancelled == [engine.tier.loads[0].job_id]
    engine.tier.results.append(JobResult(engine.tier.loads[0].job_id, False))
    engine.step()
    assert not engine.table.num_quarantined
    assert engine.table.num_free == (12 if end == "gives up and stores" else 16)


def test_a_load_that_another_request_waits_for_goes_on(make_engine):
    engine, keys = silent(make_engine(num_blocks=16)), make_keys(4)
    engine.plant(keys)
    first = ask(engine, keys, "first")
    second = ask(engine, keys[:1], "second")
    engine.finish(first)
    engine.step()
    assert engine.tier.cancelled == []
    engine.finish(second)
    engine.step()
    assert len(engine.tier.cancelled) == 1


def test_who_comes_to_wait_for_a_cancelled_load_has_it_loaded_again(make_engine):
    engine, keys = silent(make_engine(num_blocks=16)), make_keys(4)
    engine.plant(keys)
    engine.finish(ask(engine, keys, "leaves"))
    engine.step()
    context = ask(engine, keys, "comes")
    assert len(engine.tier.loads) == 1  # the one on its way may still bring them
    engine.tier.results.append(JobResult(engine.tier.loads[0].job_id, False))
    engine.step()
    engine.tier.auto = True
    assert engine.wait_hits(keys, context) == 4
    assert len(engine.tier.loads) == 2
    assert engine.load(keys, context) == [payload(key) for key in keys]


def test_a_cancelled_load_that_arrives_all_the_same_enters_only_a_free_slot(make_engine):
    engine, keys = silent(make_engine(num_blocks=8)), make_keys(4)
    engine.plant(keys)
    engine.finish(ask(engine, keys, "leaves"))
    engine.step()
    engine.tier.full = True
    better = make_keys(4, "better")
    engine.store(better, engine.request("stores"))
    assert engine.table.num_free == 0
    engine.tier.finish(engine.tier.loads[0])
    engine.step()
    assert engine.table.num_free == 4
    assert engine.hits(better, engine.request("reader")) == 4


class RealEngine(Engine):
    """An engine over an I/O process of one thread, whose reads hang while a file exists."""

    def __init__(self, folder, **settings):
        self.hanging, self.begun = folder / "hang", folder / "begun"
        super().__init__(tiers=lambda view: [self._make_tier(view)], **settings)

    def _make_tier(self, view):
        plan = {"fault": "hang", "calls": ["read_into"]}
        paths = {"while_path": str(self.hanging), "begun_path": str(self.begun)}
        options = {
            "inner": "kvtier.stores.memory:MemoryStore",
            "inner_options": {"capacity": 64 << 20},
            "plan": [{**plan, **paths}],
        }
        spec = SuiteSpec(TierContext(namespace=Namespace({"model": "cancelled"}), arena_fd=self.arena.fd))
        store = "kvtier.testing.faulty_stores:FaultyBlockStore"
        return KeyedTierManager(spec, view, "faulty", store=store, options=options, settings=TierSettings(threads=1))

    def wait(self, condition, what):
        def stepped():
            self.step()
            return condition()

        wait_for(stepped, what)

    def wait_pending(self, keys, context):
        def found():
            answers = self.scan(keys, context)
            self.step()
            return answers == [PENDING] * len(keys)

        wait_for(found, "the tier says what it has")


def test_slots_of_a_load_cancelled_in_the_io_process_come_back_while_another_load_hangs(tmp_path):
    engine = RealEngine(tmp_path, num_blocks=64)
    try:
        engine.tier.start()
        engine.wait(lambda: engine.tier.state is TierState.UP, "the tier is up")
        held = {name: make_keys(16, name) for name in ("hangs", "leaves")}
        for name, keys in held.items():
            engine.store(keys, engine.request(f"stores {name}"))
            engine.wait(lambda: not engine.manager.has_pending_work(), "the blocks are in the tier")
        for number in range(4):
            engine.store(make_keys(16, f"other {number}"), engine.request(f"evicts {number}"))
            engine.wait(lambda: not engine.manager.has_pending_work(), "the blocks are in the tier")
        engine.hanging.touch()
        waiting, leaving = engine.request("waits"), engine.request("leaves")
        engine.wait_pending(held["hangs"], waiting)
        engine.wait(engine.begun.exists, "the first read has begun")
        engine.wait_pending(held["leaves"], leaving)
        assert len(engine.table.filling) == 32
        engine.finish(leaving)
        engine.wait(lambda: engine.table.num_free == 16, "the slots come back")
        assert len(engine.table.filling) == 16
        engine.hanging.unlink()
        for name, context in (("hangs", waiting), ("leaves", engine.request("comes"))):
            wait_for(lambda keys=held[name], context=context: count_hits(engine, keys, context) == 16, "the load")
            assert engine.load(held[name], context) == [payload(key) for key in held[name]]
    finally:
        engine.close()


def count_hits(engine, keys, context):
    answers = engine.scan(keys, context)
    engine.step()
    assert not set(answers) - {HIT, *DEFERRED}
    return answers.count(HIT)
