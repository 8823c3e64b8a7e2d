"""The shipped suite on the store, over a real pool; and what the pool's faults cost."""

import contextlib
import os
import signal
import uuid

import pytest

from kvtier.abc import StoreContext
from kvtier.errors import ConfigError, StoreUnavailableError
from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.primary import memory_limit
from kvtier.primary.memory_limit import MemoryLimit
from kvtier.stores.integrity import open_sealer
from kvtier.stores.mooncake import lender
from kvtier.stores.mooncake.client import join
from kvtier.stores.mooncake.lender import ask_lender
from kvtier.stores.mooncake.options import MooncakeOptions
from kvtier.stores.mooncake.store import MooncakeStore
from kvtier.testing.patience import PATIENCE_SECONDS, wait_for
from kvtier.testing.stores import StoreSuite, make_key, make_payload
from kvtier.types import FailureCause

BLOCK = 64 << 10


class TestMooncakeStore(StoreSuite):
    keeps_failed_buffers = False

    @pytest.fixture
    def secret(self):
        return {}

    @pytest.fixture(autouse=True)
    def _pool(self, mooncake_pool, mooncake_values, secret):
        self.values = mooncake_values
        self.options = {"master": mooncake_pool.address, "prefix": uuid.uuid4().hex, **secret}
        super().setup_method()
        yield
        super().teardown_method()

    def setup_method(self, method=None):
        """The pool comes as a fixture, after this."""

    def teardown_method(self, method=None):
        pass

    def open_store(self, medium, context):
        return MooncakeStore.open(self.options, context)

    def plant(self, store, key, raw):
        self.values.plant(store.name(key), raw)

    def peek(self, store, key):
        return self.values.peek(store.name(key))


class TestEncrypted(TestMooncakeStore):
    @pytest.fixture
    def secret(self, tmp_path):
        (tmp_path / "secret").write_text("s" * 32)
        return {"secret_file": str(tmp_path / "secret"), "encrypt": True}


@pytest.fixture
def open_store():
    stores = []

    def make(pool, **options):
        context = StoreContext(Namespace({"model": "faults"}), BLOCK)
        stores.append(MooncakeStore.open({"master": pool.address, "prefix": uuid.uuid4().hex, **options}, context))
        return stores[-1], context

    yield make
    for store in stores:
        with contextlib.suppress(StoreUnavailableError):
            store.close()


def write(store, numbers):
    payloads = [memoryview(make_payload(number, BLOCK)) for number in numbers]
    return store.write([make_key(number) for number in numbers], payloads)


def read(store, numbers):
    buffers = [memoryview(bytearray(BLOCK)) for _ in numbers]
    results = store.read_into([make_key(number) for number in numbers], buffers)
    for number, result, buffer in zip(numbers, results, buffers, strict=True):
        assert not result or buffer == make_payload(number, BLOCK)
    return results


def test_a_master_that_is_not_there_is_said_at_once(open_store, make_pool):
    pool = make_pool(lent_bytes=0)
    pool.kill_master()
    with pytest.raises(StoreUnavailableError, match=rf"mooncake_master at {pool.address}: .*refused"):
        open_store(pool)


def test_a_pool_without_memory_stores_nothing(open_store, make_pool):
    store, context = open_store(make_pool(lent_bytes=0))
    assert write(store, range(2)) == [False, False]
    assert context.failures.take() == {FailureCause.NO_SPACE: 2}
    assert read(store, range(2)) == [False, False]


def test_a_full_pool_evicts(open_store, make_pool):
    pool = make_pool(lent_bytes=16 << 20, default_kv_lease_ttl=10, eviction_high_watermark_ratio=0.8)
    store, _ = open_store(pool)
    number = 0

    def last_ones_are_stored_and_first_ones_gone():
        nonlocal number
        number += 16
        stored = write(store, range(number - 16, number))
        return all(stored) and number * BLOCK > 2 * pool.lent_bytes and not store.contains([make_key(0)])[0]

    wait_for(last_ones_are_stored_and_first_ones_gone, "the pool has evicted", PATIENCE_SECONDS)
    assert sum(store.contains([make_key(each) for each in range(number)])) * BLOCK <= pool.lent_bytes
    # A lease of 10 ms may end before a busy machine has read.
    wait_for(lambda: any(read(store, range(number - 16, number))), "a block is read", PATIENCE_SECONDS)


