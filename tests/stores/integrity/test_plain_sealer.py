import mmap

import numpy as np
import pytest
import xxhash
from sealed_blocks import header_of, resigned

from kvtier.errors import KeyFormatError
from kvtier.namespace import FORMAT_VERSION, Namespace
from kvtier.stores.integrity.header import HEADER_BYTES, HEADER_DTYPE, Record
from kvtier.stores.integrity.plain_sealer import PlainSealer
from kvtier.testing.stores import flip_bit, make_key
from kvtier.types import FailureCause

KEY = make_key(1)
PAYLOAD = bytes(range(256)) * 16


@pytest.fixture
def sealer():
    return PlainSealer(Namespace({"model": "one"}))


def test_layout_is_128_bytes_in_both_descriptions(sealer):
    header = header_of(sealer, KEY, PAYLOAD, 7)
    assert len(header) == HEADER_BYTES == HEADER_DTYPE.itemsize
    assert header[:5] == b"KVTB" + bytes([FORMAT_VERSION])
    assert HEADER_DTYPE.fields["key"][1] == 52
    assert header[52:120] == KEY.ljust(68, b"\0")


def test_what_was_sealed_verifies_and_parses(sealer):
    first, second = (header_of(sealer, KEY, PAYLOAD, 7) for _ in range(2))
    assert sealer.verify(first, KEY, PAYLOAD, 7) is None
    record = sealer.headers.parse(second)
    assert isinstance(record, Record)
    assert (record.key, record.slot, record.payload_bytes) == (KEY, 7, len(PAYLOAD))
    assert record.sequence == sealer.headers.parse(first).sequence + 1


def test_a_batch_is_sealed_and_opened_where_it_lies_or_copied_from_elsewhere(sealer):
    payloads = [memoryview(PAYLOAD), memoryview(PAYLOAD[::-1]), memoryview(b"")]
    keys, slots = [make_key(number) for number in range(3)], [7, 8, 9]
    stored, headers = sealer.seal(keys, payloads, slots)
    assert stored is payloads
    assert sealer.open(headers, keys, stored, stored, slots) == [None] * 3
    assert sealer.open(headers, keys, stored, stored, [7, 9, 9]) == [None, FailureCause.FOREIGN, None]
    buffers = [memoryview(bytearray(b"?" * len(payload))) for payload in payloads]
    spoilt = [memoryview(flip_bit(stored[0], 9)), *stored[1:]]
    assert sealer.open(headers, keys, spoilt, buffers, slots) == [FailureCause.CORRUPT, None, None]
    assert [bytes(buffer) for buffer in buffers] == [b"?" * len(PAYLOAD), PAYLOAD[::-1], b""]


@pytest.mark.parametrize("length", [1, 64 << 10, (64 << 10) + 1, 200_001, 256 << 10, (256 << 10) + 1])
def test_the_checksum_in_a_header_is_the_payloads_xxh3(sealer, length):
    payloads = [memoryview(np.random.default_rng(length).bytes(length))]
    _, (header,) = sealer.seal([KEY], payloads, [7])
    assert sealer.headers.parse(header).payload_checksum == xxhash.xxh3_128_digest(payloads[0])
    assert sealer.open([header], [KEY], payloads, payloads, [7]) == [None]


def test_a_key_or_slot_that_no_header_can_hold_is_an_error_or_a_miss(sealer):
    payload = memoryview(PAYLOAD)
    header = header_of(sealer, KEY, PAYLOAD, 7)
    for key in (b"1234", bytes(69), bytes(300)):
        with pytest.raises(KeyFormatError):
            sealer.seal([key], [payload], [7])
        assert sealer.open([header], [key], [payload], [payload], [7]) == [FailureCause.FOREIGN]
    for slot in (-1, 1 << 32):
        with pytest.raises(ValueError, match="slot"):
            sealer.seal([KEY], [payload], [slot])
        assert sealer.open([header], [KEY], [payload], [payload], [slot]) == [FailureCause.FOREIGN]


def test_payloads_can_be_written_from_private_memory(sealer):
    payloads = [memoryview(bytes([number]) * length) for number, length in enumerate((1, 4096, 300 << 10, 1 << 20))]
    keys, slots = [make_key(number) for number in range(4)], [7, 8, 9, 10]
    stored, headers = sealer.through_huge_pages().seal(keys, payloads, slots)
    assert [bytes(copy) for copy in stored] == [bytes(payload) for payload in payloads]
    assert all(np.frombuffer(copy, np.uint8).ctypes.data % mmap.PAGESIZE == 0 for copy in stored)
    assert sealer.open(headers, keys, stored, stored, slots) == [None] * 4


