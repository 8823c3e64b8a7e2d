"""What is encoded decodes to the same; whatever else arrives is a ProtocolError, never anything worse."""

import contextlib
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import ProtocolError
from kvtier.executors.base import StoreDescription
from kvtier.executors.protocol import (
    MAX_MESSAGES,
    MAX_PACKET_BYTES,
    MAX_REASON_CHARACTERS,
    REPORTS,
    REQUESTS,
    Cancel,
    IndexBatch,
    IndexEnd,
    Open,
    Part,
    PartResult,
    Prepared,
    Probe,
    ProbeAnswer,
    Ready,
    Unavailable,
    Usage,
    blocks_per_packet,
    decode,
    encode,
)
from kvtier.namespace import Namespace
from kvtier.types import FailureCause

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)


def keys_of(count, length):
    return st.lists(st.binary(min_size=length, max_size=length), min_size=count, max_size=count)


@st.composite
def blocks(draw, columns):
    count = draw(st.integers(1, 40))
    slots = [draw(st.lists(U32, min_size=count, max_size=count)) for _ in range(columns)]
    return draw(keys_of(count, draw(st.integers(5, 68)))), *slots


@st.composite
def parts(draw):
    keys, arena_slots, store_slots = draw(blocks(2))
    store_slots = draw(st.sampled_from([None, store_slots]))
    return Part.of(draw(U64), draw(U32), draw(st.booleans()), keys, arena_slots, store_slots)


PROBES = blocks(0).map(lambda drawn: Probe.of(7, drawn[0]))
BITS = st.lists(st.booleans(), min_size=1, max_size=200)
SENT = st.one_of(
    st.builds(Open, st.binary(max_size=200)), parts(), PROBES, st.builds(Cancel, st.lists(U64, min_size=1, max_size=40))
)
REPORTED = st.one_of(
    st.builds(Ready, U32),
    st.builds(Unavailable, st.text(st.characters(exclude_categories=["Cs"]), max_size=MAX_REASON_CHARACTERS)),
    blocks(1).map(lambda drawn: IndexBatch.of(drawn[1], drawn[0])),
    st.just(IndexEnd()),
    st.builds(PartResult, U64, U32, BITS, U64, st.dictionaries(st.sampled_from(FailureCause), U32)),
    st.builds(ProbeAnswer, U64, BITS, st.booleans()),
    st.builds(Prepared, U64, U64),
    st.builds(Usage, st.none() | U64, st.none() | U64, st.none() | U64),
)
PACKETS = st.one_of(
    st.tuples(st.just(REQUESTS), st.lists(SENT, min_size=1, max_size=8)),
    st.tuples(st.just(REPORTS), st.lists(REPORTED, min_size=1, max_size=8)),
)


def in_range(message):
    """Whether a message is one that could have been made by its constructor and that both sides can work with."""
    for name in ("serial", "probe_id", "num_bytes", "done", "total"):
        assert 0 <= getattr(message, name, 0) < 2**64
    for name in ("first", "num_slots"):
        assert 0 <= getattr(message, name, 0) < 2**32
    if isinstance(message, Part | Probe | IndexBatch):
        assert message.keys
        assert {len(key) for key in message.keys} == {message.key_bytes}
        assert 5 <= message.key_bytes <= 68
    if isinstance(message, Part):
        assert len(message.keys) == len(message.arena_slots) == message.num_blocks
        assert message.store_slots is None or len(message.store_slots) == message.num_blocks
    if isinstance(message, IndexBatch):
        assert len(message.keys) == len(message.slots)
    if isinstance(message, PartResult | ProbeAnswer):
        flags = message.successes if isinstance(message, PartResult) else message.found
        assert flags
        assert all(flag is True or flag is False for flag in flags)
    if isinstance(message, PartResult):
        assert all(isinstance(cause, FailureCause) and 0 <= n < 2**32 for cause, n in message.failures.items())
    if isinstance(message, Unavailable):
        assert len(message.reason) <= MAX_REASON_CHARACTERS
    return True


