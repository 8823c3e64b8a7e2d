"""Tables with one entry per block, against a dict and an OrderedDict that get the same calls."""

import random
import time
from collections import OrderedDict
from itertools import chain, islice
from sys import getsizeof

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvtier import key_tables, long_queue
from kvtier.errors import InvariantError
from kvtier.key_queues import are_disjoint, clear_queues, key_queues
from kvtier.key_tables import KeySlots, ShardedDict, SmallDict, key_dict
from kvtier.keys import make_offload_key
from kvtier.long_queue import LongQueue

KEYS = [make_offload_key(bytes([i, 7 * i % 3]), i % 2) for i in range(48)]
LISTS = st.lists(st.sampled_from(KEYS), max_size=20)
RUNS = st.builds(lambda start, count: KEYS[start : start + count], st.integers(0, 47), st.integers(0, 24))


class QueueMachine(RuleBasedStateMachine):
    """Two queues beside each other, and two OrderedDicts."""

    @initialize(
        longest=st.integers(1, 8),
        short=st.integers(1, 8),
        most_bytes=st.sampled_from([60, 400]),
        capacity=st.sampled_from([48, 70_000, 1_000_000]),
        knows_slots=st.booleans(),
    )
    def begin(self, longest, short, most_bytes, capacity, knows_slots):
        self.slot_of = key_dict(capacity)
        self.slots = KeySlots(self.slot_of)
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(long_queue, "LONGEST_RUN", longest)
        self.patch.setattr(long_queue, "SHORT_RUN", min(short, longest))
        self.patch.setattr(long_queue, "MOST_BYTES_PER_KEY", most_bytes)
        self.queues = key_queues(2, capacity, self.slots if knows_slots else None)
        self.models = [OrderedDict(), OrderedDict()]

    def teardown(self):
        self.patch.undo()

    def give_slots(self, keys):
        """Give slots to keys that enter, the lowest first, so that slots change their keys."""
        free = [slot for slot in range(48) if slot not in self.slot_of.every_value()]
        self.slot_of.update(zip((key for key in keys if key not in self.slot_of), free, strict=False))

    @rule(keys=st.one_of(LISTS, RUNS), to=st.integers(0, 1), value=st.integers(0, 3), tells_slots=st.booleans())
    def append(self, keys, to, value, tells_slots):
        new = [key for key in dict.fromkeys(keys) if not any(key in model for model in self.models)]
        self.give_slots(new)
        if tells_slots:
            self.slots.entering = self.slot_of.values_of(new[::-1])
        self.queues[to].append(new, value)
        self.slots.entering = []
        self.models[to].update(dict.fromkeys(new, value))

    @rule(keys=st.one_of(LISTS, RUNS), of=st.integers(0, 1))
    def renew(self, keys, of):
        self.queues[of].renew(keys)
        for key in keys:
            if key in self.models[of]:
                self.models[of].move_to_end(key)

    @rule(keys=st.one_of(LISTS, RUNS), of=st.integers(0, 1))
    def renew_all(self, keys, of):
        self.queues[of].renew_all(keys, self.queues[1 - of])
        for key in keys:
            for model in self.models:
                if key in model:
                    model.move_to_end(key)

    @rule(keys=st.one_of(LISTS, RUNS), to=st.integers(0, 1), both=st.booleans())
    def take(self, keys, to, both):
        source = 1 - to
        keys = keys if both else list(dict.fromkeys(keys))
        self.queues[to].take(keys, *(self.queues if both else [self.queues[source]]))
        for key in keys:
            if key in self.models[source]:
                self.models[to][key] = self.models[source].pop(key)
            elif both and key in self.models[to]:
                self.models[to].move_to_end(key)

    @rule(of=st.integers(0, 1), count=st.integers(0, 12))
    def drop_the_oldest(self, of, count):
        oldest = self.queues[of].oldest(count)
        assert oldest == list(islice(self.models[of], count))
        self.queues[of].drop(oldest)
        for key in oldest:
            del self.models[of][key]

    @rule(keys=st.one_of(LISTS, RUNS), of=st.integers(0, 1))
    def discard(self, keys, of):
        self.queues[of].discard(keys)
        for key in keys:
            self.models[of].pop(key, None)

    @rule(key=st.sampled_from(KEYS), of=st.integers(0, 1), value=st.integers(0, 3))
    def assign(self, key, of, value):
        if key not in self.models[1 - of]:
            self.give_slots([key])
            self.queues[of][key] = self.models[of][key] = value

    @rule(of=st.integers(0, 1))
    def clear(self, of):
        self.queues[of].clear()
        self.models[of].clear()

    @rule(keys=LISTS)
    def ask(self, keys):
        for queue, model in zip(self.queues, self.models, strict=True):
            assert queue.isdisjoint(keys) == model.keys().isdisjoint(keys)
            assert [queue.get(key, -1) for key in keys] == [model.get(key, -1) for key in keys]
            assert queue.held(keys) == [key for key in keys if key in model]
            assert [key in queue for key in keys] == [key in model for key in keys]

    @rule(keys=LISTS)
    def ask_both(self, keys):
        held = set(chain(*self.models))
        assert are_disjoint(self.queues, keys) == held.isdisjoint(keys)
        assert are_disjoint(self.queues[1:], keys) == self.models[1].keys().isdisjoint(keys)

    @invariant()
    def equal(self):
        if hasattr(self, "queues"):
            for queue, model in zip(self.queues, self.models, strict=True):
                queue.check_invariants()
                assert list(queue.entries()) == list(model.items())
                assert len(queue) == len(model)
            for key in set(self.slot_of).difference(*self.models):
                del self.slot_of[key]


QueueMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
test_a_queue_is_an_ordered_dict = QueueMachine.TestCase


class DictMachine(RuleBasedStateMachine):
    """A table, and a dict."""

    @initialize(capacity=st.sampled_from([48, 70_000, 1_000_000]))
    def begin(self, capacity):
        self.table, self.model = key_dict(capacity), {}

    @rule(keys=LISTS, first=st.integers(0, 9))
    def enter(self, keys, first):
        values = list(range(first, first + len(keys)))
        self.table.set_all(keys, values)
        self.model.update(zip(keys, values, strict=True))

    @rule(keys=LISTS)
    def leave(self, keys):
        here = [key for key in dict.fromkeys(keys) if key in self.model]
        assert self.table.pop_all(here) == [self.model.pop(key) for key in here]

    @rule(keys=LISTS)
    def ask(self, keys):
        assert self.table.get_all(keys) == [self.model.get(key) for key in keys]
        assert self.table.isdisjoint(keys) == self.model.keys().isdisjoint(keys)
        assert self.table.held(keys) == [key for key in keys if key in self.model]
        assert self.table.missing(keys) == [key for key in keys if key not in self.model]
        for key in keys:
            assert (key in self.table, self.table.get(key), self.table.get(key, 5)) == (
                key in self.model,
                self.model.get(key),
                self.model.get(key, 5),
            )

    @invariant()
    def equal(self):
        if not hasattr(self, "table"):
            return
        assert dict(self.table) == self.model
        assert self.table == self.model
        assert sorted(self.table.every_value()) == sorted(self.model.values())
        assert len(self.table) == len(self.model)


DictMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
test_a_table_is_a_dict = DictMachine.TestCase


@pytest.mark.parametrize("wrong", [b"", b"1234", "text" * 9, 7])
@pytest.mark.parametrize("most", [0, 48])
def test_what_is_no_key_is_not_here(wrong, most, monkeypatch):
    monkeypatch.setattr(key_tables, "MOST_IN_ONE", most)
    table, (queue, beside) = key_dict(48), key_queues(2, 48)
    table.set_all(KEYS, range(48))
    queue.append(KEYS, None)
    asked = [make_offload_key(b"other", 0), wrong, KEYS[3]]
    for here in (table, queue):
        assert wrong not in here
        assert here.get(wrong, 5) == 5
        assert here.isdisjoint(asked[:2])
        assert not here.isdisjoint(asked)
        assert here.held(asked) == [KEYS[3]]
    assert table.get_all(asked) == [None, None, 3]
    assert table.missing(asked) == asked[:2]
    assert not queue.renew(asked)
    queue.renew_all(asked, beside)
    assert not beside.take(asked, queue)
    assert list(beside) == [KEYS[3]]
    queue.discard(asked)
    assert list(queue) == [*KEYS[:3], *KEYS[4:]]


def test_large_tables_are_others_than_small_ones():
    assert isinstance(key_dict(key_tables.MOST_IN_ONE), SmallDict)
    assert isinstance(key_dict(key_tables.MOST_IN_ONE + 1), ShardedDict)