@pytest.mark.parametrize("encrypts", [False, True])
def test_a_call_may_have_more_blocks_than_are_sealed_at_once(open_store, mooncake_pool, tmp_path, encrypts):
    (tmp_path / "secret").write_text("s" * 32)
    secret = {"secret_file": str(tmp_path / "secret"), "encrypt": True} if encrypts else {}
    store, _ = open_store(mooncake_pool, **secret)
    assert all(write(store, range(11)))
    assert all(read(store, range(11)))


class GivenAway:
    """Mooncake's client, whose first read of a value finds another key's: its own was stored anew meanwhile, and the
    pool has given the old place away.
    """

    def __init__(self, client, other):
        self._client, self._other, self.num_reads = client, other, 0

    def __getattr__(self, name):
        return getattr(self._client, name)

    def batch_get_into(self, names, *places):
        self.num_reads += 1
        return self._client.batch_get_into([self._other] if self.num_reads == 1 else names, *places)


def test_a_block_that_another_engine_stores_anew_meanwhile_is_read_once_more(open_store, mooncake_pool):
    options = MooncakeOptions(master=mooncake_pool.address, prefix=uuid.uuid4().hex)
    whole, context = open_store(mooncake_pool, prefix=options.prefix)
    assert all(write(whole, [1, 2]))
    _, sealer = open_sealer({}, context.namespace)
    client = GivenAway(join(options), whole.name(make_key(2)))
    store = MooncakeStore(client, options, sealer, context)
    try:
        assert read(store, [1]) == [True]
        assert client.num_reads == 2
        assert not context.failures.take()
    finally:
        store.close()


def test_a_lost_host_costs_its_blocks_and_nothing_else(open_store, make_pool):
    pool = make_pool()
    store, context = open_store(pool)
    assert all(write(store, range(4)))
    pool.kill_lender()
    assert read(store, range(4)) == [False] * 4
    assert sum(context.failures.take().values()) == 4
    pool.start()
    wait_for(lambda: all(write(store, range(4, 8))), "the pool has memory again", PATIENCE_SECONDS)
    assert all(read(store, range(4, 8)))


def test_a_lost_master_makes_the_store_unavailable_until_it_is_back(open_store, make_pool):
    pool = make_pool()
    store, _ = open_store(pool)
    assert all(write(store, range(4)))
    pool.kill_master()
    for call in (lambda: read(store, range(4)), lambda: write(store, range(4)), lambda: store.contains([make_key(1)])):
        with pytest.raises(StoreUnavailableError, match="mooncake_master does not answer"):
            call()
    pool.kill_lender()
    pool.start()
    again, _ = open_store(pool)
    wait_for(lambda: all(write(again, range(4))), "the pool has memory again", PATIENCE_SECONDS)
    assert all(read(again, range(4)))


# -- memory that this host lends -------------------------------------------------------------------------


@pytest.fixture
def ask(make_pool):
    """Return a function that asks for a lender that goes on for a moment only."""
    pool = make_pool(lent_bytes=0)
    leases = []

    def make(grace_seconds=0.5):
        leases.append(ask_lender(make.options, grace_seconds))
        return leases[-1]

    make.pool = pool
    make.options = MooncakeOptions(master=pool.address, segment=32 << 20)
    yield make
    for lease in leases:
        lease.close()
    wait_for(lambda: not pool.kvtier_lenders(), "all lenders have ended", PATIENCE_SECONDS)


def test_a_host_lends_memory_once_for_all_engines_and_as_long_as_one_needs_it(ask, open_store):
    first, second = ask(), ask()
    assert len(ask.pool.kvtier_lenders()) == 1
    store, _ = open_store(ask.pool)
    assert all(write(store, range(4)))
    first.close()
    assert second.is_alive
    assert all(read(store, range(4)))
    second.close()
    wait_for(lambda: not ask.pool.kvtier_lenders(), "the lender has ended", PATIENCE_SECONDS)
    assert not any(read(store, range(4)))


def test_what_is_lent_outlives_the_process_that_asked_for_it(ask, open_store):
    ask(grace_seconds=PATIENCE_SECONDS).close()
    store, _ = open_store(ask.pool)
    assert all(write(store, range(4)))
    (process,) = ask.pool.kvtier_lenders()
    assert ask(grace_seconds=PATIENCE_SECONDS).is_alive
    assert ask.pool.kvtier_lenders() == [process]
    assert all(read(store, range(4)))
    os.kill(process, signal.SIGKILL)


