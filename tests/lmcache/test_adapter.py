"""`KVTierL2Adapter` through LMCache's own factory and over its host memory: every byte of every object is compared."""

import json
import signal
import threading
from contextlib import closing
from pathlib import Path
from typing import get_type_hints

import msgspec
import pytest
import torch
from adapters import (
    MIB,
    bytes_of,
    create,
    disk,
    fill,
    flip_in_files,
    io_processes,
    keys_of,
    layout,
    opened,
    resp,
    shared,
    wait_for_process,
)
from forked_child import ALL_WAYS, tell
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface

from kvtier.adapters.lmcache.holdings import Holdings
from kvtier.adapters.lmcache.options import LMCacheOptions
from kvtier.errors import CapacityError, ConfigError
from kvtier.events import TierState
from kvtier.testing.patience import PATIENCE_SECONDS, wait_for

KIB = 1 << 10
SIZES = [2, 4 * KIB, 64 * KIB, 64 * KIB + 2, 300 * KIB, MIB]
"""A part of a block, whole blocks, and one byte pair more: one size per group of layers, as LMCache has them."""


def mixed_keys(prompt=0):
    return [keys_of(1, prompt, group=group)[0] for group in range(len(SIZES))]


MIXED_LAYOUTS = {group: layout(size) for group, size in enumerate(SIZES)}


def test_every_byte_of_objects_of_every_size_comes_back(tiers, memory):
    keys = [*mixed_keys(0), *mixed_keys(1)]
    with memory.objects(SIZES * 2, seed=1) as objects, opened(tiers, memory) as caller:
        assert isinstance(caller.adapter, L2AdapterInterface)
        assert caller.look_up(keys, MIXED_LAYOUTS) == []
        result = caller.store(keys, objects)
        assert result.is_successful()
        assert result.bytes_transferred() == sum(SIZES) * 2
        assert caller.listener.sizes == dict(zip(keys, SIZES * 2, strict=True))
        assert caller.look_up(keys, MIXED_LAYOUTS) == list(range(12))
        before = bytes_of(objects)
    unknown = mixed_keys(2)
    with memory.objects(SIZES * 3) as targets, opened(tiers, memory) as caller:  # another life of the server
        assert caller.lock([*keys, *unknown], MIXED_LAYOUTS) == list(range(12))
        assert caller.load([*keys, *unknown], targets) == list(range(12))
        caller.adapter.submit_unlock(keys)
        assert bytes_of(targets)[:12] == before
        assert bytes_of(targets)[12:] == [bytes(size) for size in SIZES]
        assert caller.listener.accessed == keys


def test_the_three_event_descriptors_differ(tmp_path, memory):
    with opened([disk(tmp_path)], memory) as caller:
        adapter = caller.adapter
        made = {adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd(), adapter.get_load_event_fd()}
        assert len(made) == 3


def test_tasks_of_all_kinds_run_at_once(tiers, memory):
    with memory.objects([256 * KIB] * 24, seed=2) as objects, memory.objects([256 * KIB] * 24) as targets:
        keys = keys_of(24)
        with opened(tiers, memory) as caller:
            adapter = caller.adapter
            caller.store(keys[:8], objects[:8])
            stores = [adapter.submit_store_task([key], [one]) for key, one in zip(keys[8:], objects[8:], strict=True)]
            loads = [adapter.submit_load_task(keys[n : n + 2], targets[n : n + 2]) for n in range(0, 8, 2)]
            lookups = [adapter.submit_lookup_and_lock_task(keys[:8], {0: layout(256 * KIB)}) for _ in range(4)]
            assert len({*stores, *loads, *lookups}) == len(stores) + len(loads) + len(lookups)
            stored, loaded, found = {}, {}, {}

            def all_done():
                stored.update(adapter.pop_completed_store_tasks())
                loaded.update({task: bits for task in loads if (bits := adapter.query_load_result(task)) is not None})
                asked = {task: adapter.query_lookup_and_lock_result(task) for task in lookups}
                found.update({task: bits for task, bits in asked.items() if bits is not None})
                return len(stored) == len(stores) and len(loaded) == len(loads) and len(found) == len(lookups)

            wait_for(all_done, "all results")
            assert all(result.is_successful() for result in stored.values())
            assert [bits.get_indices_list() for bits in loaded.values()] == [[0, 1]] * 4
            assert [bits.get_indices_list() for bits in found.values()] == [list(range(8))] * 4
            for _ in range(4):
                adapter.submit_unlock(keys[:8])
            assert adapter.report_status()["locked_object_count"] == 0
        assert bytes_of(targets)[:8] == bytes_of(objects)[:8]


