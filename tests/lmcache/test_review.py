"""What LMCache is told of objects that a tier has dropped without a word."""

import itertools
import signal
import threading
from contextlib import closing

import pytest
from adapters import bucket, disk, keys_of, opened, resp, shared
from object_buckets import Raw

from kvtier.adapters.lmcache.holdings import Holding, Holdings
from kvtier.keys import make_offload_key
from kvtier.testing.patience import wait_for

KIB = 1 << 10
SIZE = 150 * KIB
"""Three blocks."""


PROBED = ("shared", "resp")
"""Tiers that ask their medium what it has. A bucket's index learns from a load, or after half a minute."""


@pytest.fixture(params=[*PROBED, "object"])
def medium(request, tmp_path):
    """Tiers, and a function that drops all that their medium holds."""
    if request.param == "resp":
        server = request.getfixturevalue("valkey")
        return [resp(server)], lambda: server.command("FLUSHALL")
    if request.param == "object":
        place = request.getfixturevalue("moto_s3")
        return [bucket(place)], lambda: Raw.of(**place.options).remove()

    def remove():
        for path in (tmp_path / "shared").rglob("*/*/*"):
            path.unlink()

    return [shared(tmp_path)], remove


def forget_answers(caller):
    """Let the tiers forget that they have known for less than a minute what their media hold."""
    tiers = caller.adapter._tiers
    with tiers._lock:
        for guard in tiers._tiers:
            guard.tier._probes._present.clear()


def is_idle(caller):
    """Return whether all questions were asked."""
    review = caller.adapter._review
    return not review._woken.is_set() and not review._doubted and not review._num_looks


def test_what_a_load_does_not_find_any_more_is_told(medium, memory):
    tiers, drop = medium
    keys = keys_of(4)
    with memory.objects([SIZE] * 4, seed=50) as objects, opened(tiers, memory) as caller:
        caller.store(keys, objects)
        drop()
        assert caller.load(keys, objects) == []
        wait_for(lambda: set(caller.listener.deleted) == set(keys), "they are told")
        assert caller.adapter.get_usage().bytes_by_cache_salt == {}
        assert caller.store(keys, objects).is_successful()
        assert caller.look_up(keys, SIZE) == [0, 1, 2, 3]
        wait_for(lambda: is_idle(caller), "all is asked")
        assert len(caller.listener.deleted) == 4
        assert caller.adapter.get_usage().bytes_by_cache_salt == {"": 4 * SIZE}


@pytest.mark.parametrize("medium", PROBED, indirect=True)
def test_what_a_lookup_does_not_find_any_more_is_told(medium, memory):
    tiers, drop = medium
    keys = keys_of(3)
    with memory.objects([SIZE] * 3, seed=55) as objects, opened(tiers, memory) as caller:
        caller.store(keys, objects)
        drop()
        assert caller.look_up(keys, SIZE) == []
        wait_for(lambda: set(caller.listener.deleted) == set(keys), "they are told")
        assert caller.adapter.get_usage().bytes_by_cache_salt == {}


@pytest.mark.parametrize("medium", PROBED, indirect=True)
def test_what_nobody_looks_up_is_asked_for_while_others_are_stored(medium, memory):
    tiers, drop = medium
    keys, others = keys_of(6), keys_of(4, 1)
    with memory.objects([SIZE] * 6, seed=51) as objects, opened(tiers, memory) as caller:
        caller.store(keys, objects)
        wait_for(lambda: is_idle(caller), "all is asked")
        assert caller.listener.deleted == []
        drop()

        def stored_and_told():
            forget_answers(caller)
            caller.store(others, objects[:4])
            return set(caller.listener.deleted) >= set(keys)

        wait_for(stored_and_told, "all that was dropped")
        wait_for(lambda: is_idle(caller), "all is asked")
        assert caller.look_up(others, SIZE) == [0, 1, 2, 3]
        assert caller.adapter.get_usage().bytes_by_cache_salt == {"": 4 * SIZE}