def test_a_killed_lender_makes_the_store_unavailable_and_the_next_one_starts_another(ask, open_store):
    store, _ = open_store(ask.pool, segment=32 << 20, prefix="same")
    assert all(write(store, range(4)))
    (process,) = ask.pool.kvtier_lenders()
    os.kill(process, signal.SIGKILL)
    wait_for(lambda: not store._lease.is_alive, "the store sees it", PATIENCE_SECONDS)
    with pytest.raises(StoreUnavailableError, match="the process that lends memory has ended"):
        write(store, range(4))
    again, _ = open_store(ask.pool, segment=32 << 20, prefix="same")
    wait_for(lambda: all(write(again, range(4))), "the pool has memory again", PATIENCE_SECONDS)
    for process in ask.pool.kvtier_lenders():
        os.kill(process, signal.SIGKILL)


def test_a_process_that_no_longer_waits_for_the_lender_does_not_end_it(ask, monkeypatch):
    monkeypatch.setattr(lender, "START_SECONDS", 0.5)
    os.kill(ask.pool.master.pid, signal.SIGSTOP)

    def has_waited_in_vain():
        with pytest.raises(StoreUnavailableError) as caught:
            ask(PATIENCE_SECONDS)
        return "no memory is lent" in str(caught.value)

    wait_for(has_waited_in_vain, "the lender has the connection", PATIENCE_SECONDS)
    monkeypatch.undo()
    wait_for(lambda: len(ask.pool.kvtier_lenders()) == 1, "only one lender goes on", PATIENCE_SECONDS)
    (process,) = ask.pool.kvtier_lenders()
    os.kill(ask.pool.master.pid, signal.SIGCONT)
    assert ask(PATIENCE_SECONDS).is_alive
    assert ask.pool.kvtier_lenders() == [process]
    os.kill(process, signal.SIGKILL)


def test_the_working_directory_shadows_no_module_of_the_lender(ask, monkeypatch, tmp_path):
    (tmp_path / "selectors.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    assert ask().is_alive


def test_a_forked_child_keeps_no_lender_alive(ask):
    lease = ask()
    parent, child = os.pipe()
    if not (pid := os.fork()):
        os.close(child)
        os.read(parent, 1)  # until the parent closes the pipe
        os._exit(0)
    os.close(parent)
    try:
        assert lease.is_alive
        lease.close()
        wait_for(lambda: not ask.pool.kvtier_lenders(), "the lender has ended", PATIENCE_SECONDS)
    finally:
        os.close(child)
        os.waitpid(pid, 0)


def test_memory_that_is_lent_already_is_not_asked_for_again(ask, monkeypatch):
    """Else an engine could not restart while its lender has all memory that was free."""
    monkeypatch.setattr(memory_limit, "memory_limits", lambda: [MemoryLimit("the test's", 1 << 20)])
    with pytest.raises(ConfigError, match=r"segment=.*the test's"):
        ask.options.check(BLOCK, {})
    ask()
    ask.options.check(BLOCK, {})
    with pytest.raises(ConfigError, match=r"segment=.*the test's"):
        MooncakeOptions(master=ask.pool.address, segment=64 << 20).check(BLOCK, {})


def test_memory_that_cannot_be_lent_is_said(ask):
    ask.pool.kill_master()
    with pytest.raises(StoreUnavailableError, match="no memory is lent: mooncake_master at"):
        ask()


# -- options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "master=None: required"),
        ({"master": "host"}, "master='host': \"HOST:PORT\""),
        ({"master": "host:0"}, "HOST:PORT"),
        ({"master": "host:99999"}, "HOST:PORT"),
        ({"master": "h:1", "segment": "1MiB"}, "segment=1048576: 0, or at least"),
        ({"master": "h:1", "segment": "999TiB"}, "available"),
        ({"master": "h:1", "protocol": "udp"}, "protocol='udp'"),
        ({"master": "h:1", "devices": "mlx5_0"}, "only with protocol"),
        ({"master": "h:1", "prefix": "a:b"}, "prefix='a:b'"),
        ({"master": "h:1", "replicas": 0}, "replicas=0"),
        ({"master": "h:1", "soft_pin": 0}, "soft_pin=0"),
        ({"master": "h:1", "ttl": 5}, "ttl"),
    ],
)
def test_a_wrong_option_is_named(options, said):
    with pytest.raises(ConfigError) as caught:
        MooncakeOptions.read(options).check(BLOCK, {})
    assert said in str(caught.value)


def test_key_names_are_plain(open_store, mooncake_pool):
    store, _ = open_store(mooncake_pool, prefix="mine")
    name = store.name(OffloadKey(bytes(range(36))))
    assert name.startswith("mine:")
    assert name.isascii()
