"""Tiers whose I/O processes work on LMCache's memory itself, which lies in shared memory with a name."""

import os
import random
import signal
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from adapters import (
    BLOCK_BYTES,
    MIB,
    Caller,
    HostMemory,
    bytes_of,
    create,
    disk,
    fill,
    flip_in_files,
    io_processes,
    keys_of,
    opened,
    shared,
    wait_for_process,
)

from kvtier.adapters.lmcache import adapter
from kvtier.adapters.lmcache.pool import Pool
from kvtier.errors import ConfigError
from kvtier.events import TierState
from kvtier.testing.patience import wait_for

KIB = 1 << 10

SIZES = [2, 150 * KIB, 64 * KIB, 64 * KIB + 2, 128 * KIB - 2, MIB]
NAME = f"lmcache_l1_pool_kvtier_{os.getpid()}"


@pytest.fixture(scope="module")
def pool():
    """LMCache's own memory, aligned to the blocks of the tiers."""
    made = HostMemory(32 * MIB, align_bytes=BLOCK_BYTES, shm_name=NAME)
    yield made
    made.close()


@pytest.fixture
def in_place(pool):
    """Return a function that opens an adapter on that memory."""
    return lambda tiers, **options: opened(tiers, pool, shared_memory=True, **options)


def whole_memory(pool):
    """Return all bytes of LMCache's memory, as another process sees them."""
    return np.fromfile(f"/dev/shm/{NAME}", np.uint8)


def test_every_byte_of_objects_of_every_size_comes_back(tiers, pool, in_place):
    keys = keys_of(len(SIZES))
    with pool.objects(SIZES, seed=60) as objects, pool.objects(SIZES) as targets, in_place(tiers) as caller:
        before = bytes_of(objects)
        assert caller.store(keys, objects).is_successful()
        assert bytes_of(objects) == before
        around = whole_memory(pool)
        assert caller.load(keys, targets) == list(range(len(SIZES)))
        assert bytes_of(targets) == before
        after = whole_memory(pool)
        base = pool.manager.get_l1_memory_desc().ptr
        for one in targets:
            start = one.data_ptr - base
            after[start : start + one.get_physical_size()] = around[start : start + one.get_physical_size()]
        assert np.array_equal(after, around), "bytes of others were written"
        assert caller.look_up(keys_of(3), SIZES[1]) == [1]
    with in_place(tiers) as caller, pool.objects(SIZES) as targets:
        assert caller.load(keys, targets) == list(range(len(SIZES)))
        assert bytes_of(targets) == before


def test_the_io_process_has_mapped_the_memory_by_its_name(tmp_path, pool, in_place):
    keys = keys_of(2)
    with pool.objects([150 * KIB] * 2, seed=61) as objects, in_place([disk(tmp_path)]) as caller:
        assert caller.store(keys, objects).is_successful()
        assert NAME in Path(f"/proc/{wait_for_process().pid}/maps").read_text()
        assert caller.load(keys, objects) == [0, 1]
    assert Path(f"/dev/shm/{NAME}").exists(), "it is LMCache's"


def test_more_bytes_than_one_call_moves_go_in_rounds(tmp_path, pool, in_place):
    keys = keys_of(12)
    with (
        pool.objects([MIB] * 12, seed=62) as objects,
        pool.objects([MIB] * 12) as targets,
        in_place([disk(tmp_path)], staging_bytes="4MiB") as caller,
    ):
        assert caller.store(keys, objects).is_successful()
        assert caller.load(keys, targets) == list(range(12))
        assert bytes_of(targets) == bytes_of(objects)


@pytest.mark.parametrize("tier", [disk, shared])
def test_a_flipped_bit_is_a_miss(tmp_path, pool, in_place, tier):
    keys = keys_of(3)
    with pool.objects([150 * KIB] * 3, seed=63) as objects, in_place([tier(tmp_path)]) as caller:
        before = bytes_of(objects)
        assert caller.store(keys, objects).is_successful()
        flip_in_files(tmp_path, before[1][70 * KIB : 80 * KIB])
        for one in objects:
            fill(one, bytes(one.get_size()))
        assert caller.load(keys, objects) == [0, 2]
        assert [bytes_of(objects)[index] for index in (0, 2)] == [before[0], before[2]]


def test_what_one_tier_has_lost_comes_from_the_next(tmp_path, pool, in_place):
    keys = keys_of(3)
    with (
        pool.objects([150 * KIB] * 3, seed=64) as objects,
        in_place([disk(tmp_path), shared(tmp_path)]) as caller,
    ):
        before = bytes_of(objects)
        assert caller.store(keys, objects).is_successful()
        flip_in_files(tmp_path / "disk", before[1][:KIB])
        for one in objects:
            fill(one, bytes(one.get_size()))
        assert caller.load(keys, objects) == [0, 1, 2]
        assert bytes_of(objects) == before


