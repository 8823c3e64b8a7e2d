"""Headers of encrypted payloads: every bit counts, no writing is like another, and nothing shows the secret."""

import subprocess
import sys
import threading

import pytest
from sealed_blocks import encrypt, encrypting_impostor, header_of, plain_impostor, resigned

from kvtier.errors import ConfigError, KeyFormatError, StoreUnavailableError
from kvtier.namespace import Namespace
from kvtier.stores.integrity import make_sealer, open_sealer, secrets
from kvtier.stores.integrity.encrypted_sealer import EncryptedSealer
from kvtier.stores.integrity.header import ENCRYPTED_VERSION, HEADER_BYTES, BlockHeaders, Record
from kvtier.stores.integrity.plain_sealer import PlainSealer
from kvtier.stores.integrity.scratch import RING_BYTES
from kvtier.stores.integrity.secrets import Authenticator, PayloadCipher, SecretPlace
from kvtier.testing.patience import PATIENCE_SECONDS
from kvtier.testing.stores import flip_bit, make_key, make_payload
from kvtier.types import FailureCause

SECRET = b"correct horse battery staple"
NAMESPACE = Namespace({"model": "encrypted"}, b"epoch")
KEY = make_key(1)
PAYLOAD = make_payload(1, 70_000)


@pytest.fixture
def sealer():
    return EncryptedSealer(PayloadCipher(SECRET, NAMESPACE))


def encrypted(sealer, key=KEY, payload=PAYLOAD, slot=0):
    return encrypt(sealer, key, payload, slot)


def decrypted(sealer, header, stored, key=KEY, slot=0):
    """Decrypt from the sealer's own memory and from elsewhere; both, and a mere check, must agree."""
    buffers = [memoryview(bytearray(len(stored)))]
    rooms = sealer.rooms(buffers)
    rooms[0][:] = stored
    (cause,) = sealer.open([header], [key], rooms, buffers, [slot])
    again = [memoryview(bytearray(len(stored)))]
    assert sealer.open([header], [key], [stored], again, [slot]) == [cause]
    assert sealer.verify(header, key, stored, slot) is cause
    if cause is not None:
        assert again[0] == bytes(len(stored)), "touched, though it did not verify"
        return cause
    assert again == buffers
    return bytes(buffers[0])


def test_what_was_encrypted_is_decrypted_and_nothing_of_it_is_seen(sealer):
    header, stored = encrypted(sealer, slot=7)
    assert len(header) == HEADER_BYTES
    assert header[:5] == b"KVTB" + bytes([ENCRYPTED_VERSION])
    assert len(stored) == len(PAYLOAD)
    assert not any(PAYLOAD[start : start + 16] in stored for start in range(0, len(PAYLOAD), 16))
    record = sealer.headers.parse(header)
    assert isinstance(record, Record)
    assert (record.key, record.slot, record.payload_bytes) == (KEY, 7, len(PAYLOAD))
    assert decrypted(sealer, header, stored, slot=7) == PAYLOAD
    assert decrypted(sealer, *encrypted(sealer, payload=b"")) == b""


def test_it_is_aes_256_gcm_over_payload_and_header_with_a_key_for_each_block(sealer):
    """Computed once more, with the package's other interface and the standard library's HMAC alone."""
    import hashlib
    import hmac

    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    def hmac_of(key, text):
        return hmac.new(key, text, hashlib.sha256).digest()

    header, stored = encrypted(sealer, slot=3)
    extracted = hmac_of(b"kvtier block seals", SECRET)
    of_namespace = hmac_of(extracted, b"encrypt" + sealer.headers.fingerprint + b"\x01")
    of_block = hmac_of(of_namespace, b"block" + KEY + b"\x01")
    associated = header[:36] + bytes(16) + header[52:120]
    assert header[20:24] == sealer.headers.fingerprint[:4]
    assert AESGCM(of_block).decrypt(header[24:36], stored + header[36:52], associated) == PAYLOAD


