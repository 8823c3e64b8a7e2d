"""Blocks that a secret vouches for: who lacks it can cause misses, not hits."""

import os
import traceback

import pytest
from file_blocks import FileBlocks
from sealed_blocks import header_of, plain_impostor, resigned

from kvtier.abc import StoreContext, TierContext
from kvtier.errors import ConfigError, StoreUnavailableError
from kvtier.namespace import Namespace
from kvtier.secondary.filesystem import FilesystemTierManager
from kvtier.stores.filesystem.store import FilesystemStore
from kvtier.stores.integrity.header import HEADER_BYTES, Record
from kvtier.stores.integrity.plain_sealer import PlainSealer
from kvtier.stores.integrity.secrets import Authenticator, SecretPlace
from kvtier.testing.stores import StoreSuite, flip_bit, make_key, make_payload
from kvtier.testing.tier_rig import TierRig
from kvtier.types import FailureCause

SECRET = "correct horse battery staple"
NAMESPACE = Namespace({"model": "secret"})
KEY = make_key(1)
PAYLOAD = make_payload(1, 8192)


@pytest.fixture
def secret_file(tmp_path):
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    return path


@pytest.fixture
def sealer():
    return PlainSealer(NAMESPACE, Authenticator(SECRET.encode(), NAMESPACE))


def test_what_was_sealed_verifies_at_once_and_in_pieces(sealer):
    header = header_of(sealer, KEY, PAYLOAD, 7)
    assert len(header) == HEADER_BYTES
    assert isinstance(sealer.headers.parse(header), Record)
    assert sealer.verify(header, KEY, PAYLOAD, 7) is None
    stream = sealer.seal_stream(KEY, len(PAYLOAD))
    for start in range(0, len(PAYLOAD), 3000):
        piece = memoryview(PAYLOAD)[start : start + 3000]
        assert stream.take(piece) is piece
        stream.note(piece)
    assert sealer.verify(stream.header(), KEY, PAYLOAD) is None


def test_every_bit_counts_even_if_the_headers_own_checksum_is_made_anew(sealer):
    header = header_of(sealer, KEY, PAYLOAD)
    for bit in range(120 * 8):
        assert sealer.verify(resigned(flip_bit(header, bit)), KEY, PAYLOAD) is not None, bit
    for bit in (0, 4000, 8 * len(PAYLOAD) - 1):
        assert sealer.verify(header, KEY, flip_bit(PAYLOAD, bit)) is FailureCause.CORRUPT


@pytest.mark.parametrize("secret", [None, b"another secret of some length"])
def test_blocks_cannot_be_forged_without_the_secret(sealer, secret):
    """The forger knows everything but the secret: namespace, format, a real block."""
    authenticator = None if secret is None else Authenticator(secret, NAMESPACE)
    assert PlainSealer(NAMESPACE, authenticator).headers.fingerprint != sealer.headers.fingerprint
    forger = plain_impostor(sealer.headers.fingerprint, NAMESPACE, authenticator)
    evil = make_payload(666, 8192)
    forged = header_of(forger, KEY, evil)
    assert isinstance(sealer.headers.parse(forged), Record)
    assert sealer.verify(forged, KEY, evil) is FailureCause.CORRUPT
    real = header_of(sealer, make_key(2), evil)
    moved = real[:5] + forged[5:36] + real[36:52] + forged[52:120]
    assert sealer.verify(resigned(moved), KEY, evil) is FailureCause.CORRUPT, "a real block under another key"


class TestFilesWithSecret(FileBlocks, StoreSuite):
    keeps_failed_buffers = False  # a payload is verified where it belongs

    def open_store(self, medium, context):
        (medium / "secret").write_text(SECRET)
        options = {"path": str(medium / "shared"), "capacity": 64 << 20, "secret_file": str(medium / "secret")}
        return FilesystemStore.open(options, context)

    def test_a_forged_block_is_a_miss(self):
        raw = self._raw(1)
        forger = PlainSealer(self.context.namespace)
        forger.fingerprint = raw[-HEADER_BYTES:][20:36]
        evil = self.payload(666)
        self.plant(self.store, make_key(1), evil + header_of(forger, make_key(1), evil))
        self._assert_lost(1, "forged")

    def test_another_secret_or_none_sees_nothing_and_spoils_nothing(self):
        self._write([1])
        (self.medium / "other").write_text("another secret of some length")
        for more in ({}, {"secret_file": str(self.medium / "other")}):
            options = {"path": str(self.medium / "shared"), "capacity": 64 << 20, **more}
            context = StoreContext(self.context.namespace, self.block_bytes)
            other = FilesystemStore.open(options, context)
            assert other.contains([make_key(1)]) == [False]
            assert other.read_into([make_key(1)], self.buffers(1)) == [False]
            assert context.failures.take() == {FailureCause.ABSENT: 1}
            other.close()
        assert self._read([1]) == [self.payload(1)]


