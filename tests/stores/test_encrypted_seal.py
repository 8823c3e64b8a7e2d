"""Headers of encrypted payloads: every bit counts, no writing is like another, and nothing shows the secret."""

import subprocess
import sys
import threading

import pytest

from kvtier.errors import ConfigError, KeyFormatError, StoreUnavailableError
from kvtier.namespace import Namespace
from kvtier.stores.integrity import secrets
from kvtier.stores.integrity.encrypted_seal import ENCRYPTED_VERSION, EncryptedSeal
from kvtier.stores.integrity.header import HEADER_BYTES, BlockHeaders, Record, Seal, header_checksum
from kvtier.stores.integrity.scratch import RING_BYTES
from kvtier.stores.integrity.sealing import EncryptedEnvelope, Envelope, PlainEnvelope
from kvtier.stores.integrity.secrets import TAG_BYTES, Authenticator, PayloadCipher, SecretPlace
from kvtier.testing.patience import PATIENCE_SECONDS
from kvtier.testing.stores import flip_bit, make_key, make_payload
from kvtier.types import FailureCause

SECRET = b"correct horse battery staple"
NAMESPACE = Namespace({"model": "encrypted"}, b"epoch")
KEY = make_key(1)
PAYLOAD = make_payload(1, 70_000)


@pytest.fixture
def seal():
    return EncryptedSeal.of(PayloadCipher(SECRET, NAMESPACE))


def encrypted(seal, key=KEY, payload=PAYLOAD, slot=0):
    target = memoryview(bytearray(len(payload)))
    return seal.encrypt(key, payload, target, slot), bytes(target)


def decrypted(seal, header, stored, key=KEY, slot=0):
    target = bytearray(len(stored))
    cause = seal.decrypt(header, key, stored, memoryview(target), slot)
    assert seal.verify(header, key, stored, slot) is cause
    return cause or bytes(target)


def resigned(header):
    return header[:120] + header_checksum(header).to_bytes(8, "little")


def test_what_was_encrypted_is_decrypted_and_nothing_of_it_is_seen(seal):
    header, stored = encrypted(seal, slot=7)
    assert len(header) == HEADER_BYTES
    assert header[:5] == b"KVTB" + bytes([ENCRYPTED_VERSION])
    assert len(stored) == len(PAYLOAD)
    assert not any(PAYLOAD[start : start + 16] in stored for start in range(0, len(PAYLOAD), 16))
    record = seal.parse(header)
    assert isinstance(record, Record)
    assert (record.key, record.slot, record.payload_bytes) == (KEY, 7, len(PAYLOAD))
    assert decrypted(seal, header, stored, slot=7) == PAYLOAD
    assert decrypted(seal, *encrypted(seal, payload=b"")) == b""


def test_it_is_aes_256_gcm_over_payload_and_header_with_a_key_for_each_block(seal):
    """Computed once more, with the package's other interface and the standard library's HMAC alone."""
    import hashlib
    import hmac

    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    def hmac_of(key, text):
        return hmac.new(key, text, hashlib.sha256).digest()

    header, stored = encrypted(seal, slot=3)
    extracted = hmac_of(b"kvtier block seals", SECRET)
    of_namespace = hmac_of(extracted, b"encrypt" + seal.fingerprint + b"\x01")
    of_block = hmac_of(of_namespace, b"block" + KEY + b"\x01")
    associated = header[:36] + bytes(16) + header[52:120]
    assert header[20:24] == seal.fingerprint[:4]
    assert AESGCM(of_block).decrypt(header[24:36], stored + header[36:52], associated) == PAYLOAD


def test_every_bit_counts_even_if_the_headers_own_checksum_is_made_anew(seal):
    header, stored = encrypted(seal, payload=PAYLOAD[:4096])
    for bit in range(120 * 8):
        assert isinstance(decrypted(seal, resigned(flip_bit(header, bit)), stored), FailureCause), bit
    for bit in (0, 4000, 8 * 4096 - 1):
        assert decrypted(seal, header, flip_bit(stored, bit)) is FailureCause.CORRUPT
    for other in (stored[:-1], stored + b"\0", b""):
        assert decrypted(seal, header, other) is FailureCause.CORRUPT