def test_more_bytes_than_the_staging_memory_move_in_rounds(tmp_path, memory):
    keys, sizes = keys_of(12), [MIB] * 12
    with memory.objects(sizes, seed=3) as objects, memory.objects(sizes) as targets:
        with opened([disk(tmp_path)], memory, staging_bytes="2MiB") as caller:
            assert caller.store(keys, objects).is_successful()
            assert caller.load(keys, targets) == list(range(12))
        assert bytes_of(targets) == bytes_of(objects)


def test_an_object_above_the_staging_memory_is_not_stored_and_the_log_says_what_to_set(tmp_path, memory, caplog):
    keys, sizes = keys_of(2), [3 * MIB, MIB]
    with memory.objects(sizes, seed=4) as objects, opened([disk(tmp_path)], memory, staging_bytes="2MiB") as caller:
        for _ in range(2):
            assert not caller.store(keys, objects).is_successful()
        assert caller.load(keys, objects) == [1]
        assert list(caller.listener.sizes) == keys[1:]
    said = [record.getMessage() for record in caplog.records if "staging_bytes" in record.getMessage()]
    assert len(said) == 1
    assert str(6 * MIB) in said[0]


@pytest.mark.parametrize("tier", [disk, shared])
def test_a_flipped_bit_is_a_miss_and_leaves_the_object_alone(tmp_path, memory, tier):
    keys = keys_of(5)
    with memory.objects([150 * KIB] * 5, seed=5) as objects:
        before = bytes_of(objects)
        with opened([tier(tmp_path)], memory) as caller:
            caller.store(keys, objects)
        flip_in_files(tmp_path, before[2][64 * KIB : 64 * KIB + 64])  # its second block
    with memory.objects([150 * KIB] * 5) as targets, opened([tier(tmp_path)], memory) as caller:
        assert caller.lock(keys, 150 * KIB) == list(range(5))
        assert caller.load(keys, targets) == [0, 1, 3, 4]
        caller.adapter.submit_unlock(keys)
        assert bytes_of(targets) == [*before[:2], bytes(150 * KIB), *before[3:]]
        assert caller.look_up(keys, 150 * KIB) == [0, 1, 3, 4]


def test_a_damaged_object_that_was_stored_here_is_told_as_deleted(tmp_path, memory):
    keys = keys_of(3)
    with memory.objects([150 * KIB] * 3, seed=6) as objects, opened([disk(tmp_path)], memory) as caller:
        caller.store(keys, objects)
        flip_in_files(tmp_path, bytes_of(objects)[1][:64])
        assert caller.load(keys, objects) == [0, 2]
        assert caller.listener.deleted == [keys[1]]
        assert caller.adapter.get_usage().bytes_by_cache_salt == {"": 300 * KIB}


def test_nobody_else_hits(tmp_path, memory):
    tiers, size = [shared(tmp_path)], 64 * KIB
    others = {
        "another model": keys_of(3, model="example/other"),
        "another rank": keys_of(3, rank=ObjectKey.ComputeKVRank(2, 1, 2, 1)),
        "another group": keys_of(3, group=1),
        "another user": keys_of(3, salt="somebody"),
        "another prompt": keys_of(3, 1),
    }
    with memory.objects([size] * 3, seed=7) as objects, opened(tiers, memory) as caller:
        caller.store(keys_of(3), objects)
    with memory.objects([size] * 3) as targets, opened(tiers, memory) as caller:
        for why, keys in others.items():
            assert caller.look_up(keys, size) == [], why
            assert caller.load(keys, targets) == [], why
        assert caller.look_up(keys_of(3), {0: layout(size, torch.float16)}) == []
        assert caller.look_up(keys_of(3), size - 2) == []
        assert caller.look_up(keys_of(3), {}) == []
        assert caller.look_up(keys_of(3), size) == [0, 1, 2]
        assert bytes_of(targets) == [bytes(size)] * 3
    with memory.objects([size] * 3, dtype=torch.float16) as targets, opened(tiers, memory) as caller:
        assert caller.load(keys_of(3), targets) == []
    for options in ({"model_identity": "after the update"}, {"block_bytes": "32KiB"}):
        with opened(tiers, memory, **options) as caller:
            assert caller.look_up(keys_of(3), size) == [], options


