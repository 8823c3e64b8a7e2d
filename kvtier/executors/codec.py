"""The bytes of a message between a tier and its I/O process: small, binary, strictly decoded.

Each is one packet on a local sequenced-packet socket, at most MAX_MESSAGE_BYTES long, little endian: one
byte of type, a fixed head, then columns. No pickles: a peer that went mad can only be wrong, never run code.
Whatever does not decode exactly is a ProtocolError, which both sides treat as the other's death.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

from kvtier.errors import ProtocolError
from kvtier.executors.columns import join_keys, pack_bits, pack_slots, split_keys, unpack_bits, unpack_slots
from kvtier.executors.messages import (
    MAX_REASON_CHARACTERS,
    CancelWaiting,
    IndexBatch,
    IndexEnd,
    Message,
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

MAX_MESSAGE_BYTES = 64 * 1024
"""Longest packet: sockets refuse more than about 200 KiB, and small ones keep both queues moving."""

_MOST_TOGETHER = 256
"""Messages in one packet."""

_CAUSES = tuple(FailureCause)
_CAUSE_INDEX = {cause: index for index, cause in enumerate(_CAUSES)}

_OPTIONS, _READY, _UNAVAILABLE, _INDEX, _INDEX_END, _PART, _RESULT, _PROBE, _ANSWER, _CANCEL = range(1, 11)
_PREPARED, _SEVERAL = 11, 12


_PART_HEAD = struct.Struct("<BBBBIQI")
_RESULT_HEAD = struct.Struct("<BBIQIQd")
_FAILURE = struct.Struct("<BI")
_PROBE_HEAD = struct.Struct("<BBIQ")
_ANSWER_HEAD = struct.Struct("<BBIQ")
_KEYS_HEAD = struct.Struct("<BBI")
_READY_BODY = struct.Struct("<BI")
_PREPARED_BODY = struct.Struct("<BQQ")
_LENGTH = struct.Struct("<I")


def blocks_per_message(key_bytes: int) -> int:
    """Return the most blocks, with two slots each, that fit one message."""
    return (MAX_MESSAGE_BYTES - _PART_HEAD.size) // (key_bytes + 8)


def encode(message: Message) -> bytes:
    """Return the packet of a message.

    Raises:
        ProtocolError: it does not fit one packet, or a value does not fit its field.
    """
    try:
        packet = _ENCODERS[type(message)](message)
    except (struct.error, OverflowError, ValueError, TypeError, KeyError) as error:
        raise ProtocolError(f"{type(message).__name__} cannot be encoded: {error}") from error
    if len(packet) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"{type(message).__name__} of {len(packet)} bytes: {MAX_MESSAGE_BYTES} allowed")
    return packet


def encode_head(messages: Iterable[Message]) -> tuple[bytes, int]:
    """Return one packet with the first of `messages`, as many as fit, and how many these are.

    Raises:
        ProtocolError: as `encode`.
    """
    packets: list[bytes] = []
    length = 1
    for message in islice(messages, _MOST_TOGETHER):
        packet = encode(message)
        length += _LENGTH.size + len(packet)
        if packets and length > MAX_MESSAGE_BYTES:
            break
        packets.append(packet)
    return (packets[0] if len(packets) == 1 else _join_packets(packets)), len(packets)


def decode(packet: bytes) -> Message:
    """Return the message in a packet.

    Raises:
        ProtocolError: the packet is not exactly what `encode` makes.
    """
    if not 0 < len(packet) <= MAX_MESSAGE_BYTES:
        raise ProtocolError(f"packet of {len(packet)} bytes")
    decoder = _DECODERS.get(packet[0])
    if decoder is None:
        raise ProtocolError(f"unknown message type {packet[0]}")
    try:
        return decoder(packet)
    except (struct.error, ValueError, IndexError, RecursionError) as error:
        raise ProtocolError(f"malformed message of type {packet[0]}: {error}") from error


def _flag(value: int) -> bool:
    if value > 1:
        raise ValueError(f"flag of {value}")
    return bool(value)


def _exact(packet: bytes, length: int) -> None:
    if len(packet) != length:
        raise ValueError(f"{len(packet)} bytes instead of {length}")


def _encode_options(message: Options) -> bytes:
    return bytes([_OPTIONS]) + json.dumps(dict(message.values), allow_nan=False).encode()


def _decode_options(packet: bytes) -> Options:
    values = json.loads(packet[1:].decode(), parse_constant=_no_constant)
    if not isinstance(values, dict):
        raise ValueError("options are no mapping")
    return Options(values)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _decode_ready(packet: bytes) -> Ready:
    return Ready(_READY_BODY.unpack(packet)[1])


def _encode_unavailable(message: Unavailable) -> bytes:
    return bytes([_UNAVAILABLE]) + message.reason[:MAX_REASON_CHARACTERS].encode(errors="replace")


def _decode_unavailable(packet: bytes) -> Unavailable:
    reason = packet[1:].decode()
    if len(reason) > MAX_REASON_CHARACTERS:
        raise ValueError("reason too long")
    return Unavailable(reason)


def _encode_index(message: IndexBatch) -> bytes:
    key_bytes, joined = join_keys(message.keys)
    if len(message.slots) != len(message.keys):
        raise ValueError("slots and keys differ in number")
    return _KEYS_HEAD.pack(_INDEX, key_bytes, len(message.keys)) + pack_slots(message.slots) + joined


def _decode_index(packet: bytes) -> IndexBatch:
    _, key_bytes, count = _KEYS_HEAD.unpack_from(packet)
    offset = _KEYS_HEAD.size
    keys = split_keys(packet, offset + 4 * count, count, key_bytes)
    return IndexBatch(unpack_slots(packet, offset, count), keys)


def _encode_part(message: Part) -> bytes:
    key_bytes, joined = join_keys(message.keys)
    count, slots = len(message.keys), message.store_slots
    if len(message.arena_slots) != count or (slots is not None and len(slots) != count):
        raise ValueError("slots and keys differ in number")
    head = _PART_HEAD.pack(_PART, message.is_load, slots is not None, key_bytes, count, message.serial, message.first)
    return b"".join((head, pack_slots(message.arena_slots), b"" if slots is None else pack_slots(slots), joined))


def _decode_part(packet: bytes) -> Part:
    _, is_load, has_slots, key_bytes, count, serial, first = _PART_HEAD.unpack_from(packet)
    offset, columns = _PART_HEAD.size, 2 if _flag(has_slots) else 1
    keys = split_keys(packet, offset + 4 * count * columns, count, key_bytes)
    arena_slots = unpack_slots(packet, offset, count)
    store_slots = unpack_slots(packet, offset + 4 * count, count) if has_slots else None
    return Part(serial, first, _flag(is_load), keys, arena_slots, store_slots)


def _encode_result(message: PartResult) -> bytes:
    head = _RESULT_HEAD.pack(
        _RESULT,
        len(message.failures),
        len(message.successes),
        message.serial,
        message.first,
        message.num_bytes,
        message.seconds,
    )
    causes = [_FAILURE.pack(_CAUSE_INDEX[cause], count) for cause, count in message.failures.items()]
    return b"".join((head, pack_bits(message.successes), *causes))


def _decode_result(packet: bytes) -> PartResult:
    _, num_causes, count, serial, first, num_bytes, seconds = _RESULT_HEAD.unpack_from(packet)
    successes = unpack_bits(packet, _RESULT_HEAD.size, count)
    offset = _RESULT_HEAD.size + (count + 7) // 8
    _exact(packet, offset + num_causes * _FAILURE.size)
    if not 0 <= seconds < float("inf"):
        raise ValueError("seconds")
    failures = {_CAUSES[index]: blocks for index, blocks in _FAILURE.iter_unpack(packet[offset:])}
    return PartResult(serial, first, successes, num_bytes, seconds, failures)


def _encode_probe(message: Probe) -> bytes:
    key_bytes, joined = join_keys(message.keys)
    return _PROBE_HEAD.pack(_PROBE, key_bytes, len(message.keys), message.probe_id) + joined


def _decode_probe(packet: bytes) -> Probe:
    _, key_bytes, count, probe_id = _PROBE_HEAD.unpack_from(packet)
    return Probe(probe_id, split_keys(packet, _PROBE_HEAD.size, count, key_bytes))


def _encode_answer(message: ProbeAnswer) -> bytes:
    head = _ANSWER_HEAD.pack(_ANSWER, message.failed, len(message.found), message.probe_id)
    return head + pack_bits(message.found)


def _decode_answer(packet: bytes) -> ProbeAnswer:
    _, failed, count, probe_id = _ANSWER_HEAD.unpack_from(packet)
    found = unpack_bits(packet, _ANSWER_HEAD.size, count)
    _exact(packet, _ANSWER_HEAD.size + (count + 7) // 8)
    return ProbeAnswer(probe_id, found, _flag(failed))


def _decode_bare(packet: bytes) -> IndexEnd | CancelWaiting:
    _exact(packet, 1)
    return IndexEnd() if packet[0] == _INDEX_END else CancelWaiting()


def _decode_prepared(packet: bytes) -> Prepared:
    _, done, total = _PREPARED_BODY.unpack(packet)
    return Prepared(done, total)


def _join_packets(packets: Sequence[bytes]) -> bytes:
    return bytes([_SEVERAL]) + b"".join([part for packet in packets for part in (_LENGTH.pack(len(packet)), packet)])


def _decode_several(packet: bytes) -> Several:
    messages, offset = [], 1
    while offset < len(packet):
        (length,) = _LENGTH.unpack_from(packet, offset)
        offset += _LENGTH.size
        inner = packet[offset : offset + length]
        if len(inner) != length or not length or inner[0] == _SEVERAL:
            raise ValueError("a packet within a packet")
        messages.append(decode(inner))
        offset += length
    if len(messages) < 2:
        raise ValueError(f"several are {len(messages)}")
    return Several(messages)


_ENCODERS: dict[type, Callable[[Any], bytes]] = {
    Options: _encode_options,
    Ready: lambda message: _READY_BODY.pack(_READY, message.num_slots),
    Unavailable: _encode_unavailable,
    IndexBatch: _encode_index,
    IndexEnd: lambda _: bytes([_INDEX_END]),
    Part: _encode_part,
    PartResult: _encode_result,
    Probe: _encode_probe,
    ProbeAnswer: _encode_answer,
    CancelWaiting: lambda _: bytes([_CANCEL]),
    Prepared: lambda message: _PREPARED_BODY.pack(_PREPARED, message.done, message.total),
    Several: lambda message: _join_packets([encode(inner) for inner in message.messages]),
}

_DECODERS: dict[int, Callable[[bytes], Message]] = {
    _OPTIONS: _decode_options,
    _READY: _decode_ready,
    _UNAVAILABLE: _decode_unavailable,
    _INDEX: _decode_index,
    _INDEX_END: _decode_bare,
    _PART: _decode_part,
    _RESULT: _decode_result,
    _PROBE: _decode_probe,
    _ANSWER: _decode_answer,
    _CANCEL: _decode_bare,
    _PREPARED: _decode_prepared,
    _SEVERAL: _decode_several,
}
