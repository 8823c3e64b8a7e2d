"""In which order vLLM's scheduler calls the manager within a step, and that kvtier is right in either."""

import itertools
import random
import threading
import time

import pytest
from scheduler_driver import BLOCK, TELLS_KIND_OF_GROUP, Driver, kvtier_manager
from test_manager import HIT, KEYS, Core, request, step, store
from vllm.v1.kv_offload import base

from kvtier.adapters.vllm.manager import KVTierOffloadingManager

STORES_FIRST = TELLS_KIND_OF_GROUP
"""Whether this vLLM calls `on_schedule_end` last, after the step's stores took their slots: from 0.33 on."""


def test_the_order_is_the_known_one(model):
    manager, calls = kvtier_manager(), []

    def note(name):
        plain = getattr(manager, name)

        def noting(*args):
            calls.append(name)
            return plain(*args)

        setattr(manager, name, noting)

    for name in ("prepare_store", "on_schedule_end", "on_request_finished"):
        note(name)
    driver, rng = Driver(model, manager, with_window=False), random.Random(0)
    driver.run([[rng.randrange(3, 500) for _ in range(6 * BLOCK)] for _ in range(4)])
    manager.shutdown()
    assert calls[-1] == ("on_schedule_end" if STORES_FIRST else "on_request_finished")
    around = ("prepare_store", "on_schedule_end") if STORES_FIRST else ("on_schedule_end", "prepare_store")
    assert around in set(itertools.pairwise(calls))


@pytest.mark.parametrize("most_ahead", [0, 1])
def test_the_engines_speed_is_measured_as_it_is(model, most_ahead):
    """The scheduler's own order, with pauses between the requests; a step takes 0.4 ms per token."""
    manager = kvtier_manager(prefill_rate=2500.0)
    driver, rng, begun = Driver(model, manager, with_window=False), random.Random(0), []

    def end():
        planned, output = begun.pop(0)
        time.sleep(0.0004 * planned.total_num_scheduled_tokens)
        driver.end(planned, output)

    for number in range(8):
        driver.add(str(number), [rng.randrange(3, 500) for _ in range(32 * BLOCK)])
        while driver.scheduler.has_requests():
            begun.append(driver.begin())
            if len(begun) > most_ahead:
                end()
        while begun:
            end()
        time.sleep(1.0)
    rate = manager._core.manager.prefill_rate
    manager.shutdown()
    assert 1000 < rate < 5000  # 2,500, and less where the processor is busy


@pytest.mark.parametrize("stores_first", [True, False])
def test_blocks_that_a_waiting_request_found_outlive_the_stores_of_the_same_step(stores_first):
    core = Core(secondary_tiers=[{"type": "example"}], prefill_rate=1.0)
    manager = KVTierOffloadingManager(core)
    try:
        first = request(manager, "first")
        store(manager, KEYS[:4], first)
        manager.on_request_finished(first)
        step(manager)
        evicting = request(manager, "evicting")
        store(manager, KEYS[4:6], evicting)  # in the places of the first chain's last two blocks
        manager.on_request_finished(evicting)
        step(manager)

        waiting, other = request(manager, "waiting"), request(manager, "other")
        answers = [manager.lookup(key, waiting) for key in KEYS[:4]]
        assert answers == [HIT, HIT, base.LookupResult.HIT_PENDING, base.LookupResult.HIT_PENDING]
        new = [base.make_offload_key(bytes([100 + index]) * 32, 0) for index in range(4)]
        if stores_first:
            store(manager, new, other)
            step(manager)
        else:
            step(manager)
            store(manager, new, other)
        core.manager.check_invariants()
        assert [manager.lookup(key, waiting) for key in KEYS[:2]] == [HIT, HIT]
        manager.prepare_load(KEYS[:2], waiting)
        manager.complete_load(set(KEYS[:2]), waiting)
        core.manager.check_invariants()
    finally:
        core.shutdown()


def test_one_thread_at_a_time():
    """A second thread in the manager changes nothing: it gets a miss, and the log says so."""
    core = Core()
    manager = KVTierOffloadingManager(core)
    try:
        context = request(manager)
        store(manager, KEYS[:2], context)
        core.manager.thread_inside = threading.get_ident() + 1  # as if another thread were in a call
        assert manager.prepare_store(KEYS[2:4], context).keys_to_store == []
        manager.reset_cache()
        core.manager.thread_inside = None
        assert [manager.lookup(key, context) for key in KEYS[:3]] == [HIT, HIT, base.LookupResult.MISS]
        core.manager.check_invariants()
        with getattr(manager, "lock", threading.Lock()):
            assert manager.lookup(KEYS[0], context) is HIT
    finally:
        core.shutdown()