def test_objects_that_lmcache_serializes_are_found_though_the_layout_is_the_engines(tmp_path, memory):
    keys, engine_layout = keys_of(2), {0: layout(128 * KIB)}
    with (
        memory.objects([64 * KIB] * 2, seed=8, dtype=torch.uint8) as objects,
        opened([disk(tmp_path)], memory) as caller,
    ):
        caller.store(keys, objects)
        assert caller.look_up(keys, engine_layout) == [0, 1]
        assert caller.load(keys, objects) == [0, 1]


def test_a_full_disk_evicts_the_oldest_and_lmcache_is_told(tmp_path, memory):
    sizes, tiers = [256 * KIB] * 40, [disk(tmp_path, capacity="8MiB")]
    keys = keys_of(40)
    with memory.objects(sizes, seed=9) as objects, opened(tiers, memory) as caller:
        for start in range(0, 40, 4):
            assert caller.store(keys[start : start + 4], objects[start : start + 4]).is_successful()
        held = [keys[index] for index in caller.look_up(keys, 256 * KIB)]
        usage = caller.adapter.get_usage()
        assert keys[0] not in held
        assert keys[-1] in held
        assert set(caller.listener.deleted) == set(keys) - set(held)
        assert usage.bytes_by_cache_salt == {"": len(held) * 256 * KIB}
        assert len(held) * 256 * KIB <= usage.total_bytes_used <= usage.total_capacity_bytes <= 8 * MIB
        assert not caller.adapter.supports_global_eviction


def test_locked_objects_outlast_others_in_a_memory_tier(memory):
    locked, others = keys_of(4), keys_of(40, 1)
    with (
        memory.objects([256 * KIB] * 4, seed=10) as objects,
        memory.objects([256 * KIB] * 40, seed=11) as fillers,
        opened([{"type": "memory", "capacity": "8MiB"}], memory) as caller,
    ):
        caller.store(locked, objects)
        assert caller.lock(locked, 256 * KIB) == [0, 1, 2, 3]
        for start in range(0, 40, 4):
            caller.store(others[start : start + 4], fillers[start : start + 4])
        assert caller.load(locked, objects) == [0, 1, 2, 3]
        caller.adapter.submit_unlock(locked)


def test_a_lookup_finds_no_object_that_a_server_has_dropped_since(memory):
    from valkey_server import ValkeyServer

    keys = keys_of(3)
    with (
        closing(ValkeyServer().start()) as server,
        memory.objects([150 * KIB] * 3, seed=12) as objects,
        opened([resp(server)], memory) as caller,
    ):
        caller.store(keys, objects)
        assert caller.look_up(keys, 150 * KIB) == [0, 1, 2]
        server.command("FLUSHALL")
        assert caller.lock(keys, 150 * KIB) == []
        assert caller.adapter.report_status()["locked_object_count"] == 0


def test_locked_objects_are_not_evicted(tmp_path, memory):
    tiers = [disk(tmp_path, capacity="8MiB")]
    locked, others = keys_of(4), keys_of(40, 1)
    with memory.objects([256 * KIB] * 4, seed=10) as objects, memory.objects([256 * KIB] * 40, seed=11) as fillers:
        before = bytes_of(objects)
        with opened(tiers, memory) as caller:
            caller.store(locked, objects)
            assert caller.lock(locked, 256 * KIB) == [0, 1, 2, 3]
            assert caller.lock(locked[:1], 256 * KIB) == [0]
            for start in range(0, 40, 4):
                caller.store(others[start : start + 4], fillers[start : start + 4])
            for one in objects:
                fill(one, bytes(one.get_size()))
            assert caller.load(locked, objects) == [0, 1, 2, 3]
            assert bytes_of(objects) == before
            caller.adapter.submit_unlock(locked)
            assert caller.adapter.report_status()["locked_object_count"] == 1
            for start in range(0, 40, 4):
                caller.store(keys_of(40, 2)[start : start + 4], fillers[start : start + 4])
            assert caller.look_up(locked, 256 * KIB) == [0]
            caller.adapter.submit_unlock(locked)  # more than there are locks: ignored
            assert caller.adapter.report_status()["locked_object_count"] == 0


def test_a_disk_full_of_locked_objects_takes_no_others(tmp_path, memory):
    keys = keys_of(8)
    with memory.objects([MIB] * 8, seed=12) as objects, opened([disk(tmp_path, capacity="4MiB")], memory) as caller:
        for number in range(3):
            caller.store(keys[number : number + 1], objects[number : number + 1])
        locked = caller.lock(keys, MIB)
        assert locked
        assert not caller.store(keys[3:], objects[3:]).is_successful()
        assert caller.look_up([keys[index] for index in locked], MIB) == list(range(len(locked)))
        caller.adapter.submit_unlock([keys[index] for index in locked])
        assert caller.store(keys[7:], objects[7:]).is_successful()


