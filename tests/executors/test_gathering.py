"""Pieces of a part are reported together, every block once and under its own cause."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kvtier.executors import gathering
from kvtier.executors.gathering import Gathering, join_results, split_result
from kvtier.executors.protocol import Part, PartResult
from kvtier.executors.queue import PartQueue
from kvtier.testing.stores import make_key
from kvtier.types import FailureCause


def make_part(serial, first, count, is_load=True, store_slots=True):
    slots = list(range(first, first + count))
    return Part.of(serial, first, is_load, [make_key(slot) for slot in slots], slots, slots if store_slots else None)


def result_of(part, failed=()):
    successes = [index not in failed for index in range(part.num_blocks)]
    failures = {FailureCause.CORRUPT: len(failed)} if failed else {}
    return PartResult(part.serial, part.first, successes, 10 * successes.count(True), failures)


def test_the_last_piece_reports_all_of_them(monkeypatch):
    monkeypatch.setattr(gathering, "_SECONDS_SILENT", 1e9)
    pieces = [make_part(7, first, 4) for first in (0, 4, 8)]
    gathered = Gathering()
    gathered.expect(pieces)
    assert gathered.add([result_of(pieces[2])]) == []
    assert gathered.add([result_of(pieces[0], failed=[1])]) == []
    (whole,) = gathered.add([result_of(pieces[1])])
    assert (whole.serial, whole.first, whole.num_bytes) == (7, 0, 110)
    assert whole.successes == [index != 1 for index in range(12)]
    assert whole.failures == {FailureCause.CORRUPT: 1}


def test_what_takes_long_is_reported_in_between(monkeypatch):
    monkeypatch.setattr(gathering, "_SECONDS_SILENT", -1.0)
    pieces = [make_part(7, first, 4) for first in (0, 4)]
    gathered = Gathering()
    gathered.expect(pieces)
    assert gathered.add([result_of(pieces[1])]) == [result_of(pieces[1])]
    assert gathered.add([result_of(pieces[0])]) == [result_of(pieces[0])]


def test_a_part_of_one_piece_is_reported_as_it_is():
    gathered, part = Gathering(), make_part(3, 0, 2)
    gathered.expect([part])
    assert gathered.add([result_of(part)]) == [result_of(part)]


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
    queue = PartQueue()
    loads = [make_part(number, number, 1) for number in range(5)]
    store = make_part(9, 0, 1, is_load=False)
    by_key = [make_part(number, 0, 1, is_load=False, store_slots=False) for number in (10, 11)]
    for part in (store, *by_key, *loads):
        queue.put(part)
    assert queue.take_many(3) == loads[:3]
    assert queue.take_many(1) == loads[3:4]
    assert queue.take_many(8) == loads[4:]
    assert queue.take_many(8) == [store]
    assert queue.take_many(8) == by_key[:1]
    assert queue.take_many(8) == by_key[1:]
    queue.close()
    assert queue.take_many(8) == []
