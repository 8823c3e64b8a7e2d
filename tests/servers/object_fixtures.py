"""Session fixtures: real servers of objects, an empty prefix for each test, credentials in the environment."""

import itertools

import pytest
from requirements import lacking

BUCKET = "kvtier"
_numbers = itertools.count(1)


class S3Place:
    """A prefix of its own on a server: options of the tier, without a capacity."""

    def __init__(self, server):
        self.server = server
        self.prefix = f"test-{next(_numbers)}"
        self.url = f"s3://{BUCKET}/{self.prefix}"
        self.options = {
            "url": self.url,
            "endpoint": server.endpoint,
            "region": "us-east-1",
            "allow_http": True,
            "path_style": True,
        }


def _running(server):
    """Yield the server, started, with its bucket; end it after the session."""
    try:
        try:
            server.start().make_bucket(BUCKET)
        except (AssertionError, OSError) as error:
            lacking(f"{type(server).__name__} does not start ({error})", "make servers")
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def _swift():
    pytest.importorskip("swift", reason="swift, from PyPI, is not installed")
    from swift_server import SwiftServer

    yield from _running(SwiftServer())


@pytest.fixture
def swift_s3(_swift, monkeypatch):
    """OpenStack Swift's S3, which a test neither stops nor configures."""
    from swift_server import ACCESS_KEY, SECRET_KEY

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    return S3Place(_swift)


@pytest.fixture(scope="session")
def _moto():
    pytest.importorskip("moto", reason="moto, from PyPI, is not installed")
    from moto_server import MotoServer

    yield from _running(MotoServer())


@pytest.fixture
def moto_s3(_moto, monkeypatch):
    """moto's S3, which a test neither stops nor configures."""
    from moto_server import ACCESS_KEY, SECRET_KEY

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    return S3Place(_moto)


class AzurePlace:
    """A prefix of its own in Azurite: options of the tier, without a capacity."""

    def __init__(self, server):
        self.options = {
            "url": f"az://{BUCKET}/test-{next(_numbers)}",
            "endpoint": server.endpoint,
            "allow_http": True,
        }


@pytest.fixture(scope="session")
def _azurite():
    from azurite_server import PROGRAM, AzuriteServer, find_azurite

    if find_azurite() is None:
        lacking(f"{PROGRAM} is not installed")
    yield from _running(AzuriteServer())


@pytest.fixture
def azure(_azurite, monkeypatch):
    """Azure's blobs, emulated, which a test neither stops nor configures."""
    from azurite_server import ACCOUNT, KEY

    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    return AzurePlace(_azurite)