def test_whole_or_in_pieces_makes_no_difference(seal):
    room = memoryview(bytearray(len(PAYLOAD) + TAG_BYTES))
    header = seal.encrypt_whole(KEY, PAYLOAD, room, 7)
    assert decrypted(seal, header, bytes(room[:-TAG_BYTES]), slot=7) == PAYLOAD
    header, stored = encrypted(seal, slot=7)
    target = memoryview(bytearray(len(PAYLOAD)))

    def decrypt_whole(header, stored, slot=7):
        return seal.decrypt_whole(header, KEY, memoryview(bytearray(stored) + bytes(TAG_BYTES)), target, slot)

    assert decrypt_whole(header, stored) is None
    assert target == PAYLOAD
    assert decrypt_whole(header, stored, 8) is FailureCause.FOREIGN
    assert decrypt_whole(header, flip_bit(stored, 99)) is FailureCause.CORRUPT
    assert decrypt_whole(resigned(flip_bit(header, 8 * 40)), stored) is FailureCause.CORRUPT
    assert decrypt_whole(header, stored[:-1]) is FailureCause.CORRUPT


def test_no_writing_is_like_another(seal):
    written = [encrypted(seal) for _ in range(50)]
    assert len({header[24:36] for header, _ in written}) == 50
    assert len({stored for _, stored in written}) == 50
    assert len({stored[:32] for _, stored in written}) == 50


def test_another_key_slot_secret_or_namespace(seal):
    header, stored = encrypted(seal, slot=7)
    assert decrypted(seal, header, stored, key=make_key(2), slot=7) is FailureCause.FOREIGN
    assert decrypted(seal, header, stored, slot=8) is FailureCause.FOREIGN
    for other in (PayloadCipher(b"another secret of some length", NAMESPACE), PayloadCipher(SECRET, Namespace())):
        assert decrypted(EncryptedSeal.of(other), header, stored, slot=7) is FailureCause.FOREIGN
        lookalike = EncryptedSeal(other, seal.fingerprint)
        assert isinstance(lookalike.parse(header), Record)
        assert decrypted(lookalike, header, stored, slot=7) is FailureCause.CORRUPT


def test_who_does_not_encrypt_sees_another_format_and_the_other_way_round(seal):
    header, _ = encrypted(seal)
    plain = Seal(NAMESPACE)
    plain.fingerprint = seal.fingerprint
    assert plain.parse(header) is FailureCause.OLD_FORMAT
    assert seal.parse(plain.seal(KEY, PAYLOAD)) is FailureCause.OLD_FORMAT


def test_without_the_secret_headers_can_be_read_and_nothing_else(seal):
    header, stored = encrypted(seal)
    reader = EncryptedSeal(None, seal.fingerprint)
    assert isinstance(reader.parse(header), Record)
    assert decrypted(reader, header, stored) is FailureCause.CORRUPT
    with pytest.raises(ValueError, match="without the secret"):
        encrypted(reader)
    with pytest.raises(KeyFormatError):
        encrypted(seal, key=b"key")


