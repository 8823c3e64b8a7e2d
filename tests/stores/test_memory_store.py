import pytest

from kvtier.abc import StoreContext
from kvtier.errors import ConfigError
from kvtier.namespace import Namespace
from kvtier.stores.integrity.checked_store import CheckedStore
from kvtier.stores.memory import MemoryStore
from kvtier.testing.stores import StoreSuite, make_key


class TestSealedMemoryStore(StoreSuite):
    def open_store(self, medium, context):
        return CheckedStore(MemoryStore.open({"capacity": 1 << 20}, context), context)

    def plant(self, store, key, raw):
        store.inner.write([key], [memoryview(raw)])

    def peek(self, store, key):
        return store.inner.snapshot().get(key)


def write(store, number, value):
    (result,) = store.write([make_key(number)], [memoryview(value)])
    return result


def test_capacity_counts_keys_and_values_and_the_oldest_used_gives_way():
    store = MemoryStore(3 * (36 + 100))
    for number in range(3):
        assert write(store, number, bytes(100))
    assert store.read_into([make_key(0)], [memoryview(bytearray(100))]) == [True]
    assert write(store, 3, bytes(100))
    assert store.contains([make_key(number) for number in range(4)]) == [True, False, True, True]
    assert store.used_bytes == store.capacity == sum(len(k) + len(v) for k, v in store.snapshot().items())


def test_a_value_above_the_capacity_is_refused_and_replaces_nothing_else():
    store = MemoryStore(200)
    assert write(store, 1, bytes(100))
    assert not write(store, 2, bytes(200))
    assert store.contains([make_key(1), make_key(2)]) == [True, False]
    assert not write(store, 1, bytes(200)), "the former value must not survive a failed overwrite"
    assert store.contains([make_key(1)]) == [False]


@pytest.mark.parametrize("capacity", [0, -5])
def test_no_capacity_is_an_error_that_names_it(capacity):
    with pytest.raises(ConfigError, match="capacity"):
        MemoryStore.open({"capacity": capacity}, StoreContext(Namespace(), 4096))