def test_an_object_counts_as_deleted_only_when_no_tier_has_it(tmp_path, memory):
    keys, tiers = keys_of(40), [disk(tmp_path, capacity="8MiB"), shared(tmp_path)]
    with memory.objects([256 * KIB] * 40, seed=13) as objects, opened(tiers, memory) as caller:
        for start in range(0, 40, 4):
            caller.store(keys[start : start + 4], objects[start : start + 4])
        assert caller.look_up(keys, 256 * KIB) == list(range(40))
        assert caller.listener.deleted == []


def test_a_killed_io_process_costs_misses_only(tmp_path, memory):
    keys = keys_of(4)
    with memory.objects([256 * KIB] * 4, seed=14) as objects, opened([disk(tmp_path)], memory) as caller:
        caller.store(keys, objects)
        assert caller.lock(keys, 256 * KIB) == [0, 1, 2, 3]
        wait_for_process().kill()
        wait_for(lambda: caller.load(keys, objects) == [0, 1, 2, 3], "the new process")
        caller.adapter.submit_unlock(keys)
        assert caller.store(keys_of(1, 1), objects[:1]).is_successful()


def test_a_tier_that_hangs_is_waited_for_once_and_writes_nothing_later(tmp_path, memory):
    keys, sizes = keys_of(12), [256 * KIB] * 12
    with (
        memory.objects(sizes, seed=15) as objects,
        memory.objects(sizes) as targets,
        opened([disk(tmp_path)], memory, call_deadline=0.5) as caller,
    ):
        wait_for(lambda: caller.store(keys, objects).is_successful(), "stores within the deadline")
        process = wait_for_process()
        process.suspend()
        try:
            assert caller.load(keys, targets) == []
        finally:
            process.resume()
        wait_for(lambda: caller.load(keys[:1], objects[:1]) == [0], "the tier")
        assert bytes_of(targets) == [bytes(256 * KIB)] * 12


def test_a_tier_that_cannot_start_makes_misses(tmp_path, memory):
    with (
        memory.objects([4 * KIB], seed=16) as objects,
        opened([disk(tmp_path)], memory),
        opened([disk(tmp_path)], memory, state=TierState.DOWN) as second,  # the first one has the lock
    ):
        assert second.look_up(keys_of(1), 4 * KIB) == []
        assert not second.store(keys_of(1), objects).is_successful()
        assert second.load(keys_of(1), objects) == []
        status = second.adapter.report_status()
        assert status["is_healthy"] is False
        assert "held by another process" in status["tiers"]["disk"]["reason"]


def test_a_dead_server_makes_misses(memory):
    from valkey_server import ValkeyServer

    server = ValkeyServer().start()
    try:
        with memory.objects([256 * KIB] * 2, seed=17) as objects, opened([resp(server)], memory) as caller:
            caller.store(keys_of(2), objects)
            assert caller.look_up(keys_of(2), 256 * KIB) == [0, 1]
            server.close()
            assert caller.load(keys_of(2), objects) == []
            assert not caller.store(keys_of(2, 1), objects).is_successful()
    finally:
        server.close()


def test_close_ends_tasks_in_flight_and_all_processes(tiers, memory):
    keys, sizes = keys_of(24), [MIB] * 24
    with memory.objects(sizes, seed=18) as objects:
        adapter = create(tiers, memory)
        for key, one in zip(keys, objects, strict=True):
            adapter.submit_store_task([key], [one])
            adapter.submit_load_task([key], [one])
            adapter.submit_lookup_and_lock_task([key], {0: layout(MIB)})
        adapter.close()
        adapter.close()
        before = bytes_of(objects)
        wait_for(lambda: not io_processes(), "the end of the I/O processes")
        assert bytes_of(objects) == before


@pytest.mark.parametrize("fork", ALL_WAYS)
def test_a_forked_child_misses_and_the_parent_goes_on(tmp_path, memory, fork):
    keys = keys_of(2)
    with memory.objects([256 * KIB] * 2, seed=19) as objects, opened([disk(tmp_path)], memory) as caller:
        caller.store(keys, objects)

        def child():
            adapter = caller.adapter
            stored = adapter.submit_store_task(keys, objects)
            found = adapter.submit_lookup_and_lock_task(keys, {0: layout(256 * KIB)})
            loaded = adapter.submit_load_task(keys, objects)
            answers = [
                adapter.pop_completed_store_tasks()[stored].is_successful(),
                adapter.query_lookup_and_lock_result(found).get_indices_list(),
                adapter.query_load_result(loaded).get_indices_list(),
            ]
            adapter.close()
            return answers

        assert tell(fork, child) == [False, [], []]
        assert caller.lock(keys, 256 * KIB) == [0, 1]
        assert caller.load(keys, objects) == [0, 1]
        caller.adapter.submit_unlock(keys)


