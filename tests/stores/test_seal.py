import pytest

from kvtier.errors import KeyFormatError
from kvtier.namespace import FORMAT_VERSION, Namespace
from kvtier.stores.integrity.header import HEADER_BYTES, HEADER_DTYPE, Record, Seal, header_checksum
from kvtier.testing.stores import flip_bit, make_key
from kvtier.types import FailureCause

KEY = make_key(1)
PAYLOAD = bytes(range(256)) * 16


@pytest.fixture
def seal():
    return Seal(Namespace({"model": "one"}))


def resigned(header):
    return header[:120] + header_checksum(header).to_bytes(8, "little")


def test_layout_is_128_bytes_in_both_descriptions(seal):
    header = seal.seal(KEY, PAYLOAD, 7)
    assert len(header) == HEADER_BYTES == HEADER_DTYPE.itemsize
    assert header[:5] == b"KVTB" + bytes([FORMAT_VERSION])
    assert HEADER_DTYPE.fields["key"][1] == 52
    assert header[52:120] == KEY.ljust(68, b"\0")


def test_what_was_sealed_verifies_and_parses(seal):
    first, second = (seal.seal(KEY, PAYLOAD, 7) for _ in range(2))
    assert seal.verify(first, KEY, PAYLOAD, 7) is None
    record = seal.parse(second)
    assert isinstance(record, Record)
    assert (record.key, record.slot, record.payload_bytes) == (KEY, 7, len(PAYLOAD))
    assert record.sequence == seal.parse(first).sequence + 1


def test_payloads_may_be_summed_first(seal):
    payloads = [PAYLOAD, memoryview(PAYLOAD[::-1]), b""]
    checksums = seal.checksums(payloads)
    for payload, checksum in zip(payloads, checksums, strict=True):
        header = seal.seal_summed(KEY, len(payload), checksum, 7)
        assert seal.verify(header, KEY, payload, 7) is None
        assert seal.verify_summed(header, KEY, len(payload), checksum, 7) is None
        assert seal.verify_summed(header, KEY, len(payload), checksum, 8) is FailureCause.FOREIGN
        assert seal.verify_summed(header, KEY, len(payload), checksum[::-1], 7) is FailureCause.CORRUPT


def test_sequences_go_on_above_what_was_recovered(seal):
    seal.continue_after(2**40)
    assert seal.parse(seal.seal(KEY, PAYLOAD)).sequence == 2**40 + 1


def test_other_key_slot_namespace(seal):
    header = seal.seal(KEY, PAYLOAD, 7)
    assert seal.verify(header, make_key(2), PAYLOAD, 7) is FailureCause.FOREIGN
    assert seal.verify(header, KEY, PAYLOAD, 8) is FailureCause.FOREIGN
    for other in (Namespace({"model": "two"}), Namespace({"model": "one"}, b"epoch")):
        assert Seal(other).verify(header, KEY, PAYLOAD, 7) is FailureCause.FOREIGN
        assert Seal(other).parse(header) is FailureCause.FOREIGN


def test_a_key_is_not_a_prefix_of_its_padding(seal):
    header = seal.seal(KEY, PAYLOAD)
    assert seal.verify(header, KEY + b"\0", PAYLOAD) is FailureCause.FOREIGN
    assert seal.verify(header, KEY[:-1], PAYLOAD) is FailureCause.FOREIGN


def test_older_format(seal):
    header = seal.seal(KEY, PAYLOAD)
    assert seal.parse(resigned(header[:4] + bytes([FORMAT_VERSION + 1]) + header[5:])) is FailureCause.OLD_FORMAT


def test_nothing(seal):
    assert seal.verify(bytes(128), KEY, PAYLOAD) is FailureCause.ABSENT


@pytest.mark.parametrize("header", [b"", b"KVTB", bytes(127), bytes(129), b"x" * 128])
def test_garbage(seal, header):
    assert seal.parse(header) is FailureCause.CORRUPT


def test_every_bit_of_the_header_counts(seal):
    header = seal.seal(KEY, PAYLOAD)
    for bit in range(HEADER_BYTES * 8):
        assert isinstance(seal.parse(flip_bit(header, bit)), FailureCause)


def test_a_payload_that_changed(seal):
    header = seal.seal(KEY, PAYLOAD)
    for other in (flip_bit(PAYLOAD, 0), flip_bit(PAYLOAD, len(PAYLOAD) * 8 - 1), PAYLOAD[:-1], PAYLOAD + b"\0", b""):
        assert seal.verify(header, KEY, other) is FailureCause.CORRUPT


@pytest.mark.parametrize("length", [0, 4, 69])
def test_keys_that_no_header_holds(seal, length):
    with pytest.raises(KeyFormatError):
        seal.seal(b"k" * length, PAYLOAD)
    with pytest.raises(ValueError, match="slot"):
        seal.seal(KEY, PAYLOAD, 2**32)
