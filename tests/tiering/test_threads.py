"""Threads that call one manager: they may take turns; a call during another thread's gets an error and does nothing."""

import os
import sys
import threading

import pytest
from engine import Engine, make_keys

from kvtier.errors import BlockNotReadyError, OverlappingCallError
from kvtier.types import LookupResult, ReqContext, ScheduleEndContext

STEP = ScheduleEndContext()


@pytest.fixture
def hasty():
    """Threads take turns after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def run_threads(*calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_may_take_turns():
    engine, lock = Engine(num_blocks=16), threading.Lock()

    def work(name):
        for number in range(50):
            with lock:
                engine.run(make_keys(4, f"{name}/{number % 3}"), f"{name}/{number}")

    run_threads(*(lambda name=name: work(name) for name in "abcd"))
    engine.manager.check_invariants()


class Held:
    """An observer that keeps a call of the manager from ending."""

    def __init__(self):
        self.entered, self.go_on = threading.Event(), threading.Event()

    def on_event(self, event):
        self.entered.set()
        self.go_on.wait()


@pytest.fixture
def engine_in_a_call():
    """An engine with a thread in `complete_store`, and the function that lets that thread go on."""
    engine, held = Engine(), Held()
    context, keys = engine.request("theirs"), make_keys(4, "theirs")
    engine.manager.prepare_store(keys, context)
    engine.manager._observer.add(held)
    thread = threading.Thread(target=engine.manager.complete_store, args=(keys, context))
    thread.start()
    held.entered.wait()

    def end():
        held.go_on.set()
        thread.join()
        return keys

    yield engine, end
    end()


MINE = ReqContext("mine")
CALLS = {
    "on_new_request": (MINE,),
    "prepare_store": (make_keys(2, "mine"), MINE),
    "complete_store": (make_keys(2, "mine"), MINE),
    "prepare_load": (make_keys(2, "mine"), MINE),
    "complete_load": (make_keys(2, "mine"), MINE),
    "touch": (make_keys(2, "mine"), MINE),
    "on_request_finished": (MINE,),
    "on_schedule_end": (STEP,),
    "take_events": (),
    "tier_states": (),
    "reset_cache": (),
    "shutdown": (),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_during_another_threads_raises_and_changes_nothing(engine_in_a_call, call):
    engine, end = engine_in_a_call
    with pytest.raises(OverlappingCallError, match="one lock around each"):
        getattr(engine.manager, call)(*CALLS[call])
    keys = end()
    engine.manager.check_invariants()
    assert engine.hits(keys, engine.request("after")) == 4
    engine.manager.on_new_request(MINE)


def test_the_first_lookup_of_a_request_says_so_too(engine_in_a_call):
    engine, end = engine_in_a_call
    with pytest.raises(OverlappingCallError):
        engine.manager.lookup(make_keys(1)[0], MINE)
    end()
    assert engine.manager.lookup(make_keys(1)[0], MINE) is LookupResult.MISS


def test_a_call_from_within_a_call_is_not_refused():
    engine = Engine()

    class Curious:
        def on_event(self, event):
            states.append(engine.manager.tier_states())

    states = []
    engine.manager._observer.add(Curious())
    engine.run(make_keys(4), "r")
    assert states
    engine.manager.check_invariants()
    run_threads(lambda: engine.run(make_keys(4), "another thread"))


def test_a_call_that_raises_leaves_nobody_inside():
    engine = Engine()
    with pytest.raises(BlockNotReadyError):
        engine.manager.prepare_load(make_keys(1), engine.request())
    run_threads(lambda: engine.run(make_keys(4), "another thread"))
    assert engine.hits(make_keys(4), engine.request("later")) == 4


def test_threads_without_a_lock_get_one_error_and_break_nothing(hasty):
    engine, others = Engine(num_blocks=16), []

    def insist(call, *args):
        """As an engine would that must get its call through."""
        while True:
            try:
                return call(*args)
            except OverlappingCallError:
                others.append("overlap")

    def work(name):
        manager = engine.manager
        try:
            for number in range(150):
                context, keys = ReqContext(f"{name}/{number}"), make_keys(4, f"{name}/{number % 5}")
                insist(manager.on_new_request, context)
                found = [insist(manager.lookup, key, context) for key in keys]
                if LookupResult.MISS in found:
                    output = insist(manager.prepare_store, keys, context)
                    if output is not None:
                        insist(manager.complete_store, output.keys_to_store, context)
                insist(manager.on_schedule_end, STEP)
                insist(manager.on_request_finished, context)
        except Exception as error:
            others.append(repr(error))
            raise

    run_threads(*(lambda name=name: work(name) for name in "abcd"))
    assert set(others) == {"overlap"}
    engine.manager.check_invariants()
    engine.step()
    output = engine.manager.prepare_store(make_keys(16, "all"), engine.request("all"))
    assert len(output.keys_to_store) == 16


def test_a_call_does_not_ask_the_kernel_in_which_process_it_runs(monkeypatch):
    """It is a system call, which costs a microsecond on some virtual machines."""
    engine, asked = Engine(), []
    engine.step()
    monkeypatch.setattr(os, "getpid", lambda: asked.append("pid"))
    engine.step()
    assert asked == []


def test_calls_may_name_their_arguments():
    engine = Engine()
    keys, context = make_keys(2), ReqContext("named")
    engine.manager.on_new_request(req_context=context)
    engine.manager.prepare_store(keys=keys, req_context=context)
    engine.manager.complete_store(keys=keys, req_context=context, success=False)
    assert engine.manager.lookup(keys[0], context) is LookupResult.MISS
    with pytest.raises(TypeError):
        engine.manager.complete_store(keys, context, succeeded=True)
