"""A second connection of a call that cannot be had, or is of no use, costs no block."""

import contextlib
import socket

import pytest
from proxy import Faults, Proxy
from test_resp_store import open_store
from valkey_server import ValkeyServer

from kvtier.stores.resp.connections import Server
from kvtier.testing.patience import PATIENCE_SECONDS
from kvtier.testing.stores import StoreSuite, make_key


class LargeBlocks(StoreSuite):
    """Blocks so large that each is a batch: a call of several goes over two connections if it can."""

    block_bytes = 300_000


SUITE = LargeBlocks()
KEYS = [make_key(number) for number in range(6)]


@pytest.fixture
def server():
    server = ValkeyServer(requirepass="letmein").start()
    yield server
    server.close()


@pytest.fixture
def opened(tmp_path):
    """Return a store, and the file with its password."""
    place = tmp_path / "password"
    place.write_text("letmein")
    with contextlib.ExitStack() as stores:

        def open_one(url):
            store = open_store(SUITE.make_context(), url, password_file=str(place), timeout=PATIENCE_SECONDS)
            stores.callback(store.close)
            return store, place

        yield open_one


def move(store):
    """Store blocks and load them, some times."""
    for _ in range(3):
        payloads = [memoryview(SUITE.payload(number)) for number in range(len(KEYS))]
        assert all(store.write(KEYS, payloads))
        buffers = SUITE.buffers(len(KEYS))
        assert all(store.read_into(KEYS, buffers))
        assert buffers == payloads


def test_the_server_has_no_place_for_it(server, opened):
    store, _ = opened(server.url)
    with server.client(password="letmein") as administrator:
        administrator.config_set("maxclients", 2)
        move(store)
        assert administrator.info()["rejected_connections"] == 1


def test_a_proxy_accepts_it_and_never_serves_it(server, opened):
    proxy = Proxy(server.address)
    try:
        store, _ = opened(proxy.url)
        proxy.faults = Faults(most_served=1)
        move(store)
        assert proxy.num_connections == 2
    finally:
        proxy.close()


def test_there_is_no_password_for_it(server, opened):
    store, place = opened(server.url)
    away = place.with_name("away")
    place.rename(away)
    move(store)
    away.rename(place)
    move(store)


def test_it_breaks_each_time(server, opened, monkeypatch):
    take = Server._take

    def take_and_break(self, most):
        connections = take(self, most)
        for connection in connections[1:]:
            connection.connected.shutdown(socket.SHUT_RDWR)
        return connections

    monkeypatch.setattr(Server, "_take", take_and_break)
    move(opened(server.url)[0])