def test_every_bit_counts_even_if_the_headers_own_checksum_is_made_anew(sealer):
    header, stored = encrypted(sealer, payload=PAYLOAD[:4096])
    for bit in range(120 * 8):
        assert isinstance(decrypted(sealer, resigned(flip_bit(header, bit)), stored), FailureCause), bit
    for bit in (0, 4000, 8 * 4096 - 1):
        assert decrypted(sealer, header, flip_bit(stored, bit)) is FailureCause.CORRUPT
    for other in (stored[:-1], stored + b"\0", b""):
        assert decrypted(sealer, header, other) is FailureCause.CORRUPT


def test_whole_or_in_pieces_makes_no_difference(sealer):
    target = memoryview(bytearray(len(PAYLOAD)))
    header = sealer.seal_into(KEY, memoryview(PAYLOAD), target)
    assert decrypted(sealer, header, bytes(target)) == PAYLOAD
    assert decrypted(sealer, header, bytes(target), slot=8) is FailureCause.FOREIGN
    assert decrypted(sealer, header, flip_bit(target, 99)) is FailureCause.CORRUPT
    assert decrypted(sealer, resigned(flip_bit(header, 8 * 40)), bytes(target)) is FailureCause.CORRUPT
    assert decrypted(sealer, header, bytes(target[:-1])) is FailureCause.CORRUPT


def test_no_writing_is_like_another(sealer):
    written = [encrypted(sealer) for _ in range(50)]
    assert len({header[24:36] for header, _ in written}) == 50
    assert len({stored for _, stored in written}) == 50
    assert len({stored[:32] for _, stored in written}) == 50


def test_another_key_slot_secret_or_namespace(sealer):
    header, stored = encrypted(sealer, slot=7)
    assert decrypted(sealer, header, stored, key=make_key(2), slot=7) is FailureCause.FOREIGN
    assert decrypted(sealer, header, stored, slot=8) is FailureCause.FOREIGN
    for other in (PayloadCipher(b"another secret of some length", NAMESPACE), PayloadCipher(SECRET, Namespace())):
        assert decrypted(EncryptedSealer(other), header, stored, slot=7) is FailureCause.FOREIGN
        lookalike = encrypting_impostor(sealer.headers.fingerprint, other)
        assert isinstance(lookalike.headers.parse(header), Record)
        assert decrypted(lookalike, header, stored, slot=7) is FailureCause.CORRUPT


def test_encrypted_and_signed_blocks_are_another_format_for_each_other(sealer):
    header, _ = encrypted(sealer)
    plain = plain_impostor(sealer.headers.fingerprint, NAMESPACE)
    assert plain.headers.parse(header) is FailureCause.OLD_FORMAT
    assert sealer.headers.parse(header_of(plain, KEY, PAYLOAD)) is FailureCause.OLD_FORMAT


def test_without_the_secret_headers_can_be_read(sealer):
    header, _ = encrypted(sealer)
    assert isinstance(BlockHeaders.encrypted(sealer.headers.fingerprint).parse(header), Record)


def test_a_key_that_no_key_has_is_refused(sealer):
    with pytest.raises(KeyFormatError):
        encrypted(sealer, key=b"key")