@pytest.mark.parametrize("most", [65_537, 200_000, 1_000_000, 4_000_000, 50_000_000])
def test_a_large_table_consists_of_as_few_short_dicts_as_its_entries_need(most):
    table, (queue,) = key_dict(most), key_queues(1, most)
    keys = [make_offload_key(bytes([7, value]), 0) for value in range(256)]
    table.set_all(keys, range(256))
    queue.append(keys, None)
    for sharded in (table, queue._places):
        parts = sharded.parts
        assert {id(part) for part in parts} == {id(part) for part in sharded.shards}
        assert [len(part) for part in parts] == [256 // len(parts)] * len(parts)
        assert most // len(parts) <= key_tables.MOST_IN_PART or len(parts) == 256
        assert most // len(parts) > key_tables.MOST_IN_PART // 2 - 1
        assert len(sharded) == len([*sharded]) == 256


def test_a_slot_that_changes_its_key_leads_to_no_other_key_s_run():
    slot_of = key_dict(48)
    slot_of.set_all(KEYS[:3], range(3))
    (queue,) = key_queues(1, 1_000_000, KeySlots(slot_of))
    queue.append(KEYS[:3], 1)
    queue.drop(KEYS[:1])
    slot_of[KEYS[9]] = slot_of.pop(KEYS[0])
    assert KEYS[9] not in queue
    assert queue.get(KEYS[9], 5) == 5
    assert queue.isdisjoint(KEYS[9:10])
    assert not queue.renew(KEYS[9:10])
    with pytest.raises(KeyError):
        queue.drop(KEYS[9:10])
    queue[KEYS[9]] = 2
    assert list(queue.entries()) == [(KEYS[1], 1), (KEYS[2], 1), (KEYS[9], 2)]
    queue.check_invariants()


def test_what_is_not_here_is_a_key_error():
    queue, table = LongQueue(), ShardedDict()
    queue.append(KEYS[:3], None)
    for wrong in (lambda: queue[KEYS[5]], lambda: queue.drop(KEYS[2:5]), lambda: queue.pop(KEYS[5])):
        with pytest.raises(KeyError):
            wrong()
    queue.check_invariants()
    assert list(queue) == KEYS[:2]
    for wrong in (lambda: table[KEYS[0]], lambda: table.pop_all(KEYS[:1]), lambda: table.pop(KEYS[0])):
        with pytest.raises(KeyError):
            wrong()
    assert queue.pop(KEYS[0]) is None
    assert table.pop(KEYS[0], 3) == 3


@pytest.mark.parametrize("most", [0, 48])
def test_queues_and_tables_are_empty_after_a_clear_and_used_again(most, monkeypatch):
    monkeypatch.setattr(key_tables, "MOST_IN_ONE", most)
    monkeypatch.setattr(key_tables, "MOST_FREED", 1)
    table, queues = key_dict(48), key_queues(2, 48)
    shards = table.shards
    for _ in range(3):
        for empties in (lambda: clear_queues(queues), lambda: [queue.clear() for queue in queues]):
            table.set_all(KEYS, range(48))
            queues[0].append(KEYS[:20], None)
            queues[1].append(KEYS[20:], None)
            assert [*map(len, queues)] == [20, 28]
            empties()
            table.clear()
            assert not any(map(len, (*queues, table)))
            assert not any(map(list, (*queues, table)))
            assert not any(KEYS[0] in here for here in (*queues, table))
            queues[0].check_invariants()
    assert table.shards is shards  # others keep it


def test_what_a_clear_removes_is_freed_by_and_by():
    table, (queue,) = ShardedDict(), key_queues(1, 1_000_000)
    for _ in range(3):
        table.set_all(KEYS, range(48))
        queue.append(KEYS, None)
        table.clear()
        queue.clear()
        held = len(table.former), len(queue._places.former)
        assert min(held) > 0
    assert held == (len(table.former), len(queue._places.former))  # no more than one clear removes
    table.set_all(KEYS[:1], [0])
    queue.append(KEYS[:1], None)
    assert not table.former
    assert not queue._places.former


@pytest.mark.parametrize("harm", ["places", "runs", "size"])
def test_contradictions_are_noticed(harm):
    queue = LongQueue()
    queue.append(KEYS, None)
    queue.check_invariants()
    if harm == "places":
        queue._places.shards[0].clear()
        queue._places.shards[KEYS[3][key_tables.SHARD_BYTE]].clear()
    elif harm == "runs":
        queue._runs[99] = {}
    else:
        queue._size += 1
    with pytest.raises(InvariantError):
        queue.check_invariants()


def test_no_table_behind_a_large_queue_is_large():
    """Whatever comes and goes in whatever portions, no dict of a queue has an entry per key or a hole per use."""
    chance = random.Random(3)
    queue, number, held = LongQueue(), 0, 20_000
    begin = time.monotonic()
    while number < 5 * held:
        count = chance.choice((1, 2, 5, 17, 300))
        new = [
            make_offload_key((number + i).to_bytes(4, "little") * 2 + bytes([(number + i) % 256]), 0)
            for i in range(count)
        ]
        number += count
        if len(queue) >= held:
            queue.drop(queue.oldest(count))
        queue.append(new, None)
        queue.renew(new[: count // 2])
        assert time.monotonic() - begin < 600
    queue.check_invariants()
    assert len(queue._runs) < held / 4
    assert max(map(len, queue._places.shards)) < held / 64
    assert sum(getsizeof(run) for run in queue._runs.values()) < 500 * held