def test_a_killed_io_process_costs_misses_only(tmp_path, pool, in_place):
    keys = keys_of(4)
    with pool.objects([256 * KIB] * 4, seed=65) as objects, in_place([disk(tmp_path)]) as caller:
        caller.store(keys, objects)
        wait_for_process().kill()
        wait_for(lambda: caller.load(keys, objects) == [0, 1, 2, 3], "the new process")


def test_memory_that_shrinks_costs_misses_only(tmp_path, caplog):
    name = NAME + "_shrinks"
    path, size, keys = Path(f"/dev/shm/{name}"), 8 * MIB, keys_of(2)
    memory = HostMemory(size, align_bytes=BLOCK_BYTES, shm_name=name)
    try:
        with (
            memory.objects([MIB] * 2, seed=76) as objects,
            opened([disk(tmp_path)], memory, shared_memory=True) as caller,
        ):
            before = bytes_of(objects)
            assert caller.store(keys, objects).is_successful()
            os.truncate(path, 0)  # an access to it is SIGBUS from now on, also in this process
            assert not caller.store(keys_of(2, 1), objects).is_successful()
            wait_for(lambda: f"died of signal {signal.SIGBUS.value}" in caplog.text, "its end")
            assert caller.load(keys, objects) == []
            os.truncate(path, size)
            wait_for(lambda: caller.load(keys, objects) == [0, 1], "a process that has mapped it again")
            assert bytes_of(objects) == before
            assert caller.look_up(keys_of(2, 1), MIB) == []
    finally:
        memory.close()


def test_two_adapters_work_on_one_memory(tmp_path, pool, in_place):
    ours, theirs = keys_of(4), keys_of(4, 1)
    folders = [tmp_path / "ours", tmp_path / "theirs"]
    for folder in folders:
        folder.mkdir()
    with pool.objects([MIB] * 4, seed=77) as objects, pool.objects([MIB] * 4, seed=78) as others:
        before, others_before = bytes_of(objects), bytes_of(others)
        with in_place([disk(folders[0])]) as first:
            with in_place([disk(folders[1])]) as second:
                for _ in range(4):
                    tasks = [
                        (second, second.adapter.submit_store_task(theirs, others)),
                        (first, first.adapter.submit_store_task(ours, objects)),
                    ]
                    for caller, task in tasks:
                        done = wait_for(caller.adapter.pop_completed_store_tasks, "the store has ended")
                        assert done[task].is_successful()
                    for one in [*objects, *others]:
                        fill(one, bytes(MIB))
                    task = first.adapter.submit_load_task(ours, objects)
                    assert second.load(theirs, others) == [0, 1, 2, 3]
                    found = wait_for(lambda task=task: first.adapter.query_load_result(task), "the load has ended")
                    assert found.get_indices_list() == [0, 1, 2, 3]
                    assert (bytes_of(objects), bytes_of(others)) == (before, others_before)
                assert second.load(ours, others) == []
            for one in objects:
                fill(one, bytes(MIB))
            assert first.load(ours, objects) == [0, 1, 2, 3]
            assert bytes_of(objects) == before


def test_a_task_ends_only_after_a_process_that_hangs_has_ended_and_nothing_is_written_later(tmp_path, pool, in_place):
    keys = keys_of(4)
    tiers = [disk(tmp_path, job_deadline=1.0)]
    with pool.objects([MIB] * 4, seed=66) as objects, in_place(tiers, call_deadline=0.2) as caller:
        assert caller.store(keys, objects).is_successful()
        for operation in ("load", "store"):
            (process,) = wait_for(io_processes, "an I/O process")
            process.send_signal(signal.SIGSTOP)
            wait_for(lambda process=process: process.status() == psutil.STATUS_STOPPED, "it is stopped")
            if operation == "load":
                assert caller.load(keys, objects) == []
            else:
                assert not caller.store(keys_of(4, 1), objects).is_successful()
            assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
            pattern = random.Random(67).randbytes(MIB)
            for one in objects:
                fill(one, pattern)
            wait_for(lambda: caller.load(keys, objects) == [0, 1, 2, 3], "the next process")


@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_task_that_has_waited_for_too_long_moves_nothing(tmp_path, pool, monkeypatch, shared_memory):
    keys, others = keys_of(2), keys_of(2, 1)
    with (
        pool.objects([MIB] * 2, seed=72) as objects,
        opened([disk(tmp_path)], pool, shared_memory=shared_memory) as caller,
    ):
        assert caller.store(keys, objects).is_successful()
        monkeypatch.setattr(adapter, "_TASK_SECONDS", 0.0)
        before = bytes_of(objects)
        assert not caller.store(others, objects).is_successful()
        for one in objects:
            fill(one, bytes(MIB))
        assert caller.load(keys, objects) == []
        assert bytes_of(objects) == [bytes(MIB)] * 2
        monkeypatch.undo()
        assert caller.look_up(others, MIB) == []
        assert caller.load(keys, objects) == [0, 1]
        assert bytes_of(objects) == before