@pytest.mark.parametrize("fork", ALL_WAYS)
def test_a_child_does_not_wait_for_locks_that_threads_of_the_parent_held(tmp_path, memory, fork):
    keys = keys_of(2)
    with memory.objects([256 * KIB] * 2, seed=19) as objects, opened([disk(tmp_path)], memory) as caller:
        caller.store(keys, objects)
        adapter = caller.adapter
        locked = caller.lock(keys, 256 * KIB)

        def child():
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(PATIENCE_SECONDS))
            adapter.submit_unlock(keys)
            answers = adapter.report_status()["is_healthy"], adapter.get_usage().total_bytes_used, adapter.readings()
            adapter.close()
            return answers

        held, go_on = threading.Event(), threading.Event()

        def hold():
            with adapter._locks._lock, adapter._tiers._lock, adapter._usage_lock:
                held.set()
                assert go_on.wait(PATIENCE_SECONDS)

        thread = threading.Thread(target=hold)
        thread.start()
        try:
            assert held.wait(PATIENCE_SECONDS)
            assert tell(fork, child) == [False, 0, {}]
        finally:
            go_on.set()
            thread.join()
        assert locked == caller.load(keys, objects) == [0, 1]
        adapter.submit_unlock(keys)


def test_usage_is_per_salt(tmp_path, memory):
    with memory.objects([64 * KIB] * 3, seed=20) as objects, opened([disk(tmp_path)], memory) as caller:
        caller.store(keys_of(2, salt="one"), objects[:2])
        caller.store(keys_of(1, salt="two"), objects[2:])
        caller.store(keys_of(1, salt="two"), objects[2:])  # again: it is there
        usage = caller.adapter.get_usage()
        assert usage.bytes_by_cache_salt == {"one": 128 * KIB, "two": 64 * KIB}
        assert usage.total_bytes_used == 192 * KIB


def test_only_so_many_objects_are_remembered(tmp_path, memory):
    keys = keys_of(10)
    with memory.objects([150 * KIB] * 10, seed=22) as objects, opened([shared(tmp_path)], memory) as caller:
        caller.adapter._holdings = Holdings(most=4)
        for key, one in zip(keys, objects, strict=True):
            caller.store([key], [one])
        assert caller.adapter.report_status()["stored_object_count"] == 4
        assert caller.adapter.get_usage().bytes_by_cache_salt == {"": 600 * KIB}
        assert caller.listener.deleted == keys[:6]
        assert caller.look_up(keys, 150 * KIB) == list(range(10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tier": []}, 'unknown key, did you mean "tiers"'),
        ({"tiers": []}, "at least one tier"),
        ({"call_deadline": 0}, "call_deadline"),
        ({"block_bytes": "much"}, "^block_bytes"),
        ({"staging_bytes": "4KiB"}, "^staging_bytes"),
        ({"tiers": [{"type": "dusk"}]}, r"^tiers\[0\].type='dusk'.*disk"),
        ({"tiers": [{"type": "memory", "capacity": "1B"}]}, r"^tiers\[0\].capacity"),
        ({"tiers": [{"type": "memory", "capacity": "1MiB"}] * 2, "staging_bytes": "8EiB"}, "^staging_bytes"),
        (
            {"tiers": [{"type": "memory", "capacity": "1MiB", "admission": "second_touch"}]},
            r'^tiers\[0\].admission.*"always" only',
        ),
    ],
)
def test_a_wrong_option_stops_the_start(tmp_path, memory, options, message):
    with pytest.raises((ConfigError, CapacityError), match=message):
        create(**{"tiers": [disk(tmp_path)], "memory": memory, **options})


def test_the_page_lists_every_option():
    text = (Path(__file__).parents[2] / "docs" / "lmcache.md").read_text()
    for option in msgspec.structs.fields(LMCacheOptions):
        default = "required" if option.required else f"`{json.dumps(option.default)}`"
        (meta,) = get_type_hints(LMCacheOptions, include_extras=True)[option.name].__metadata__[-1:]
        assert f"| `{option.name}` | {default} | {meta.description} |" in text
