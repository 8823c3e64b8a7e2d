"""The shipped suite on real servers: OpenStack Swift's S3, moto's as a second opinion, and Azure's emulator."""

import pytest
from object_buckets import Raw, open_over, settings_for
from test_object_store import OnBucket

from kvtier.errors import StoreUnavailableError
from kvtier.stores.object.client import connect
from kvtier.stores.object.store import ObjectStore
from kvtier.testing.stores import StoreSuite, flip_bit, make_key


class OnServer(OnBucket):
    def setup_method(self, method=None):
        """The server comes as a fixture, after this."""

    def teardown_method(self, method=None):
        pass

    def begin(self, place):
        self.options = place.options
        settings = settings_for(**place.options)
        self.raw = Raw(connect(settings), settings.root)
        StoreSuite.setup_method(self)

    def open_store(self, medium, context):
        return ObjectStore.open(settings_for(**self.options).to_json(), context)

    def test_a_flipped_bit_is_a_miss(self):
        """Fewer bits than elsewhere: each is four requests."""
        raw = self._raw(1)
        for bit in (0, 8 * 64, 8 * 126, 8 * 128, 4 * len(raw), 8 * len(raw) - 1):
            self.plant(self.store, make_key(1), flip_bit(raw, bit))
            self._assert_lost(1, f"flipped at bit {bit}")


class TestSwift(OnServer):
    @pytest.fixture(autouse=True)
    def _server(self, swift_s3):
        self.begin(swift_s3)
        yield
        StoreSuite.teardown_method(self)


class TestMoto(OnServer):
    @pytest.fixture(autouse=True)
    def _server(self, moto_s3):
        self.begin(moto_s3)
        yield
        StoreSuite.teardown_method(self)


class TestAzure(OnServer):
    @pytest.fixture(autouse=True)
    def _server(self, azure):
        self.begin(azure)
        yield
        StoreSuite.teardown_method(self)


def test_a_missing_bucket_says_so(swift_s3):
    settings = settings_for(**{**swift_s3.options, "url": "s3://no-such-bucket/x"})
    with pytest.raises(StoreUnavailableError, match="404 NoSuchBucket"):
        ObjectStore.open(settings.to_json(), OnBucket().make_context())


def test_wrong_credentials_say_so_and_are_not_shown(swift_s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    settings = settings_for(**swift_s3.options)
    with pytest.raises(StoreUnavailableError, match="403 SignatureDoesNotMatch") as caught:
        ObjectStore.open(settings.to_json(), OnBucket().make_context())
    assert "hunter2" not in str(caught.value) + repr(caught.value) + repr(settings) + repr(connect(settings))
    assert "test:tester" not in str(caught.value) + repr(connect(settings))


def test_read_only_credentials_are_reported(swift_s3, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test:reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "reading")
    with pytest.raises(StoreUnavailableError, match="403 AccessDenied"):
        ObjectStore.open(settings_for(**swift_s3.options).to_json(), OnBucket().make_context())


def test_a_server_that_does_not_run_is_reported(swift_s3):
    settings = settings_for(**{**swift_s3.options, "endpoint": "http://127.0.0.1:1"})
    with pytest.raises(StoreUnavailableError, match="error sending request"):
        ObjectStore.open(settings.to_json(), OnBucket().make_context())


def test_capacity_counts_what_the_server_holds(moto_s3):
    settings = settings_for(**{**moto_s3.options, "capacity": 1 << 20, "refresh": 0.1})
    suite = OnBucket()
    raw = Raw(connect(settings), settings.root)
    store = open_over(raw.bucket, suite.make_context(), **{**moto_s3.options, "capacity": 1 << 20, "refresh": 0.1})
    for first in range(0, 300, 10):
        store.write(
            [make_key(number) for number in range(first, first + 10)],
            [memoryview(suite.payload(number)) for number in range(first, first + 10)],
        )
        assert sum(raw.sizes().values()) <= 1 << 20
        store._refresher._step()
    store.close()


def test_a_profile_says_who_we_are(swift_s3, monkeypatch, tmp_path):
    from swift_server import ACCESS_KEY, SECRET_KEY

    pytest.importorskip("boto3", reason="boto3, which reads profiles, is not installed")
    path = tmp_path / "credentials"
    path.write_text(f"[mine]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    context = OnBucket().make_context()
    ObjectStore.open(settings_for(**swift_s3.options, profile="mine").to_json(), context).close()
    with pytest.raises(StoreUnavailableError) as caught:
        ObjectStore.open(settings_for(**swift_s3.options, profile="nobody").to_json(), context)
    assert SECRET_KEY not in str(caught.value)