@pytest.mark.parametrize(
    "sealer", [PlainSealer(NAMESPACE), *(make_sealer(NAMESPACE, SECRET, i) for i in (False, True))]
)
@pytest.mark.parametrize("block_bytes", [5000, 1 << 20])
def test_blocks_pass_in_pieces_as_they_do_whole(sealer, block_bytes):
    step = min(block_bytes, RING_BYTES // 4)
    sent = []
    for number in range(6):
        payload = memoryview(make_payload(number, block_bytes))
        stream = sealer.seal_stream(make_key(number), block_bytes)
        pieces = []
        for start in range(0, block_bytes, step):
            piece = payload[start : start + step]
            pieces.append(bytes(stream.take(piece)))
            stream.note(piece)
        sent.append((b"".join(pieces), stream.header()))
    for number, (stored, header) in enumerate(sent):
        buffer = memoryview(bytearray(block_bytes))
        for changed in (True, False):
            stream = sealer.open_stream(make_key(number), buffer)
            arriving = flip_bit(stored, 77) if changed else stored
            for start in range(0, block_bytes, step):
                room = stream.room(start, min(start + step, block_bytes))
                room[:] = arriving[start : start + step]
                stream.note(room)
            assert stream.verify(header) is (FailureCause.CORRUPT if changed else None)
        assert buffer == make_payload(number, block_bytes)
        rooms = sealer.rooms([buffer])
        rooms[0][:] = stored
        assert sealer.open([header], [make_key(number)], rooms, [buffer]) == [None]


def test_pieces_that_wait_together_are_not_overwritten(sealer):
    step = RING_BYTES // 4 - 1000
    payload = memoryview(make_payload(1, 40 * step))
    stream = sealer.seal_stream(KEY, len(payload))
    waiting, seen = [], b""
    for start in range(0, len(payload), step):
        waiting.append(stream.take(payload[start : start + step]))
        if len(waiting) == 2:
            seen += b"".join(waiting)
            waiting = []
    assert decrypted(sealer, stream.header(), seen) == payload


def test_threads_have_memory_of_their_own(sealer):
    start, wrong = threading.Barrier(4), []

    def work(number):
        payload = memoryview(make_payload(number, 8192))
        buffer = memoryview(bytearray(8192))
        start.wait(PATIENCE_SECONDS)
        for _ in range(100):
            (stored,), (header,) = sealer.seal([KEY], [payload])
            copy = bytes(stored)
            rooms = sealer.rooms([buffer])
            rooms[0][:] = copy
            if sealer.open([header], [KEY], rooms, [buffer]) != [None] or buffer != payload:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []


def test_a_payload_is_left_as_it_is_and_nothing_shows_the_secret():
    cipher = PayloadCipher(SECRET, NAMESPACE)
    sealer = EncryptedSealer(cipher)
    payload = bytearray(PAYLOAD)
    sealer.seal([KEY], [memoryview(payload)])
    assert payload == PAYLOAD
    shown = repr(cipher) + repr(sealer) + repr(vars(sealer)) + sealer.namespace.describe()
    assert SECRET.decode() not in shown
    key = cipher._key_of(KEY)
    assert key.hex() not in shown + repr(vars(cipher)) + repr(vars(sealer.headers))


def test_a_namespace_for_each_way_to_guard_blocks():
    namespaces = [NAMESPACE, Authenticator(SECRET, NAMESPACE).namespace, PayloadCipher(SECRET, NAMESPACE).namespace]
    assert len({namespace.fingerprint for namespace in namespaces}) == 3
    assert {namespace.epoch for namespace in namespaces} == {b"epoch"}
    assert PlainSealer(NAMESPACE).namespace is NAMESPACE


def test_encrypting_needs_a_secret_and_the_package(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="only with secret_env or secret_file") as caught:
        SecretPlace.checked(None, None, True)
    assert caught.value.key == "encrypt"
    with pytest.raises(ConfigError, match="true or false"):
        SecretPlace.checked(None, None, "yes")
    with pytest.raises(StoreUnavailableError, match="encrypt"):
        open_sealer({"encrypt": True}, NAMESPACE)
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    real = secrets.find_spec
    monkeypatch.setattr(secrets, "find_spec", lambda name: None if name == "cryptography" else real(name))
    assert SecretPlace.checked(None, str(path)) is not None
    with pytest.raises(ConfigError, match=r"needs cryptography: pip install 'kvtier\[secure\]'"):
        SecretPlace.checked(None, str(path), True)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(StoreUnavailableError, match="needs cryptography"):
        open_sealer({"secret_file": str(path), "encrypt": True}, NAMESPACE)


def test_the_packages_are_loaded_only_by_who_asks(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    code = f"""
import sys
from kvtier.namespace import Namespace
from kvtier.stores.integrity import open_sealer
import kvtier.secondary.disk, kvtier.stores.slab.store, kvtier.stores.filesystem.store
for options in ({{}}, {{"secret_file": {str(path)!r}}}, {{"secret_file": {str(path)!r}, "encrypt": True}}):
    open_sealer(options, Namespace())
    print([name for name in ("blake3", "cryptography") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "['blake3']", "['blake3', 'cryptography']"]
