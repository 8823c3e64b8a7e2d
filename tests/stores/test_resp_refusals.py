"""What a real server refuses to keep or to tell, for ever or for this once, and what it says before it is lost."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
from proxy import Faults, Proxy
from test_resp_store import open_store
from valkey_server import ValkeyServer

from kvtier.errors import StoreError, StoreUnavailableError
from kvtier.stores.resp import store as store_module
from kvtier.testing.patience import PATIENCE_SECONDS, wait_for
from kvtier.testing.stores import StoreSuite, make_key
from kvtier.types import FailureCause

SUITE = StoreSuite()
KEYS = [make_key(number) for number in range(4)]
TTL = 1000
USER = "+get", "+set", "+exists", "+unlink", "+ping"


@pytest.fixture
def server():
    server = ValkeyServer(busy_reply_threshold="1").start()
    yield server
    server.close()


@pytest.fixture
def opened(monkeypatch):
    with contextlib.ExitStack() as stores:
        monkeypatch.setenv("KVTIER_TEST_PASSWORD", "letmein")

        def open_one(server, **options):
            store = open_store(SUITE.make_context(), server.url, **options)
            stores.callback(store.close)
            return store

        yield open_one


def write(store, keys=KEYS[:3]):
    assert all(store.write(keys, SUITE.buffers(len(keys))))


@contextlib.contextmanager
def busy(server):
    """A server that runs a script, and refuses everything else."""

    def run():
        with contextlib.suppress(Exception):  # it is killed
            server.command("EVAL", "while true do end", 0)

    script = threading.Thread(target=run)
    script.start()
    try:
        wait_for(lambda: _is_busy(server), "the script runs")
        yield
    finally:
        server.command("SCRIPT", "KILL")
        script.join(PATIENCE_SECONDS)


def _is_busy(server):
    import redis

    try:
        server.command("GET", "anything")
    except redis.RedisError as error:
        return "script" in str(error)
    return False


def remaining(server, store, key):
    return server.command("PTTL", store.name(key))


def test_a_replica_says_what_it_has_and_keeps_it_once_it_may(server, opened):
    store = opened(server, ttl=TTL)
    write(store)
    server.command("REPLICAOF", "127.0.0.1", 1)
    server.command("CONFIG", "SET", "replica-serve-stale-data", "yes")
    assert store.keep(KEYS, 60.0) == [True, True, True, False]
    server.command("REPLICAOF", "NO", "ONE")
    for key in KEYS[:3]:
        server.command("PEXPIRE", store.name(key), TTL * 100)
    assert store.keep(KEYS, 60.0) == [True, True, True, False]
    assert all(remaining(server, store, key) > TTL * 500 for key in KEYS[:3])


@pytest.mark.parametrize("options", [{}, {"ttl": TTL}])
def test_a_busy_server_cannot_say_and_keeps_blocks_later(server, opened, options):
    store = opened(server, **options)
    write(store)
    with busy(server), pytest.raises(StoreError, match="BUSY"):
        store.keep(KEYS, 60.0)
    assert store.keep(KEYS, 60.0) == [True, True, True, False]


def test_a_full_server_keeps_blocks(server, opened):
    store = opened(server, ttl=TTL)
    write(store)
    server.configure("maxmemory", 1)
    assert not any(store.write(KEYS[3:], SUITE.buffers(1)))
    assert store.keep(KEYS, 60.0) == [True, True, True, False]


@pytest.mark.parametrize("options", [{}, {"ttl": TTL}])
def test_a_user_who_may_not_is_refused_once(server, opened, options):
    server.command("ACL", "SETUSER", "kv", "on", ">letmein", "~kvtier:*", "+info", *USER)
    store = opened(server, username="kv", password_env="KVTIER_TEST_PASSWORD", **options)
    write(store)
    assert [store.keep(KEYS, 60.0) for _ in range(3)] == [None] * 3
    (entry,) = server.command("ACL", "LOG")
    assert int(entry[b"count"]) == len(KEYS)


@pytest.mark.parametrize("options", [{}, {"ttl": TTL}])
def test_a_server_without_the_command_is_asked_once(opened, options):
    server = ValkeyServer()
    without = server.folder / "without"
    without.write_text('rename-command TOUCH ""\nrename-command PEXPIRE ""\n')
    server.config["include"] = str(without)
    server.start()
    client = server.client()
    try:
        store = opened(server, **options)
        write(store)
        assert store.keep(KEYS, 60.0) is None
        refusals = client.info()["total_error_replies"]
        assert store.keep(KEYS, 60.0) is None
        assert client.info()["total_error_replies"] == refusals
    finally:
        client.close()
        server.close()


def test_a_server_that_was_busy_says_later_how_full_it_is(server, opened, monkeypatch):
    monkeypatch.setattr(store_module, "_SECONDS_BETWEEN_USAGES", 0.0)
    store = opened(server)
    with busy(server):
        assert not any(store.write(KEYS, SUITE.buffers(4)))
        assert store.usage() is None
    write(store)
    assert store.usage().bytes > 0


def test_a_user_who_may_not_ask_how_full_it_is_asks_once(server, opened, monkeypatch):
    monkeypatch.setattr(store_module, "_SECONDS_BETWEEN_USAGES", 0.0)
    server.command("ACL", "SETUSER", "kv", "on", ">letmein", "~kvtier:*", *USER)
    store = opened(server, username="kv", password_env="KVTIER_TEST_PASSWORD")
    for _ in range(3):
        write(store)
    (entry,) = server.command("ACL", "LOG")
    assert int(entry[b"count"]) == 1
    assert store.usage() is None


def test_a_node_that_refuses_costs_the_others_no_keeping(valkey_cluster, opened):
    without, *others = valkey_cluster.nodes
    for node in valkey_cluster.nodes:
        may = USER if node is without else (*USER, "+touch")
        node.command("ACL", "SETUSER", "kv", "on", ">letmein", "~kvtier:*", "+cluster", "+info", *may)
    without.command("ACL", "LOG", "RESET")
    store = opened(without, cluster=True, username="kv", password_env="KVTIER_TEST_PASSWORD")
    keys = [make_key(number) for number in range(60)]
    write(store, keys)
    before = [num_touches(node) for node in others]
    for _ in range(2):
        assert store.keep([*keys, make_key(99)], 60.0) == [True] * 60 + [False]
    for node, start in zip(others, before, strict=True):
        assert num_touches(node) - start >= 2 * node.command("DBSIZE") > 0
    (entry,) = without.command("ACL", "LOG")
    assert int(entry[b"count"]) <= without.command("DBSIZE") + 1  # once per key
    for node in valkey_cluster.nodes:
        node.command("ACL", "DELUSER", "kv")


def test_a_node_that_refuses_to_say_what_it_has_has_lost_nothing(valkey_cluster, opened):
    silent = valkey_cluster.nodes[0]
    for node in valkey_cluster.nodes:
        node.command("ACL", "SETUSER", "kv", "on", ">letmein", "~kvtier:*", "+cluster", "+info", *USER)
    store = opened(silent, cluster=True, username="kv", password_env="KVTIER_TEST_PASSWORD")
    keys = [make_key(number) for number in range(60)]
    write(store, keys)
    silent.command("ACL", "SETUSER", "kv", "-exists")
    assert 0 < store.contains(keys).count(True) < 60
    with pytest.raises(StoreError, match="NOPERM"):
        store.ask_held(keys)
    silent.command("ACL", "SETUSER", "kv", "+exists")
    assert store.ask_held([*keys, make_key(99)]) == [True] * 60 + [False]
    for node in valkey_cluster.nodes:
        node.command("ACL", "DELUSER", "kv")


def num_touches(node):
    client = node.client()
    try:
        return client.info("commandstats").get("cmdstat_touch", {"calls": 0})["calls"]
    finally:
        client.close()


@pytest.mark.parametrize("is_load", [True, False])
def test_a_server_that_is_lost_in_mid_transfer_costs_no_moved_block(valkey, opened, monkeypatch, is_load):
    monkeypatch.setattr(store_module.RespStore, "_ask_usage", lambda self: None)  # its reply would be cut instead
    proxy = Proxy(valkey.address)
    try:
        # In another database, so that a new connection begins with a question: the server is lost when that fails.
        store = opened(SimpleNamespace(url=f"{proxy.url}/1"), connect_timeout=PATIENCE_SECONDS)
        write(store, KEYS)
        said = len(b"+OK\r\n+PONG\r\n") + len(KEYS) * len(b"+OK\r\n")
        reply_bytes = SUITE.block_bytes if is_load else len(b"+OK\r\n")
        proxy.faults = Faults(cut_after=said + reply_bytes * 5 // 2, refuse=True)
        moved = (store.read_into if is_load else store.write)(KEYS, SUITE.buffers(4))
        assert moved == [True, True, False, False]
        assert store._failures.take() == {FailureCause.UNREACHABLE: 2}
        proxy.heal()
        with pytest.raises(StoreUnavailableError, match=str(proxy.address[1])):
            store.contains(KEYS)
    finally:
        proxy.close()