@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_store_waits_for_a_tier_that_is_starting(tmp_path, pool, shared_memory):
    keys = keys_of(2)
    with (
        pool.objects([MIB] * 2, seed=73) as objects,
        closing(create([disk(tmp_path)], pool, shared_memory=shared_memory)) as begun,
    ):
        assert begun.report_status()["tiers"]["disk"]["state"] == "starting"
        caller = Caller(begun)
        assert caller.store(keys, objects).is_successful()
        assert caller.load(keys, objects) == [0, 1]


def test_close_ends_tasks_and_processes(tmp_path, pool, in_place):
    keys = keys_of(16)
    with pool.objects([MIB] * 16, seed=68) as objects, in_place([disk(tmp_path)]) as caller:
        tasks = [caller.adapter.submit_store_task(keys, objects) for _ in range(3)]
        caller.adapter.close()
        assert set(caller.adapter.pop_completed_store_tasks()) == set(tasks)
        assert not io_processes()


@pytest.mark.parametrize("operation", ["load", "store"])
def test_close_ends_a_process_that_hangs_in_a_task(tmp_path, pool, in_place, operation):
    keys = keys_of(4)
    with pool.objects([MIB] * 4, seed=74) as objects, in_place([disk(tmp_path)]) as caller:
        assert caller.store(keys, objects).is_successful()
        process = wait_for_process()
        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: process.status() == psutil.STATUS_STOPPED, "it is stopped")
        if operation == "load":
            task, adapter = caller.adapter.submit_load_task(keys, objects), caller.adapter
            wait_for(lambda: adapter._tiers._batches, "the job has begun")
            adapter.close()
            assert adapter.query_load_result(task).get_indices_list() == []
        else:
            task, adapter = caller.adapter.submit_store_task(keys_of(4, 1), objects), caller.adapter
            wait_for(lambda: adapter._tiers._batches, "the job has begun")
            adapter.close()
            assert not adapter.pop_completed_store_tasks()[task].is_successful()
        wait_for(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, "its end")


def test_an_object_elsewhere_is_not_stored(tmp_path, pool, memory, in_place):
    keys = keys_of(2)
    with (
        pool.objects([150 * KIB], seed=69) as inside,
        memory.objects([150 * KIB], seed=70) as outside,
        in_place([disk(tmp_path)]) as caller,
    ):
        assert not caller.store(keys, [*inside, *outside]).is_successful()
        assert caller.load(keys, [*inside, *outside]) == [0]


def test_a_tier_that_cannot_start_makes_misses(tmp_path, pool):
    (tmp_path / "disk").write_text("no directory")
    with (
        pool.objects([MIB], seed=71) as objects,
        opened([disk(tmp_path)], pool, state=TierState.DOWN, shared_memory=True) as caller,
    ):
        assert not caller.store(keys_of(1), objects).is_successful()
        assert caller.load(keys_of(1), objects) == []


def described(**changes):
    known = {"ptr": 0, "size": 32 * MIB, "align_bytes": BLOCK_BYTES}
    return SimpleNamespace(**{**known, **changes})


def test_a_memory_that_is_not_aligned_or_has_no_name_stops_the_start(tmp_path, pool, memory):
    with pytest.raises(ConfigError, match=r"shared_memory=True: --l1-align-bytes 65536, or a multiple"):
        create([disk(tmp_path)], memory, shared_memory=True)
    ours = pool.manager.get_l1_memory_desc()
    with pytest.raises(ConfigError, match="does not say where"):
        Pool(None, BLOCK_BYTES)
    elsewhere = np.zeros(MIB, np.uint8)
    for wrong in (described(ptr=elsewhere.ctypes.data), described(ptr=ours.ptr + BLOCK_BYTES)):
        with pytest.raises(ConfigError, match="no name below /dev/shm"):
            Pool(wrong, BLOCK_BYTES)


def test_a_name_that_another_file_has_taken_is_refused(pool):
    opened_pool = Pool(pool.manager.get_l1_memory_desc(), BLOCK_BYTES)
    path = Path(f"/dev/shm/{NAME}")
    path.rename(path.with_name(NAME + "_aside"))
    try:
        with pytest.raises(ConfigError, match="No such file"):
            opened_pool.open()
        path.write_bytes(bytes(MIB))
        with pytest.raises(ConfigError, match="another file now"):
            opened_pool.open()
        path.unlink()
    finally:
        path.with_name(NAME + "_aside").rename(path)
    arena = opened_pool.open()
    assert arena.view.nbytes == 32 * MIB
    arena.close()
