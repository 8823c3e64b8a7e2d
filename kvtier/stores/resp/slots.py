"""Asks a cluster for the owners of its slots: CLUSTER SLOTS (https://valkey.io/commands/cluster-slots/).

A server's reply is untrusted, so its size and depth are bounded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kvtier.stores.resp.wire import Break, ConnectionBrokenError, Refused, Wire, parse_count

NUM_SLOTS = 16384
_QUESTION = b"*2\r\n$7\r\nCLUSTER\r\n$5\r\nSLOTS\r\n"
_MAX_DEPTH = 4
_MAX_ITEMS = 1 << 20
"""Most items in the whole reply: enough for 16,384 ranges of one slot with a dozen replicas each."""
_MAX_TEXT_BYTES = 1024
_MAX_PORT = 65535
_UNKNOWN_HOSTS = (None, b"", b"?")


class SlotRange(NamedTuple):
    """Slots `first` to `last` and their primary server. A host of "" stands for the server that was asked."""

    first: int
    last: int
    host: str
    port: int


def ask_slots(wire: Wire) -> list[SlotRange]:
    """Return the ranges of all slots.

    Raises:
        ConnectionBrokenError: the server refused, or its reply is not valid.
    """
    wire.send([_QUESTION])
    ranges = _Reader(wire).value()
    if not isinstance(ranges, list):
        raise _garbage()
    return [_range_of(entry) for entry in ranges]


def parse_port(text: str) -> int | None:
    """Return a port's number; None for anything else."""
    port = parse_count(text.encode("utf-8", "replace"))
    return port if port is not None and 0 < port <= _MAX_PORT else None


def _range_of(entry: Any) -> SlotRange:
    match entry:
        case [int(first), int(last), [host, int(port), *_], *_] if 0 <= first <= last < NUM_SLOTS:
            if host in _UNKNOWN_HOSTS:
                host = b""
            if isinstance(host, bytes) and 0 < port <= _MAX_PORT:
                return SlotRange(first, last, host.decode("ascii", "replace"), port)
    raise _garbage()


class _Reader:
    """Reads one reply of any type, within the bounds."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._items_left = _MAX_ITEMS

    def value(self, depth: int = 0) -> Any:
        line = self._wire.line()
        kind, count = line[:1], parse_count(line[1:])
        self._items_left -= 1
        if kind == b"-":
            raise ConnectionBrokenError(Break.REFUSED, str(Refused.parse(line[1:])))
        if line in (b"$-1", b"*-1"):
            return None
        if count is None or self._items_left < 0 or depth > _MAX_DEPTH:
            raise _garbage()
        if kind == b":":
            return count
        if kind == b"$" and count <= _MAX_TEXT_BYTES:
            return self._wire.take(count, 0)
        if kind == b"*" and count <= self._items_left:
            return [self.value(depth + 1) for _ in range(count)]
        raise _garbage()


def _garbage() -> ConnectionBrokenError:
    return ConnectionBrokenError(Break.GARBAGE, "a reply that is not a table of slots")
