"""Observers and policies that raise in the middle of a change of state: no slot is lost, the engine never notices."""

import logging

import pytest
from engine import Engine, make_keys

from kvtier.errors import InvariantError
from kvtier.events import (
    BlocksEvicted,
    BlocksLoaded,
    BlocksStored,
    CacheReset,
    JobFinished,
    Observers,
    TierState,
)
from kvtier.eviction.lru import LRUPolicy
from kvtier.keys import make_offload_key
from kvtier.tiering.running_copies import RunningStores


class Raising:
    """Raises at every event."""

    def __init__(self):
        self.seen = set()

    def on_event(self, event):
        self.seen.add(type(event).__name__)
        raise ValueError("metrics backend down")


def use(engine, rounds=12):
    """Stores, evictions, promotions, completions of what nobody awaits, deadlines, a reset."""
    for number in range(rounds):
        engine.run(make_keys(4, f"p{number}"), f"r{number}")
        engine.run(make_keys(4, f"p{max(0, number - 3)}"), f"again{number}")
        context = engine.request("stranger")
        engine.manager.complete_store(make_keys(1, "never"), context)
        engine.manager.complete_load(make_keys(1, "never"), context)
        engine.finish(context)
    engine.tier.current_state = TierState.DOWN
    engine.step()
    engine.run(make_keys(4, "refused"), "down")
    engine.manager.reset_cache()
    engine.step()


def num_usable_slots(engine):
    output = engine.manager.prepare_store(make_keys(engine.table.num_slots, "all"), engine.request("all"))
    return 0 if output is None else len(output.keys_to_store)


def test_an_observer_that_raises_costs_nothing_but_its_events(caplog):
    engine = Engine()
    observer, behind_it = Raising(), engine.log
    engine.manager._observer.add(observer)
    with caplog.at_level(logging.ERROR):
        use(engine)
    assert {"BlocksStored", "BlocksEvicted", "BlocksLoaded", "UnexpectedCall", "JobFinished"} <= observer.seen
    assert {"CascadeRefused", "CacheReset"} <= observer.seen
    said = [record.getMessage() for record in caplog.records if "observer Raising" in record.getMessage()]
    assert len(said) == len(observer.seen)
    assert behind_it.of(BlocksStored)
    assert num_usable_slots(engine) == engine.table.num_slots


class Leaving:
    """Ends the program at the first event of each kind, as a handler of SIGTERM does that comes while it runs."""

    def __init__(self):
        self.seen = []

    def on_event(self, event):
        if type(event) not in self.seen:
            self.seen.append(type(event))
            raise SystemExit(len(self.seen))


def test_what_ends_the_program_in_an_observer_ends_it_when_the_step_has_ended():
    engine = Engine()
    observer, raised, step = Leaving(), [], engine.step

    def step_to_the_end():
        while True:
            try:
                return step()
            except SystemExit as end:
                raised.append(end.code)
                engine.manager.check_invariants()

    engine.step = step_to_the_end
    engine.manager._observer.add(observer)
    engine.run(make_keys(2), "first")
    use(engine)
    assert {BlocksStored, BlocksEvicted, BlocksLoaded, JobFinished, CacheReset} <= set(observer.seen)
    assert raised == list(range(1, len(observer.seen) + 1))
    assert not engine.manager.has_pending_work()
    assert num_usable_slots(engine) == engine.table.num_slots


def test_what_ends_the_program_in_an_observer_ends_it_at_the_latest_after_the_shutdown():
    engine = Engine()
    engine.manager._observer.add(Leaving())
    engine.store(make_keys(2), engine.request())
    assert engine.manager.has_pending_work(), "an engine without requests steps once more"
    with pytest.raises(SystemExit):
        engine.manager.shutdown()
    engine.manager.shutdown()


def test_a_tiers_own_events_are_guarded_too(caplog):
    observers = Observers.over(Raising())
    assert Observers.over(observers) is observers
    observers.on_event(BlocksStored([]))
    observers.on_event(BlocksStored([]))
    assert len(caplog.records) == 1


def policy_that_raises_in(method, after):
    """Return a policy whose `method` raises from its call number `after` on."""

    class Broken(LRUPolicy):
        calls = 0

        def fail_now(self):
            Broken.calls += 1
            if Broken.calls > after:
                raise ValueError("a policy's bug")

    def broken(self, *args):
        self.fail_now()
        return getattr(LRUPolicy, method)(self, *args)

    setattr(Broken, method, broken)
    return Broken


@pytest.mark.parametrize("after", [0, 5])
@pytest.mark.parametrize("method", ["insert", "touch", "evict", "remove", "candidates", "settle", "clear"])
def test_a_policy_that_raises_is_replaced_and_no_slot_is_lost(method, after, caplog):
    engine = Engine(policy=policy_that_raises_in(method, after))
    use(engine)
    engine.manager.check_invariants()
    said = [record for record in caplog.records if "LRU takes its place" in record.getMessage()]
    assert len(said) <= 1
    assert len(said) == (type(engine.table.policy) is LRUPolicy)
    assert said or method in ("remove", "settle", "clear")
    assert num_usable_slots(engine) == engine.table.num_slots


@pytest.mark.parametrize("lie", [[make_offload_key(b"unknown" + bytes(25), 0)], "twice"])
def test_a_policy_that_proposes_nonsense_is_replaced(lie):
    class Lying(LRUPolicy):
        def candidates(self, incoming=()):
            honest = list(super().candidates(incoming))
            return iter([honest[0], honest[0], *honest] if lie == "twice" else [*lie, *honest])

    engine = Engine(policy=Lying)
    use(engine)
    assert type(engine.table.policy) is LRUPolicy
    assert num_usable_slots(engine) == engine.table.num_slots


def test_a_policy_that_cannot_be_told_whether_it_may_decline_is_replaced():
    class Fixed(LRUPolicy):
        may_decline = property(lambda self: False)

    engine = Engine(policy=Fixed)
    use(engine)
    assert type(engine.table.policy) is LRUPolicy
    assert num_usable_slots(engine) == engine.table.num_slots


def test_the_audit_finds_slots_that_nobody_will_free():
    engine = Engine()
    keys = make_keys(4)
    context = engine.request()
    engine.manager.prepare_store(keys, context)
    state = engine.manager._requests.get(context.req_id)
    storing, state.copies.storing = state.copies.storing, RunningStores()
    with pytest.raises(InvariantError, match="nobody fills"):
        engine.manager.check_invariants()
    state.copies.storing = storing
    engine.manager.complete_store(keys, context)
    engine.manager.check_invariants()
    engine.table.pin([0])
    with pytest.raises(InvariantError, match="pins"):
        engine.manager.check_invariants()