@given(PACKETS)
def test_messages_survive_the_wire_in_their_order(drawn):
    direction, messages = drawn
    packet, count = encode(messages)
    assert len(packet) <= MAX_PACKET_BYTES
    assert decode(packet, direction) == messages[:count]
    assert count == len(messages)


@given(st.lists(st.integers(1, 800), min_size=1, max_size=12))
def test_a_packet_is_as_full_as_it_can_be(sizes):
    messages = [Part.of(1, 0, True, [bytes(68)] * size, range(size), range(size)) for size in sizes]
    length = [len(encode([message])[0]) - 1 for message in messages]
    packet, count = encode(messages)
    assert len(packet) <= MAX_PACKET_BYTES
    assert decode(packet, REQUESTS) == messages[:count]
    assert count == len(messages) or 3 + sum(length[: count + 1]) > MAX_PACKET_BYTES


def test_what_does_not_fit_waits_for_the_next_packet():
    big = Part.of(1, 0, True, [bytes([number]) * 68 for number in range(200)] * 2, range(400), range(400))
    packet, count = encode([big] * 5)
    assert (count, decode(packet, REQUESTS)) == (2, [big] * 2)
    packet, count = encode([Cancel([1])] * 1000)
    assert (count, decode(packet, REQUESTS)) == (MAX_MESSAGES, [Cancel([1])] * MAX_MESSAGES)


def test_a_packet_holds_messages_of_one_direction_and_nothing_else():
    requests, _ = encode([Cancel([1]), Cancel([2])])
    reports, _ = encode([IndexEnd(), Ready(3)])
    for direction, packet in (
        (REPORTS, requests),
        (REQUESTS, reports),
        (REQUESTS, b""),
        (REQUESTS, b"\x90"),
        (REQUESTS, b"\x91" + requests),
        (REQUESTS, requests[1:]),
        (REQUESTS, requests[:-1]),
        (REQUESTS, requests + b"\0"),
        (REQUESTS, b"\xdc\x01\x01" + requests[1:2] * (MAX_MESSAGES + 1)),
    ):
        with pytest.raises(ProtocolError):
            decode(packet, direction)


@pytest.mark.parametrize("direction", [REQUESTS, REPORTS])
@given(st.binary(max_size=300))
def test_garbage_is_a_protocol_error(direction, packet):
    try:
        messages = decode(packet, direction)
    except ProtocolError:
        return
    assert all(map(in_range, messages))
    assert decode(encode(messages)[0], direction) == messages


