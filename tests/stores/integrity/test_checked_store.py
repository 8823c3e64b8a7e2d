import pytest

from kvtier.errors import StoreError, StoreUnavailableError
from kvtier.stores.integrity.checked_store import CheckedStore
from kvtier.stores.memory import MemoryStore
from kvtier.testing.faulty_stores import Fault, FaultPlan, FaultyBlockStore, Injection
from kvtier.testing.stores import StoreSuite, make_key
from kvtier.types import FailureCause

SUITE = StoreSuite()
PAYLOADS = [SUITE.payload(number) for number in range(8)]
KEYS = [make_key(number) for number in range(8)]


@pytest.fixture
def context():
    return SUITE.make_context()


@pytest.fixture
def plan():
    return FaultPlan()


@pytest.fixture
def store(context, plan):
    store = CheckedStore(FaultyBlockStore(MemoryStore(1 << 20), plan), context)
    assert store.write(KEYS, [memoryview(payload) for payload in PAYLOADS]) == [True] * 8
    return store


def test_open_seals_any_store_class(context):
    store = CheckedStore.open({"store": MemoryStore, "capacity": 1 << 20}, context)
    assert store.write(KEYS[:1], [memoryview(PAYLOADS[0])]) == [True]
    assert len(store.inner.snapshot()[KEYS[0]]) == 128 + context.block_bytes


@pytest.mark.parametrize("fault", [Fault.RAISE, Fault.TOO_FEW_ANSWERS])
def test_whatever_the_inner_store_does_leaves_as_a_store_error(store, plan, context, fault):
    plan.add(fault)
    buffers = SUITE.buffers(8)
    for call in (lambda: store.write(KEYS, buffers), lambda: store.read_into(KEYS, buffers)):
        with pytest.raises(StoreError, match="FaultyBlockStore"):
            call()
        assert context.failures.take() == {FailureCause.IO_ERROR: 8}
    with pytest.raises(StoreError):
        store.contains(KEYS)
    assert all(bytes(buffer) == bytes([0xA5]) * context.block_bytes for buffer in buffers)


def test_deleting_and_closing_raise_store_errors_only(store, plan):
    plan.add(Injection(Fault.RAISE, ["delete", "close"]))
    with pytest.raises(StoreError, match="RuntimeError: injected into delete"):
        store.delete(KEYS)
    with pytest.raises(StoreError, match="RuntimeError: injected into close"):
        store.close()


def test_causes_are_told_apart(store, context):
    inner = store.inner.inner
    raw = inner.snapshot()
    inner.write([KEYS[0]], [memoryview(raw[KEYS[0]][:-1] + b"?")])
    inner.write([KEYS[1]], [memoryview(raw[KEYS[2]])])
    inner.write([KEYS[3]], [memoryview(raw[KEYS[3]][:4] + b"\x7f" + raw[KEYS[3]][5:])])
    inner.write([KEYS[4]], [memoryview(raw[KEYS[4]][:50])])
    inner.delete([KEYS[5]])
    buffers = SUITE.buffers(8)
    assert store.read_into(KEYS, buffers) == [False, False, True, False, False, False, True, True]
    assert context.failures.take() == {
        FailureCause.CORRUPT: 2,
        FailureCause.FOREIGN: 1,
        FailureCause.OLD_FORMAT: 1,
        FailureCause.ABSENT: 1,
    }
    assert set(inner.snapshot()) == {KEYS[2], KEYS[6], KEYS[7]}


@pytest.mark.parametrize("call", ["contains", "delete"])
def test_a_failed_clean_up_costs_no_good_block(store, plan, context, caplog, call):
    inner = store.inner.inner
    inner.write([KEYS[0]], [memoryview(inner.snapshot()[KEYS[1]])])
    inner.delete([KEYS[2]])
    plan.add(Injection(Fault.RAISE, [call]))
    buffers = SUITE.buffers(8)
    assert store.read_into(KEYS, buffers) == [False, True, False, True, True, True, True, True]
    assert context.failures.take() == {FailureCause.FOREIGN: 1, FailureCause.ABSENT: 1}
    store.read_into(KEYS, buffers)
    assert [record.message for record in caplog.records if call in record.message] == [caplog.records[0].message]


class Leaving(MemoryStore):
    """Must be opened anew once it was asked to delete."""

    def delete(self, keys):
        raise StoreUnavailableError("gone")


@pytest.mark.parametrize("scratch_bytes", [1 << 20, 1])
def test_a_store_that_is_lost_in_a_clean_up_costs_no_good_block_and_is_opened_anew_after_it(context, scratch_bytes):
    inner = Leaving(1 << 20)
    store = CheckedStore(inner, context, scratch_bytes=scratch_bytes)
    assert all(store.write(KEYS, [memoryview(payload) for payload in PAYLOADS]))
    inner.write([KEYS[0]], [memoryview(inner.snapshot()[KEYS[1]])])
    buffers = SUITE.buffers(8)
    assert store.read_into(KEYS, buffers) == [False] + [True] * 7
    assert [bytes(buffer) for buffer in buffers[1:]] == PAYLOADS[1:]
    assert context.failures.take() == {FailureCause.FOREIGN: 1}
    for call in (
        lambda: store.contains(KEYS),
        lambda: store.write(KEYS, buffers),
        lambda: store.read_into(KEYS, buffers),
        lambda: store.delete(KEYS),
        lambda: store.keep(KEYS, 1.0),
        lambda: store.list_keys(b"", 1),
    ):
        with pytest.raises(StoreUnavailableError, match="gone"):
            call()
    store.close()
    assert not inner.snapshot()


@pytest.mark.parametrize("scratch_bytes", [1, 3 * (8192 + 128)])
def test_a_batch_above_the_private_memory_goes_in_parts(store, context, scratch_bytes):
    store = CheckedStore(store.inner, context, scratch_bytes=scratch_bytes)
    buffers = SUITE.buffers(8)
    order = [5, 0, 7, 1, 2, 6, 3, 4]
    assert store.read_into([KEYS[number] for number in order], buffers) == [True] * 8
    assert [bytes(buffer) for buffer in buffers] == [PAYLOADS[number] for number in order]


def test_keys_without_buffers_are_an_error(store):
    with pytest.raises(StoreError, match="8 keys and 7 buffers"):
        store.read_into(KEYS, SUITE.buffers(7))
