"""What is encoded decodes to the same; whatever else arrives is a ProtocolError, never anything worse."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import ProtocolError
from kvtier.executors.codec import MAX_MESSAGE_BYTES, blocks_per_message, decode, encode, encode_head
from kvtier.executors.messages import (
    MAX_REASON_CHARACTERS,
    CancelWaiting,
    IndexBatch,
    IndexEnd,
    Options,
    Part,
    PartResult,
    Prepared,
    Probe,
    ProbeAnswer,
    Ready,
    Several,
    Unavailable,
)
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
    return Part(
        draw(U64), draw(U32), draw(st.booleans()), keys, arena_slots, draw(st.sampled_from([None, store_slots]))
    )


BITS = st.lists(st.booleans(), min_size=1, max_size=200)
MESSAGES = st.one_of(
    st.builds(Options, st.dictionaries(st.text(), st.one_of(st.integers(-(2**53), 2**53), st.text(), st.booleans()))),
    st.builds(Ready, U32),
    st.builds(Unavailable, st.text(st.characters(exclude_categories=["Cs"]), max_size=MAX_REASON_CHARACTERS)),
    blocks(1).map(lambda drawn: IndexBatch(drawn[1], drawn[0])),
    st.just(IndexEnd()),
    parts(),
    st.builds(
        PartResult,
        U64,
        U32,
        BITS,
        U64,
        st.floats(0, 1e9),
        st.dictionaries(st.sampled_from(FailureCause), U32),
    ),
    blocks(0).map(lambda drawn: Probe(7, drawn[0])),
    st.builds(ProbeAnswer, U64, BITS, st.booleans()),
    st.just(CancelWaiting()),
    st.builds(Prepared, U64, U64),
)


@given(MESSAGES)
def test_every_message_survives_the_wire(message):
    assert decode(encode(message)) == message


@given(st.lists(MESSAGES, min_size=1, max_size=8))
def test_messages_travel_together_in_their_order(messages):
    packet, count = encode_head(messages)
    message = decode(packet)
    assert len(packet) <= MAX_MESSAGE_BYTES
    assert list(message.messages if isinstance(message, Several) else [message]) == messages[:count]
    assert count == len(messages) or len(encode(Several(messages[: count + 1]))) > MAX_MESSAGE_BYTES


def test_what_does_not_fit_waits_for_the_next_packet():
    big = Part(1, 0, True, [bytes([number]) * 68 for number in range(200)] * 2, range(400), range(400))
    packet, count = encode_head([big] * 5)
    assert (count, decode(packet)) == (2, Several([decode(encode(big))] * 2))


def test_packets_do_not_nest():
    inner = encode(Several([IndexEnd(), CancelWaiting()]))
    packet = inner[:1] + 2 * (len(inner).to_bytes(4, "little") + inner)
    for garbage in (packet, inner[:1], inner[:-1], inner + b"\0", inner[:6]):
        with pytest.raises(ProtocolError):
            decode(garbage)


@given(st.binary(max_size=300))
def test_garbage_is_a_protocol_error(packet):
    try:
        message = decode(packet)
    except ProtocolError:
        return
    assert decode(encode(message)) == message


@given(MESSAGES, st.data())
def test_a_damaged_message_is_another_one_or_a_protocol_error(message, data):
    packet = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        packet[data.draw(st.integers(0, len(packet) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        decode(bytes(packet))


@given(st.one_of(parts(), blocks(0).map(lambda drawn: Probe(7, drawn[0]))), st.data())
def test_a_message_cut_or_grown_is_a_protocol_error(message, data):
    packet = encode(message)
    with pytest.raises(ProtocolError):
        decode(packet[: data.draw(st.integers(0, len(packet) - 1))])
    with pytest.raises(ProtocolError):
        decode(packet + b"\0")


@pytest.mark.parametrize("key_bytes", [5, 20, 36, 68])
def test_as_many_blocks_as_fit_a_message_fit_it(key_bytes):
    count = blocks_per_message(key_bytes)
    part = Part(1, 0, True, [bytes(key_bytes)] * count, range(count), range(count))
    assert len(encode(part)) <= MAX_MESSAGE_BYTES
    assert decode(encode(part)).keys == part.keys


@pytest.mark.parametrize(
    "message",
    [
        Part(1, 0, True, [b"12345"], [2**32], [0]),
        Part(1, 0, True, [b"12345"], [-1], [0]),
        Part(1, 0, True, [b"12345", b"123456"], [1, 2], None),
        Part(1, 0, True, [b"12345"], [1, 2], None),
        Part(-1, 0, True, [b"12345"], [1], None),
        Probe(1, [b"x" * 36] * 3000),
        Options({"a": float("nan")}),
        Options({"a": object()}),
        Options({"a": "x" * 70_000}),
    ],
)
def test_what_does_not_fit_is_refused(message):
    with pytest.raises(ProtocolError):
        encode(message)


@pytest.mark.parametrize("text", [b"[]", b"{", b'{"a": NaN}', b"\xff", b"[" * 50_000])
def test_options_that_are_none_are_a_protocol_error(text):
    with pytest.raises(ProtocolError):
        decode(b"\1" + text)


def test_a_long_reason_is_cut():
    assert len(decode(encode(Unavailable("é" * 5000))).reason) == MAX_REASON_CHARACTERS