def test_with_direct_reads_payloads_come_through_private_memory(sealer):
    direct = sealer.through_huge_pages()
    (header,) = sealer.seal([KEY], [memoryview(PAYLOAD)]).headers
    buffers = [memoryview(bytearray(len(PAYLOAD)))]
    rooms = direct.rooms(buffers)
    rooms[0][:] = PAYLOAD
    assert direct.open([header], [KEY], rooms, buffers) == [None]
    assert buffers[0] == PAYLOAD
    stream = direct.open_stream(KEY, buffers[0])
    for start in range(0, len(PAYLOAD), 1000):
        room = stream.room(start, min(start + 1000, len(PAYLOAD)))
        room[:] = PAYLOAD[start : start + 1000]
        stream.note(room)
    assert stream.verify(header) is None
    assert buffers[0] == PAYLOAD


def test_sequences_go_on_above_what_was_recovered(sealer):
    sealer.headers.continue_after(2**40)
    assert sealer.headers.parse(header_of(sealer, KEY, PAYLOAD)).sequence == 2**40 + 1


def test_both_roads_number_blocks_from_one_count(sealer):
    copying, payloads = sealer.through_huge_pages(), [memoryview(PAYLOAD)]
    roads = [sealer, sealer, sealer, copying, copying, sealer]
    headers = [road.seal([KEY], payloads).headers[0] for road in roads]
    numbers = [sealer.headers.parse(header).sequence for header in headers]
    assert numbers == sorted(set(numbers))


def test_other_key_slot_namespace(sealer):
    header = header_of(sealer, KEY, PAYLOAD, 7)
    assert sealer.verify(header, make_key(2), PAYLOAD, 7) is FailureCause.FOREIGN
    assert sealer.verify(header, KEY, PAYLOAD, 8) is FailureCause.FOREIGN
    for other in (Namespace({"model": "two"}), Namespace({"model": "one"}, b"epoch")):
        assert PlainSealer(other).verify(header, KEY, PAYLOAD, 7) is FailureCause.FOREIGN
        assert PlainSealer(other).headers.parse(header) is FailureCause.FOREIGN


def test_a_key_is_not_a_prefix_of_its_padding(sealer):
    header = header_of(sealer, KEY, PAYLOAD)
    assert sealer.verify(header, KEY + b"\0", PAYLOAD) is FailureCause.FOREIGN
    assert sealer.verify(header, KEY[:-1], PAYLOAD) is FailureCause.FOREIGN


def test_older_format(sealer):
    header = header_of(sealer, KEY, PAYLOAD)
    assert (
        sealer.headers.parse(resigned(header[:4] + bytes([FORMAT_VERSION + 1]) + header[5:])) is FailureCause.OLD_FORMAT
    )


def test_nothing(sealer):
    assert sealer.verify(bytes(128), KEY, PAYLOAD) is FailureCause.ABSENT


@pytest.mark.parametrize("header", [b"", b"KVTB", bytes(127), bytes(129), b"x" * 128])
def test_garbage(sealer, header):
    assert sealer.headers.parse(header) is FailureCause.CORRUPT


def test_every_bit_of_the_header_counts(sealer):
    header = header_of(sealer, KEY, PAYLOAD)
    for bit in range(HEADER_BYTES * 8):
        assert isinstance(sealer.headers.parse(flip_bit(header, bit)), FailureCause)


def test_a_payload_that_changed(sealer):
    header = header_of(sealer, KEY, PAYLOAD)
    for other in (flip_bit(PAYLOAD, 0), flip_bit(PAYLOAD, len(PAYLOAD) * 8 - 1), PAYLOAD[:-1], PAYLOAD + b"\0", b""):
        assert sealer.verify(header, KEY, other) is FailureCause.CORRUPT


@pytest.mark.parametrize("length", [0, 4, 69])
def test_keys_that_no_header_holds(sealer, length):
    with pytest.raises(KeyFormatError):
        header_of(sealer, b"k" * length, PAYLOAD)
    with pytest.raises(ValueError, match="slot"):
        header_of(sealer, KEY, PAYLOAD, 2**32)
