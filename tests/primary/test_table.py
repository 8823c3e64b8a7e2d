"""The ledger of slots: every state, every pin, and a random history against a plain model."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier import key_tables
from kvtier.errors import InvariantError, KeyFormatError
from kvtier.eviction.lru import LRUPolicy
from kvtier.keys import make_offload_key
from kvtier.primary.table import BlockTable, SlotState


def make_table(num_slots=4):
    return BlockTable(num_slots, LRUPolicy(num_slots))


def keys(*names):
    return [make_offload_key(name.encode().ljust(8), 0) for name in names]


def insert(table, names, ready=True):
    placement = table.plan(names)
    placed = dict(zip(placement.keys, table.apply(placement), strict=True))
    if ready:
        table.publish(placed.values())
    return placed


def test_a_plan_changes_nothing():
    table = make_table()
    insert(table, keys("a", "b", "c", "d"))
    before = (dict(table.slot_of), list(table.policy.candidates()), table.num_free)
    placement = table.plan(keys("x", "y"))
    assert placement.victims == keys("d", "c")
    assert (dict(table.slot_of), list(table.policy.candidates()), table.num_free) == before


def test_slots_come_in_ascending_order():
    assert list(insert(make_table(), keys("a", "b", "c")).values()) == [0, 1, 2]


def test_freed_slots_come_in_ascending_order_whatever_the_order_of_the_victims():
    table = make_table(6)
    insert(table, keys("a", "b", "c", "d", "e", "f"))
    placement = table.plan(keys("u", "v", "w", "x"))
    assert placement.victims == keys("f", "e", "d", "c")
    assert table.apply(placement) == [2, 3, 4, 5]
    table.remove(keys("b", "a"))
    assert list(insert(table, keys("y", "z")).values()) == [0, 1]


def test_states_follow_a_blocks_life():
    table = make_table()
    (a,) = keys("a")
    placed = insert(table, [a], ready=False)
    assert table.state_of(a) is SlotState.FILLING
    assert not table.is_ready(a)
    assert table.ready_slots([a]) is None
    table.publish(placed.values())
    assert table.state_of(a) is SlotState.READY
    assert table.ready_slots([a]) == [0]
    table.pin([0])
    assert table.remove([a]) == [a]
    assert table.state_of(a) is None
    assert table.num_quarantined == 1
    table.unpin([0])
    assert table.num_free == 4
    table.check_invariants()


def test_a_slot_removed_while_it_is_filled_waits_for_its_writer():
    table = make_table(1)
    (a, b) = keys("a", "b")
    insert(table, [a], ready=False)
    table.remove([a])
    assert table.plan([b]).keys == []
    table.publish([0])  # the writer's end, late
    assert table.num_free == 1
    assert a not in table
    table.check_invariants()


@pytest.mark.parametrize("end", ["publish", "discard"])
def test_a_late_end_does_not_touch_a_newer_slot_of_the_key(end):
    table = make_table()
    (a,) = keys("a")
    old = insert(table, [a], ready=False)[a]
    table.remove([a])
    new = insert(table, [a], ready=False)[a]
    assert new != old
    if end == "publish":
        table.publish([old])
    else:
        table.discard([a], [old])
    assert table.state_of(a) is SlotState.FILLING
    assert table.num_quarantined == 0
    table.check_invariants()


def test_filling_and_pinned_blocks_are_no_victims():
    table = make_table(3)
    a, b, c, *new = keys("a", "b", "c", "x", "y", "z")
    insert(table, [a])
    insert(table, [b], ready=False)
    insert(table, [c])
    table.pin([table.slot_of[a]])
    placement = table.plan(new)
    assert placement.victims == [c]
    assert placement.keys == new[:1]
    assert placement.num_left_out == 2


def test_slots_set_aside_hold_no_block_and_come_back():
    table = make_table(4)
    a, b, c, x, y = keys("a", "b", "c", "x", "y")
    insert(table, [a, b, c])
    slots, victims = table.set_aside(3, spared={c})
    assert victims == [b, a]
    assert len(slots) == table.num_quarantined == 3
    assert table.plan([x, y]).victims == [c]
    table.check_invariants()
    table.discard([a, b], slots[:2])
    table.publish(slots[2:])
    assert table.num_free == 3
    table.check_invariants()
    assert table.set_aside(9, spared={c})[1] == []


def test_a_clear_quarantines_what_is_in_use():
    table = make_table(3)
    a, b, c = keys("a", "b", "c")
    insert(table, [a, b])
    insert(table, [c], ready=False)
    table.pin([0])
    table.clear()
    assert (table.num_free, table.num_quarantined, len(table)) == (1, 2, 0)
    table.unpin([0])
    table.publish([2])
    assert table.num_free == 3
    table.check_invariants()


@pytest.mark.parametrize("most_in_one", [0, 100])
def test_blocks_of_a_former_process_are_adopted_oldest_first(most_in_one, monkeypatch):
    monkeypatch.setattr(key_tables, "MOST_IN_ONE", most_in_one)
    table = make_table(6)
    a, b, c, d = keys("a", "b", "c", "d")
    table.adopt([5, 1], [a, b])
    table.adopt([3, 1, 9, 2], [c, d, d, a])  # a slot twice, a slot that is none, a key twice
    assert table.plan([d]).keys == []
    table.end_adoption()
    table.check_invariants()
    assert dict(table.slot_of) == {a: 2, b: 1, c: 3}
    assert list(table.policy.candidates()) == [b, c, a]
    assert list(insert(table, [d]).values()) == [0]
    assert table.num_free == 2


def test_the_end_of_an_adoption_looks_at_no_block(monkeypatch):
    table = make_table(6)
    a, b = keys("a", "b")
    table.adopt([4, 0], [a, b])
    monkeypatch.setattr(type(table.slot_of), "every_value", lambda self: pytest.fail("all blocks were looked at"))
    table.end_adoption()
    assert table.num_free == 4
    monkeypatch.undo()
    table.check_invariants()


def test_slots_of_blocks_that_were_removed_during_an_adoption_are_free():
    table = make_table(6)
    a, b, c = keys("a", "b", "c")
    table.adopt([4, 0], [a, b])
    table.remove([a])
    table.adopt([2], [c])
    table.end_adoption()
    assert table.num_free == 4
    table.check_invariants()


def test_a_store_without_blocks_has_all_slots_free():
    table = make_table(6)
    table.end_adoption()
    assert table.num_free == 6
    table.check_invariants()


def test_keys_of_another_length_are_refused_before_anything_changes():
    table = make_table()
    insert(table, keys("a"))
    with pytest.raises(KeyFormatError, match="12 allowed"):
        table.plan([make_offload_key(b"longer than eight", 0)])
    table.check_invariants()


def test_the_audit_notices_what_is_wrong():
    for spoil in (
        lambda table: table.slot_of.update({keys("a")[0]: 1}),
        lambda table: table.filling.add(3),
        lambda table: table.unpin([0]),
        lambda table: table.policy.remove(keys("a")),
    ):
        table = make_table()
        insert(table, keys("a", "b"))
        spoil(table)
        with pytest.raises(InvariantError):
            table.check_invariants()


class TableMachine(RuleBasedStateMachine):
    """Random histories; `users` is the model: who holds which slot how often."""

    def __init__(self):
        super().__init__()
        self.table = make_table(5)
        self.filling = {}
        self.users = []

    names = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6)

    @rule(names=names)
    def insert(self, names):
        placed = insert(self.table, keys(*names), ready=False)
        assert not set(placed.values()) & {slot for _, slot in self.filling.items()} & set(self.users)
        self.filling.update({slot: key for key, slot in placed.items()})

    @precondition(lambda self: self.filling)
    @rule(good=st.booleans(), data=st.data())
    def end(self, good, data):
        slot = data.draw(st.sampled_from(sorted(self.filling)))
        key = self.filling.pop(slot)
        if good:
            self.table.publish([slot])
        else:
            self.table.discard([key], [slot])

    @rule(names=names)
    def pin(self, names):
        slots = [self.table.slot_of[key] for key in keys(*names) if self.table.is_ready(key)]
        self.table.pin(slots)
        self.users += slots

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def unpin(self, data):
        slot = data.draw(st.sampled_from(sorted(self.users)))
        self.users.remove(slot)
        self.table.unpin([slot])

    @rule(names=names)
    def remove(self, names):
        self.table.remove(keys(*names))

    @rule()
    def clear(self):
        self.table.clear()

    @invariant()
    def slots_in_use_are_not_free(self):
        self.table.check_invariants()
        busy = set(self.users) | set(self.filling)
        assert busy.isdisjoint(self.table._free)
        assert self.table.num_quarantined == len(busy - set(self.table.slot_of.values()))


class LargeTableMachine(TableMachine):
    """The same over the tables of a large cache."""

    def __init__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(key_tables, "MOST_IN_ONE", 0)
        super().__init__()

    def teardown(self):
        self.patch.undo()


class TestTable(TableMachine.TestCase):
    settings = settings(max_examples=100, stateful_step_count=40)


class TestLargeTable(LargeTableMachine.TestCase):
    settings = settings(max_examples=100, stateful_step_count=40)
