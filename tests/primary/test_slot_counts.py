"""Slots are counted as a multiset counts them, in few calls or in many."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kvtier.primary.slot_counts import SlotCounts

SOME_SLOTS = st.lists(st.integers(0, 7), max_size=6)


@given(st.lists(st.tuples(st.booleans(), SOME_SLOTS)))
def test_slots_are_counted_as_a_counter_counts_them(steps):
    counts, model = SlotCounts(), Counter()
    for adds, slots in steps:
        if adds:
            counts.add(slots)
            model.update(slots)
        else:
            slots = list((Counter(slots) & model).elements())
            counts.drop(slots)
            model.subtract(slots)
        assert {slot: counts.of(slot) for slot in range(8)} == {slot: model[slot] for slot in range(8)}
        assert counts.slots == set(+model)
        assert len(counts) == len(+model)
        assert not counts.num_excess


def test_a_slot_that_is_dropped_too_often_is_remembered():
    counts = SlotCounts()
    counts.add([1, 2, 2])
    counts.drop([2, 2, 1, 1])
    assert counts.num_excess == 1
    counts.drop([5, 6])
    assert counts.num_excess == 3
