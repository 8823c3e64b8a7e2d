"""DESIGN: slots carry a generation; what comes late completes only its own, and delays nobody else."""

import pytest
from engine import make_keys, payload

from kvtier.types import LookupResult

HIT, MISS, PENDING = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING


def silent(engine):
    engine.tier.auto = False
    return engine


def give_up_on(engine, keys, name="gives up"):
    """A request starts a promotion of `keys` and waits in vain; return it and the tier's job."""
    engine.plant(keys)
    context = engine.request(name)
    engine.scan(keys, context)
    engine.step()
    engine.clock.advance(2.1)
    engine.step()
    return context, engine.tier.loads[-1]


def test_a_late_promotion_is_not_awaited_beside_another(make_engine):
    engine, late = silent(make_engine(load_deadline=2.0)), make_keys(1, "late")
    give_up_on(engine, late)
    window = make_keys(1, "window", group=1)
    engine.plant(window)
    context = engine.request("second")
    assert engine.scan(late, context) + engine.scan(window, context) == [MISS, PENDING]
    engine.step()
    engine.tier.finish(engine.tier.waiting[1])
    engine.step()
    assert engine.scan(window, context) == [HIT]
    assert not engine.manager.has_pending_work()


@pytest.mark.parametrize("end", ["landed", "reset"])
def test_a_key_that_was_late_once_is_awaited_again_when_that_is_over(make_engine, end):
    engine, keys = silent(make_engine(num_blocks=4, load_deadline=2.0)), make_keys(2)
    _, job = give_up_on(engine, keys)
    if end == "landed":
        engine.tier.finish(job)
        engine.step()
        engine.tier.full = True
        engine.store(make_keys(4, "pressure"), engine.request("presser"))
    else:
        writer, stuck = engine.request("writer"), make_keys(1, "stuck")
        engine.manager.prepare_store(stuck, writer)
        engine.scan(stuck, engine.request("reader"))
        engine.clock.advance(2.1)
        engine.step()
        engine.manager.reset_cache()
        keys = stuck
    engine.plant(keys)
    for name in ("next", "one more"):
        assert engine.scan(keys, engine.request(name)) == [PENDING] * len(keys)
        engine.step()
    assert engine.scan(keys, engine.request("third")) == [PENDING] * len(keys)


def test_a_late_result_does_not_complete_a_newer_promotion_of_the_same_key(make_engine):
    engine, keys = silent(make_engine(num_blocks=8, load_deadline=2.0)), make_keys(2)
    context, old = give_up_on(engine, keys)
    engine.manager.prepare_store(keys, context)
    engine.manager.complete_store(set(keys), context, success=False)
    reader = engine.request("reader")
    engine.scan(keys, reader)
    engine.step()
    new = engine.tier.loads[-1]
    assert set(new.block_ids.tolist()).isdisjoint(old.block_ids.tolist())
    engine.tier.finish(old)
    engine.step()
    assert engine.scan(keys, reader) == [PENDING, PENDING]
    engine.tier.finish(new)
    engine.step()
    assert engine.load(keys, reader) == [payload(key) for key in keys]
    assert engine.table.num_quarantined == 0


@pytest.mark.parametrize("others", ["nobody waits", "another waits"])
def test_a_store_takes_over_what_nobody_or_only_the_patient_wait_for(make_engine, others):
    engine, keys = silent(make_engine(load_deadline=2.0)), make_keys(2)
    if others == "nobody waits":
        engine.plant(keys)
        context = engine.request("leaves")
        engine.scan(keys, context)
        engine.step()
        engine.finish(context)
    else:
        engine.plant(keys)
        first, patient = engine.request("first"), engine.request("patient")
        engine.scan(keys, first)
        engine.step()
        engine.clock.advance(1.0)
        engine.scan(keys, patient)
        engine.step()
        engine.clock.advance(1.1)
        engine.step()
    assert engine.store(keys, engine.request("storer"), version=1) == keys
    engine.tier.finish(engine.tier.loads[0])
    engine.step()
    assert engine.load(keys, engine.request("reader")) == [payload(key, 1) for key in keys]
    assert engine.table.num_quarantined == 0
