"""Pieces of a part are reported together, every block once and under its own cause."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from kvtier.executors.loop import Joiner, blocks_per_call, join_results
from kvtier.executors.protocol import Part, PartResult, Probe
from kvtier.executors.queue import TaskQueue
from kvtier.executors.runner import split_result
from kvtier.testing.patience import wait_for
from kvtier.testing.stores import make_key
from kvtier.types import FailureCause


def make_part(serial, first, count, is_load=True, store_slots=True):
    slots = list(range(first, first + count))
    return Part.of(serial, first, is_load, [make_key(slot) for slot in slots], slots, slots if store_slots else None)


def result_of(part, failed=()):
    successes = [index not in failed for index in range(part.num_blocks)]
    failures = {FailureCause.CORRUPT: len(failed)} if failed else {}
    return PartResult(part.serial, part.first, successes, 10 * successes.count(True), failures)


def test_a_call_moves_its_bytes_or_64_blocks_or_one():
    assert [blocks_per_call(block, 2 << 20) for block in (4096, 128 << 10, 2 << 20, 8 << 20)] == [64, 16, 1, 1]


def test_the_last_piece_reports_all_of_them():
    pieces = [make_part(7, first, 4) for first in (0, 4, 8)]
    joiner = Joiner(max_silent_seconds=1e9)
    joiner.expect(pieces)
    assert joiner.add([result_of(pieces[2])]) == []
    assert joiner.add([result_of(pieces[0], failed=[1])]) == []
    (whole,) = joiner.add([result_of(pieces[1])])
    assert (whole.serial, whole.first, whole.num_bytes) == (7, 0, 110)
    assert whole.successes == [index != 1 for index in range(12)]
    assert whole.failures == {FailureCause.CORRUPT: 1}


def test_what_takes_long_is_reported_in_between():
    pieces = [make_part(7, first, 4) for first in (0, 4)]
    joiner = Joiner(max_silent_seconds=-1.0)
    joiner.expect(pieces)
    assert joiner.add([result_of(pieces[1])]) == [result_of(pieces[1])]
    assert joiner.add([result_of(pieces[0])]) == [result_of(pieces[0])]


def test_a_part_of_one_piece_is_reported_as_it_is():
    joiner, part = Joiner(), make_part(3, 0, 2)
    joiner.expect([part])
    assert joiner.add([result_of(part)]) == [result_of(part)]


@given(st.permutations(range(6)), st.sets(st.integers(0, 5), min_size=1))
def test_only_neighbours_are_joined(order, present):
    results = [result_of(make_part(1, 3 * number, 3)) for number in order if number in present]
    joined = join_results(results)
    blocks = [(result.first + index) for result in joined for index in range(len(result.successes))]
    assert blocks == [3 * number + index for number in sorted(present) for index in range(3)]
    assert len(joined) == sum(number - 1 not in present for number in present)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=6))
def test_a_call_for_several_parts_is_taken_apart_again(successes):
    parts = [make_part(number, 0, len(row)) for number, row in enumerate(successes)]
    every = [success for row in successes for success in row]
    causes = [FailureCause.CORRUPT, FailureCause.ABSENT]
    failures = Counter(causes[index % 2] for index in range(every.count(False)))
    results = split_result(every, failures, parts, 100)
    assert [(result.serial, list(result.successes)) for result in results] == list(enumerate(successes))
    assert all(sum(result.failures.values()) == result.successes.count(False) for result in results)
    assert sum((Counter(result.failures) for result in results), Counter()) == failures
    assert [result.num_bytes for result in results] == [100 * row.count(True) for row in successes]


def test_small_parts_of_one_kind_are_taken_together():
    queue = TaskQueue()
    loads = [make_part(number, number, 1) for number in range(5)]
    store = make_part(9, 0, 1, is_load=False)
    by_key = [make_part(number, 0, 1, is_load=False, store_slots=False) for number in (10, 11)]
    for part in (store, *by_key, *loads):
        queue.put(part)
    assert queue.take(3) == loads[:3]
    assert queue.take(1) == loads[3:4]
    assert queue.take(8) == loads[4:]
    assert queue.take(8) == [store]
    assert queue.take(8) == by_key[:1]
    assert queue.take(8) == by_key[1:]
    assert queue.take(8, wait=False) == ()
    queue.close()
    assert queue.take(8) == ()


def test_loads_find_a_thread_while_stores_wait_for_one():
    queue = TaskQueue(max_storing=2)
    stores = [make_part(number, number, 1, is_load=False, store_slots=False) for number in range(4)]
    load = make_part(9, 9, 1)
    queue.put(*stores)
    assert [queue.take(1), queue.take(1)] == [stores[:1], stores[1:2]]
    assert queue.take(1, wait=False) == ()
    queue.put(load)
    assert queue.take(1) == [load]
    queue.end_store()
    assert queue.take(1) == stores[2:3]
    assert queue.take(1, wait=False) == ()


def test_every_waiting_thread_gets_one_of_the_tasks_that_come_together():
    queue, all_busy = TaskQueue(max_storing=3), threading.Barrier(5)

    def work() -> None:
        while tasks := queue.take(1):
            all_busy.wait(30)  # ends only if each thread holds a task
            if not tasks[0].is_load:
                queue.end_store()

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(work) for _ in range(4)]
        try:
            for number in range(20):
                stores = [make_part(number, index, 1, is_load=False) for index in range(3)]
                queue.put(*stores, make_part(number, 3, 1))
                all_busy.wait(30)
        finally:
            queue.close()
        for worker in workers:
            worker.result()
    assert not queue


def test_threads_that_wait_end_when_the_queue_is_closed():
    queue = TaskQueue()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(queue.take, 1) for _ in range(4)]
        queue.put(make_part(1, 0, 1))
        wait_for(lambda: sum(worker.done() for worker in waiting) == 1)
        queue.close()
        assert sorted(len(worker.result(30)) for worker in waiting) == [0, 0, 0, 1]
    assert queue.take(1) == ()


def test_what_is_taken_to_be_sent_has_the_same_order():
    queue = TaskQueue()
    loads = [make_part(number, number, 1) for number in range(40)]
    stores = [make_part(number, number, 1, is_load=False) for number in range(40, 43)]
    question = Probe.of(1, [make_key(1)])
    queue.put(*stores, *loads, question)
    assert queue
    assert queue.take_any(10) == [question, *loads[:9]]
    assert queue.take_any(100) == [*loads[9:16], stores[0], *loads[16:32], stores[1], *loads[32:], stores[2]]
    assert not queue
    queue.put(*stores, *loads[:2], question)
    assert queue.cancel({1, 41, 42}) == [loads[1], *stores[1:]]
    assert queue.take_any(100) == [question, loads[0], stores[0]]
