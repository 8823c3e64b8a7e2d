"""What all tests share: their patience, and servers, each started when the first test asks for it."""

import os

import pytest
from hypothesis import HealthCheck, settings
from object_fixtures import (  # noqa: F401 - found by their names
    _azurite,
    _moto,
    _swift,
    azure,
    moto_s3,
    swift_s3,
)
from requirements import need_root
from server_fixtures import (  # noqa: F401 - found by their names
    _mooncake_pool,
    _valkey,
    _valkey_cluster,
    make_pool,
    mooncake_pool,
    mooncake_values,
    valkey,
    valkey_cluster,
)

from kvtier.testing.patience import TEST_SECONDS

# How long an example takes says how busy the machine is, nothing about kvtier.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


# Threads of OpenMP, as torch has them, wait for one another by computing: beside other processes, most of their time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SERVERS = {"_azurite", "_mooncake_pool", "_moto", "_swift", "_valkey", "_valkey_cluster"}
"""The fixtures that start a server."""


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items):
    for item in items:
        if not SERVERS.isdisjoint(item.fixturenames):
            item.add_marker("servers")


def pytest_runtest_setup(item):
    if item.get_closest_marker("root"):
        need_root()


@pytest.hookimpl(tryfirst=True)  # before pytest-timeout reads its option
def pytest_configure(config):
    if config.option.timeout is None:
        config.option.timeout = TEST_SECONDS
