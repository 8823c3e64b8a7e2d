"""Free slots are taken in the order of a list, whatever of them is an array."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.primary import free_slots
from kvtier.primary.free_slots import FreeSlots


@given(st.integers(0, 40), st.integers(1, 9), st.lists(st.one_of(st.integers(0, 12), st.lists(st.integers(50, 60)))))
def test_free_slots_are_a_stack(num_slots, moved, steps):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(free_slots, "_MOVED", moved)
        free, model = FreeSlots.up_to(num_slots), list(range(num_slots))[::-1]
        for step in steps:
            if isinstance(step, list):
                free.push(step)
                model += step
            else:
                first = max(0, len(model) - step)
                assert free.take(step) == model[first:]
                del model[first:]
            assert list(free) == model
            assert len(free) == len(model)
