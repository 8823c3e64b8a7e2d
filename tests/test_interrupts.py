"""Ctrl-C that comes while a lock of a future is held: nobody waits for the lock afterwards."""

import os
import signal
import threading
import time
from concurrent import futures

import pytest
from slab_files import folder_of, make_context, open_slab

from kvtier import make_offload_key
from kvtier.interrupts import interrupts_noted
from kvtier.simulator import runs
from kvtier.simulator.setup import Machine, Setup
from kvtier.simulator.trace import Trace, TraceRequest
from kvtier.stores.slab import verification
from kvtier.stores.slab.inspection import read_records
from kvtier.stores.slab.namespaces import read_description
from kvtier.stores.slab.verification import Pace, verify_namespace
from kvtier.testing.stores import make_key


@pytest.fixture(autouse=True)
def _raising():
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(3):  # Python runs the handler between two instructions
        time.sleep(0.01)


def note(*steps):
    """Take steps where interrupts are noted; `CHECK` stands for a look at them."""
    with interrupts_noted() as check:
        for step in steps:
            (check if step is CHECK else step)()


CHECK = object()


def test_an_interrupt_is_raised_where_it_may_be():
    passed, behind = [], []
    with pytest.raises(KeyboardInterrupt):
        note(CHECK, interrupt, lambda: passed.append(1), CHECK, lambda: behind.append(1))
    assert (passed, behind) == ([1], [])
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_an_interrupt_that_nobody_asked_for_is_raised_at_the_end():
    with pytest.raises(KeyboardInterrupt):
        note(interrupt)


def test_another_exception_goes_first():
    with pytest.raises(ZeroDivisionError):
        note(interrupt, lambda: 1 / 0)


def test_who_handles_interrupts_goes_on_handling_them():
    seen = []
    signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    with interrupts_noted() as check:
        interrupt()
        check()
    assert seen == [signal.SIGINT]


def test_who_ignores_interrupts_goes_on_ignoring_them():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    note(interrupt, CHECK)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_an_interrupt_that_another_thread_takes_is_noted():
    ended = threading.Event()
    other = threading.Thread(target=ended.wait)
    other.start()
    passed = []
    try:
        with pytest.raises(KeyboardInterrupt):
            note(
                lambda: signal.pthread_kill(other.ident, signal.SIGINT),
                lambda: time.sleep(0.05),
                lambda: passed.append(1),
            )
    finally:
        ended.set()
    assert passed
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_thread_leaves_the_handler_alone():
    handlers = []

    def look():
        with interrupts_noted():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


@pytest.fixture
def interrupt_in_lock(monkeypatch):
    """Return a function that lets a module's next wait for futures be interrupted while a future's lock is held."""

    def arrange(module):
        def wait(waiting, *rest):
            lock = next(iter(waiting))._condition
            lock.acquire()
            interrupt()
            lock.release()
            return futures.wait(waiting, *rest)

        monkeypatch.setattr(module, "wait", wait)

    return arrange


def test_an_interrupted_simulation_ends(interrupt_in_lock):
    """With the lock held, the end of the pool would wait for ever."""
    interrupt_in_lock(runs)
    keys = [make_offload_key(bytes([index]) * 32, 0) for index in range(3)]
    trace = Trace("short", "made", 16, [TraceRequest(0.0, keys, 48, 1)] * 100)
    setups = [Setup("lru", blocks, 0, 4096) for blocks in (10, 20)]
    with pytest.raises(KeyboardInterrupt):
        runs.replay_all(trace, setups, Machine(), processes=2)


def test_an_interrupted_verification_ends(interrupt_in_lock, tmp_path):
    interrupt_in_lock(verification)
    context = make_context()
    store = open_slab(tmp_path, context)
    assert all(store.write([0, 1], [make_key(0), make_key(1)], [memoryview(bytes(context.block_bytes))] * 2))
    store.close()
    folder = folder_of(tmp_path, context)
    with pytest.raises(KeyboardInterrupt):
        verify_namespace(folder, read_records(folder, read_description(folder)), lambda: False, Pace())