def test_what_a_tier_that_does_not_answer_may_hold_is_not_told(memory):
    from valkey_server import ValkeyServer

    keys = keys_of(3)
    quick = {"timeout": 0.3, "connect_timeout": 0.3, "job_deadline": 1.0, "probe_deadline": 0.3}
    with (
        closing(ValkeyServer().start()) as server,
        memory.objects([SIZE] * 3, seed=52) as objects,
        opened([resp(server, **quick)], memory, call_deadline=1.0) as caller,
    ):
        caller.store(keys, objects)
        server.signal(signal.SIGSTOP)
        forget_answers(caller)
        for _ in range(3):
            assert caller.look_up(keys, SIZE) == []
            assert caller.load(keys, objects) == []
        wait_for(lambda: is_idle(caller), "all is asked")
        server.signal(signal.SIGCONT)
        wait_for(lambda: caller.look_up(keys, SIZE) == [0, 1, 2], "it answers again")
        wait_for(lambda: is_idle(caller), "all is asked")
        assert caller.listener.deleted == []


def test_what_another_tier_still_has_is_not_told(tmp_path, memory, valkey):
    keys = keys_of(3)
    with memory.objects([SIZE] * 3, seed=53) as objects, opened([resp(valkey), disk(tmp_path)], memory) as caller:
        caller.store(keys, objects)
        valkey.command("FLUSHALL")
        wait_for(lambda: caller.look_up(keys, SIZE) == [0, 1, 2], "on the disk")
        for _ in range(3):
            caller.store(keys_of(1, 1), objects[:1])
        wait_for(lambda: is_idle(caller), "all is asked")
        assert caller.listener.deleted == []


def test_a_disk_s_eviction_is_not_told_while_another_tier_may_have_the_object(tmp_path, memory):
    from valkey_server import ValkeyServer

    keys = keys_of(40)
    with (
        closing(ValkeyServer().start()) as server,
        memory.objects([256 * KIB] * 40, seed=54) as objects,
        opened([disk(tmp_path, capacity="8MiB"), resp(server)], memory, call_deadline=1.0) as caller,
    ):
        for start in range(0, 20, 4):
            caller.store(keys[start : start + 4], objects[start : start + 4])
        server.kill()
        prompts = itertools.count(1)

        def is_down():
            caller.look_up(keys_of(1, next(prompts)), SIZE)  # a request keeps coming
            return caller.adapter.report_status()["tiers"]["resp"]["state"] == "down"

        wait_for(is_down, "the server's tier is down")
        for start in range(20, 40, 4):
            caller.store(keys[start : start + 4], objects[start : start + 4])
        wait_for(lambda: is_idle(caller), "all is asked")
        assert keys[0] not in caller.look_up(keys[:1], 256 * KIB)
        assert caller.listener.deleted == []


def test_an_object_that_is_stored_again_while_its_end_is_told_is_told_afterwards(tmp_path, memory, monkeypatch):
    keys = keys_of(1)
    with memory.objects([SIZE], seed=56) as objects, opened([shared(tmp_path)], memory) as caller:
        caller.store(keys, objects)
        wait_for(lambda: is_idle(caller), "all is asked")
        told, stored_again = [], threading.Event()
        adapter, remove = caller.adapter, caller.adapter._holdings.remove

        def remove_and_store_again(gone):
            removed = remove(gone)
            if removed:
                adapter.submit_store_task(keys, objects)
                stored_again.wait(1.0)  # in vain, if the order is kept
            return removed

        def on_stored(keys, sizes):
            told.append("stored")
            stored_again.set()

        monkeypatch.setattr(adapter._holdings, "remove", remove_and_store_again)
        monkeypatch.setattr(caller.listener, "on_l2_keys_stored", on_stored)
        monkeypatch.setattr(caller.listener, "on_l2_keys_deleted", lambda keys: told.append("deleted"))
        adapter.delete(keys)
        wait_for(lambda: len(told) == 2, "both are told")
        assert told == ["deleted", "stored"]


def held(number, num_blocks=3):
    return Holding.of(number, SIZE, [make_offload_key(b"object %d" % number, index) for index in range(num_blocks)])


def test_objects_are_asked_for_in_turn():
    holdings = Holdings()
    objects = [held(number) for number in range(5)]
    holdings.add(objects)
    assert [one.key for one in holdings.next(3)] == [0, 1, 2]
    holdings.add([held(5)])
    assert [one.key for one in holdings.next(4)] == [3, 4, 0, 1]
    assert len(holdings.next(100)) == 6


def test_an_object_that_was_stored_again_meanwhile_is_not_forgotten():
    holdings = Holdings()
    (first,) = holdings.add([held(1)])
    assert holdings.add([held(1)]) == []
    assert holdings.remove([first]) == []
    assert holdings.remove([held(1)]) == []
    assert holdings.remove(holdings.touched_by(first.blocks)) == [held(1)]
    assert len(holdings) == 0