@pytest.mark.parametrize("guard", [None, Authenticator, PayloadCipher])
@pytest.mark.parametrize("block_bytes", [5000, 1 << 20])
def test_blocks_pass_in_pieces_as_they_do_whole(guard, block_bytes):
    envelope = Envelope.of(guard and guard(SECRET, NAMESPACE), NAMESPACE)
    assert isinstance(envelope.headers, BlockHeaders)
    step = min(block_bytes, RING_BYTES // 4)
    sent = []
    for number in range(6):
        payload = memoryview(make_payload(number, block_bytes))
        outgoing = envelope.outgoing(make_key(number), block_bytes)
        pieces = []
        for start in range(0, block_bytes, step):
            piece = payload[start : start + step]
            pieces.append(bytes(outgoing.take(piece)))
            outgoing.note(piece)
        sent.append((b"".join(pieces), outgoing.header()))
    for number, (stored, header) in enumerate(sent):
        buffer = memoryview(bytearray(block_bytes))
        for changed in (True, False):
            incoming = envelope.incoming(make_key(number), buffer)
            incoming.place[:] = flip_bit(stored, 77) if changed else stored
            for start in range(0, block_bytes, step):
                incoming.note(incoming.place[start : start + step])
            assert incoming.verify(header) is (FailureCause.CORRUPT if changed else None)
        assert buffer == make_payload(number, block_bytes)
        (place,) = envelope.places([buffer])
        place[:] = stored
        assert envelope.unwrap([header], [make_key(number)], [place], [buffer]) == [None]


def test_pieces_that_wait_together_are_not_overwritten():
    envelope = EncryptedEnvelope(PayloadCipher(SECRET, NAMESPACE))
    step = RING_BYTES // 4 - 1000
    payload = memoryview(make_payload(1, 40 * step))
    outgoing = envelope.outgoing(KEY, len(payload))
    waiting, seen = [], b""
    for start in range(0, len(payload), step):
        waiting.append(outgoing.take(payload[start : start + step]))
        if len(waiting) == 2:
            seen += b"".join(waiting)
            waiting = []
    assert decrypted(envelope.seal, outgoing.header(), seen) == payload


def test_threads_have_memory_of_their_own():
    envelope = EncryptedEnvelope(PayloadCipher(SECRET, NAMESPACE))
    start, wrong = threading.Barrier(4), []

    def work(number):
        payload = memoryview(make_payload(number, 8192))
        buffer = memoryview(bytearray(8192))
        start.wait(PATIENCE_SECONDS)
        for _ in range(100):
            (stored,), (header,) = envelope.wrap([KEY], [payload])
            copy = bytes(stored)
            (place,) = envelope.places([buffer])
            place[:] = copy
            if envelope.unwrap([header], [KEY], [place], [buffer]) != [None] or buffer != payload:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []


def test_a_payload_is_left_as_it_is_and_nothing_shows_the_secret():
    cipher = PayloadCipher(SECRET, NAMESPACE)
    envelope = EncryptedEnvelope(cipher)
    payload = bytearray(PAYLOAD)
    envelope.wrap([KEY], [memoryview(payload)])
    assert payload == PAYLOAD
    shown = repr(cipher) + repr(envelope) + repr(vars(envelope)) + envelope.namespace.describe()
    assert SECRET.decode() not in shown
    key = cipher._key_of(KEY)
    assert key.hex() not in shown + repr(vars(cipher)) + repr(vars(envelope.seal))


def test_a_namespace_for_each_way_to_guard_blocks():
    namespaces = [NAMESPACE, Authenticator(SECRET, NAMESPACE).namespace, PayloadCipher(SECRET, NAMESPACE).namespace]
    assert len({namespace.fingerprint for namespace in namespaces}) == 3
    assert {namespace.epoch for namespace in namespaces} == {b"epoch"}
    assert PlainEnvelope.under(None, NAMESPACE).namespace is NAMESPACE


def test_encrypting_needs_a_secret_and_the_package(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="secret_env or secret_file to go with it") as caught:
        SecretPlace.checked(None, None, True)
    assert caught.value.key == "encrypt"
    with pytest.raises(ConfigError, match="true or false"):
        SecretPlace.checked(None, None, "yes")
    with pytest.raises(StoreUnavailableError, match="encrypt"):
        Envelope.open({"encrypt": True}, NAMESPACE)
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    real = secrets.find_spec
    monkeypatch.setattr(secrets, "find_spec", lambda name: None if name == "cryptography" else real(name))
    assert SecretPlace.checked(None, str(path)) is not None
    with pytest.raises(ConfigError, match=r"needs cryptography: pip install 'kvtier\[secure\]'"):
        SecretPlace.checked(None, str(path), True)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(StoreUnavailableError, match="needs cryptography"):
        Envelope.open({"secret_file": str(path), "encrypt": True}, NAMESPACE)


def test_the_packages_are_loaded_only_by_who_asks(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    code = f"""
import sys
from kvtier.namespace import Namespace
from kvtier.stores.integrity.sealing import Envelope
import kvtier.secondary.disk, kvtier.stores.slab.store, kvtier.stores.filesystem.store
for options in ({{}}, {{"secret_file": {str(path)!r}}}, {{"secret_file": {str(path)!r}, "encrypt": True}}):
    Envelope.open(options, Namespace())
    print([name for name in ("blake3", "cryptography") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "['blake3']", "['blake3', 'cryptography']"]
