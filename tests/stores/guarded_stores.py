"""Stores by key whose blocks a secret guards, and forgers who have everything but it; shared by their tests."""

from pathlib import Path

from sealed_blocks import encrypt, encrypting_impostor, header_of, plain_impostor, resigned

from kvtier.abc import StoreContext
from kvtier.stores.integrity import open_sealer
from kvtier.stores.integrity.header import ENCRYPTED_VERSION, HEADER_BYTES
from kvtier.stores.integrity.secrets import Authenticator, PayloadCipher
from kvtier.testing.stores import make_key
from kvtier.types import FailureCause

SECRET, ANOTHER = "correct horse battery staple", "another secret of some length"


def secret_options(folder, encrypt, secret=SECRET):
    path = Path(folder, secret.split()[0])
    path.write_text(secret)
    return {"secret_file": str(path), "encrypt": encrypt}


def forgeries(namespace, key, evil, real_header, slot=0):
    """Yield (payload, header) that somebody makes who knows all but the secret: a right checksum, or another's key."""
    plain = plain_impostor(namespace.fingerprint, namespace)
    vouched = plain_impostor(namespace.fingerprint, namespace, Authenticator(ANOTHER.encode(), namespace))
    cipher = encrypting_impostor(namespace.fingerprint, PayloadCipher(ANOTHER.encode(), namespace))
    header, encrypted = encrypt(cipher, key, evil, slot)
    yield evil, header_of(plain, key, evil, slot)
    yield evil, header_of(vouched, key, evil, slot)
    yield encrypted, header
    for forged in (header_of(plain, key, evil, slot), header):  # and with what the real one says of itself
        yield evil, resigned(real_header[:36] + forged[36:52] + real_header[52:120])


class Guarded:
    """Tests for stores by key; a class says how to `split` and `join` header and payload, and `open_with` a secret."""

    encrypt = False
    header_first = False

    def open_store(self, medium, context):
        return self.open_with(medium, context, secret_options(medium, self.encrypt))

    def _split(self, raw):
        header, payload = (raw[:HEADER_BYTES], raw[HEADER_BYTES:]), (raw[-HEADER_BYTES:], raw[:-HEADER_BYTES])
        return header if self.header_first else payload

    def _join(self, header, payload):
        return header + payload if self.header_first else payload + header

    def test_encryption_changes_no_length_and_shows_no_payload(self):
        header, payload = self._split(self._raw(1))
        assert len(header) == HEADER_BYTES
        assert (payload == self.payload(1)) is not self.encrypt
        assert header[4] == (ENCRYPTED_VERSION if self.encrypt else 1)

    def test_blocks_cannot_be_forged_without_the_secret(self):
        header, _ = self._split(self._raw(1))
        namespace = open_sealer(secret_options(self.medium, self.encrypt), self.context.namespace)[1].namespace
        for number, (payload, forged) in enumerate(forgeries(namespace, make_key(1), self.payload(666), header)):
            self.plant(self.store, make_key(1), self._join(forged, payload))
            self._assert_lost(1, f"forgery {number}")
        self._write([1])
        assert self._read([1]) == [self.payload(1)]

    def test_a_block_moved_to_another_key_is_a_miss_and_an_old_one_of_its_own_a_hit(self):
        old = self._raw(1)
        header, payload = self._split(self._raw(2))
        moved = header[:52] + make_key(1).ljust(68, b"\0")
        self.plant(self.store, make_key(1), self._join(resigned(moved), payload))
        self._assert_lost(1, "another block under its own name")
        self.plant(self.store, make_key(1), old)
        assert self._read([1]) == [self.payload(1)]

    def test_another_secret_or_none_sees_nothing_and_spoils_nothing(self):
        self._write([1])
        for more in (
            {},
            secret_options(self.medium, self.encrypt, ANOTHER),
            secret_options(self.medium, not self.encrypt),
        ):
            context = StoreContext(self.context.namespace, self.block_bytes)
            other = self.open_with(self.medium, context, more)
            assert list(other.contains([make_key(1)])) == [False]
            assert list(other.read_into([make_key(1)], self.buffers(1))) == [False]
            assert context.failures.take() == {FailureCause.ABSENT: 1}
            other.close()
        assert self._read([1]) == [self.payload(1)]