@given(PACKETS, st.data())
def test_a_damaged_packet_is_another_one_or_a_protocol_error(drawn, data):
    direction, messages = drawn
    packet = bytearray(encode(messages)[0])
    for _ in range(data.draw(st.integers(1, 3))):
        packet[data.draw(st.integers(0, len(packet) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        assert all(map(in_range, decode(bytes(packet), direction)))


@given(PACKETS, st.data())
def test_a_packet_cut_or_grown_is_a_protocol_error(drawn, data):
    direction, messages = drawn
    packet = encode(messages)[0]
    with pytest.raises(ProtocolError):
        decode(packet[: data.draw(st.integers(0, len(packet) - 1))], direction)
    with pytest.raises(ProtocolError):
        decode(packet + b"\0", direction)


HUGE = b"\xff\xff\xff\xff"


@pytest.mark.parametrize(
    ("direction", "packet"),
    [
        (REQUESTS, b"\xdd" + HUGE),
        (REQUESTS, b"\x91\xdd" + HUGE),
        (REQUESTS, b"\x91\x92\x01\xc6" + HUGE),
        (REPORTS, b"\x91\x96\x09\x00\x00\xdd" + HUGE),
        (REPORTS, b"\x91\x96\x09\x00\x00\x91\xc3\x00\xdf" + HUGE),
        (REPORTS, b"\x91\x92\x06\xdb" + HUGE),
        (REQUESTS, b"\x91" * 60_000),
        (REQUESTS, b"\x90" * 70_000),
    ],
)
def test_a_packet_that_promises_much_takes_little_memory(direction, packet):
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode(packet, direction)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("key_bytes", [5, 20, 36, 68])
@pytest.mark.parametrize("number", [0, 2**32 - 1])
def test_as_many_blocks_as_fit_a_packet_fit_it(key_bytes, number):
    count = blocks_per_packet(key_bytes)
    slots = [number] * count
    part = Part.of(number * 2**32, number, True, [bytes(key_bytes)] * count, slots, slots)
    assert decode(encode([part])[0], REQUESTS) == [part]
    index = IndexBatch.of(slots, [bytes(key_bytes)] * count)
    assert decode(encode([index])[0], REPORTS) == [index]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Part.of(1, 0, True, [b"12345"], [2**32], [0]),
        lambda: Part.of(1, 0, True, [b"12345"], [-1], [0]),
        lambda: Part.of(1, 0, True, [b"12345", b"123456"], [1, 2], None),
        lambda: Part.of(1, 0, True, [b"12345"], [1, 2], None),
        lambda: Part.of(1, 0, True, [b"12345"], [1], [1, 2]),
        lambda: Part.of(1, 0, True, [], [], None),
        lambda: Part(5, b"12345", 1, 0, True, bytes(4), b""),
        lambda: Part(5, b"123456", 1, 0, True, bytes(4), None),
        lambda: Part.of(2**64, 0, True, [b"12345"], [1], None),
        lambda: Probe.of(1, [b"x" * 36] * 3000),
        lambda: Probe.of(1, [b"x" * 4]),
        lambda: Probe.of(1, [b"x" * 69]),
        lambda: Open(b"x" * 70_000),
    ],
)
def test_what_does_not_fit_is_refused(make):
    with pytest.raises(ProtocolError):
        encode([make()])


@pytest.mark.parametrize(
    "message",
    [
        Part.of(-1, 0, True, [b"12345"], [1], None),
        Part.of(1, -1, True, [b"12345"], [1], None),
        Part.of(1, 2**32, True, [b"12345"], [1], None),
        Part.of(1, 0, 1, [b"12345"], [1], None),
        PartResult(-1, 0, [True]),
        PartResult(1, 0, []),
        PartResult(1, 0, [1]),
        PartResult(1, 0, [False], 0, {"bored": 1}),
        PartResult(1, 0, [False], 0, {FailureCause.CORRUPT: -1}),
        Unavailable("x" * (MAX_REASON_CHARACTERS + 1)),
        Ready(-1),
        Ready(2**32),
    ],
)
def test_values_out_of_range_are_refused_by_whoever_reads_them(message):
    direction = REQUESTS if isinstance(message, Part) else REPORTS
    with pytest.raises(ProtocolError):
        decode(encode([message])[0], direction)


def describe(options):
    return StoreDescription("module:Store", options, Namespace({"m": 1}, b"\1"), 4, 4096, threads=2, call_bytes=8192)


@given(st.dictionaries(st.text(), st.one_of(st.integers(-(2**70), 2**70), st.text(), st.booleans())))
def test_the_description_of_a_store_survives_the_wire(options):
    description = describe(options)
    assert StoreDescription.from_json(description.to_json()) == description


def test_a_path_that_is_no_utf_8_survives_the_wire():
    description = describe({"path": "/cache/\udcff"})
    (request,) = decode(encode([Open(description.to_json())])[0], REQUESTS)
    assert StoreDescription.from_json(request.description) == description


@pytest.mark.parametrize("value", [float("nan"), object(), b"bytes"])
def test_options_that_are_no_json_are_refused(value):
    with pytest.raises(ProtocolError):
        describe({"a": value}).to_json()


@pytest.mark.parametrize("text", [b"[]", b"{", b"{}", b'{"a": NaN}', b"\xff", b"[" * 50_000, b'{"path": 1}'])
def test_a_description_that_is_none_is_a_protocol_error(text):
    with pytest.raises(ProtocolError):
        StoreDescription.from_json(text)


def test_a_long_reason_is_cut_and_what_utf_8_cannot_say_is_replaced():
    (message,) = decode(encode([Unavailable.because("é\udcff" * 5000)])[0], REPORTS)
    assert message.reason == ("é?" * 5000)[:MAX_REASON_CHARACTERS]
