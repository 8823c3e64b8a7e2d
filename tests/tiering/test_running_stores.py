"""The stores that a request has under way, against a plain list of them."""

from hypothesis import given
from hypothesis import strategies as st

from kvtier.testing.policies import keys_of
from kvtier.tiering.running_copies import RunningStores

KEYS = keys_of(*range(12))
SOME = st.lists(st.sampled_from(KEYS), max_size=8)


@given(steps=st.lists(st.tuples(SOME.map(dict.fromkeys).map(list), SOME, st.booleans()), max_size=8))
def test_each_store_ends_once_and_the_older_one_of_a_key_first(steps):
    stores, model, slot = RunningStores(), [], 0
    for begun, named, as_set in steps:
        slots = list(range(slot, slot + len(begun)))
        slot += len(begun)
        stores.begin(begun.copy(), slots.copy())
        model += zip(begun, slots, strict=True)
        ended = {}
        for entry in model:
            if entry[0] in named:
                ended.setdefault(*entry)
        keys, slots = stores.end(set(named) if as_set else named)
        assert list(zip(keys, slots, strict=True)) == list(ended.items())
        model = [entry for entry in model if ended.get(entry[0]) != entry[1]]
        assert list(stores.entries()) == model
        assert bool(stores) == bool(model)
    stores.clear()
    assert not stores