def test_a_tier_reads_the_secret_in_its_own_process_and_shows_it_nowhere(tmp_path, secret_file, caplog):
    caplog.set_level(0)
    rig = TierRig(TierContext(namespace=NAMESPACE))
    options = {"path": str(tmp_path / "shared"), "capacity": "16MiB", "secret_file": str(secret_file)}
    tier = FilesystemTierManager(rig.spec, rig.arena.view, "filesystem", **options)
    rig.attach(tier)
    tier.start()
    rig.wait_up()
    assert rig.store([1, 2]).success
    assert rig.load([1, 2])[1] == [1, 2]
    for name in ("cmdline", "environ"):
        with open(f"/proc/{tier.io_pid}/{name}", "rb") as file:
            assert SECRET.encode() not in file.read()
    assert SECRET not in caplog.text + repr(vars(tier)) + repr(tier._options)
    rig.close()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"secret_env": "KVTIER_NO_SUCH_VARIABLE"}, "secret_env"),
        ({"secret_env": "KVTIER_SHORT"}, "secret_env"),
        ({"secret_file": "/no/such/file"}, "secret_file"),
        ({"secret_env": "KVTIER_SHORT", "secret_file": "/no/such/file"}, "secret_file"),
    ],
)
def test_a_secret_that_is_none_is_named_and_not_shown(tmp_path, monkeypatch, options, key):
    monkeypatch.setenv("KVTIER_SHORT", "hunter2")
    rig = TierRig(TierContext(namespace=NAMESPACE))
    with pytest.raises(ConfigError) as caught:
        FilesystemTierManager(rig.spec, rig.arena.view, "files", path=str(tmp_path), capacity="1GiB", **options)
    assert caught.value.key == key
    assert "hunter2" not in "".join(traceback.format_exception(caught.value)) + repr(vars(caught.value))
    rig.close()


def test_a_secret_need_not_be_text(monkeypatch, secret_file):
    raw = bytes(range(255, 200, -1))
    monkeypatch.setitem(os.environb, b"KVTIER_SECRET", raw)
    secret_file.write_bytes(raw + b"\n")
    assert SecretPlace(env="KVTIER_SECRET").read() == SecretPlace(file=str(secret_file)).read() == raw


@pytest.mark.parametrize("value", [5, ["a"], "a\0b"])
def test_a_place_that_is_none_is_an_error_of_the_configuration(value):
    for key, place in (("secret_env", (value, None)), ("secret_file", (None, value))):
        with pytest.raises(ConfigError) as caught:
            SecretPlace.checked(*place)
        assert caught.value.key == key


def test_a_malformed_encrypt_option_never_stores_unencrypted_blocks(secret_file):
    for encrypt in ("yes", 1):
        with pytest.raises(StoreUnavailableError, match="true or false"):
            SecretPlace.split({"secret_file": str(secret_file), "encrypt": encrypt})


def test_a_secret_that_goes_away_leaves_the_store_closed(secret_file, tmp_path, monkeypatch):
    monkeypatch.setenv("KVTIER_SECRET", SECRET)
    assert SecretPlace(env="KVTIER_SECRET").read() == SecretPlace(file=str(secret_file)).read() == SECRET.encode()
    secret_file.unlink()
    options = {"path": str(tmp_path / "shared"), "capacity": 1 << 20, "secret_file": str(secret_file)}
    with pytest.raises(StoreUnavailableError, match="cannot be read"):
        FilesystemStore.open(options, StoreContext(NAMESPACE, 8192))
