"""Batches of commands on one connection: blocks go out sealed, and come back verified, in place."""

from __future__ import annotations

from binascii import hexlify
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from kvtier.keys import OffloadKey
from kvtier.stores.integrity.header import HEADER_BYTES
from kvtier.stores.integrity.sealing import Sealer
from kvtier.stores.resp.connections import Server
from kvtier.stores.resp.wire import Break, ConnectionBrokenError, Refused, Wire, parse_count
from kvtier.types import FailureCause

_MAX_SKIPPED = 4
"""Times the length of a value: a longer reply is not received, the connection is closed instead."""
_NO_PAYLOAD = memoryview(b"")
_GROUP = 32
"""Blocks whose existence is counted at once."""
_AHEAD_BYTES = 512 * 1024
"""Asked for before they are received: enough to keep a connection busy, and no pile in the server's memory."""
_SENT_BYTES = 256 * 1024
"""Of payloads, sent at once."""
_LATE_BYTES = 256 * 1024
"""Of a large block, still to be received when the next one is asked for: the server copies it out meanwhile."""
_MAX_INFO_BYTES = 32 * 1024
"""Of a section of INFO, which has some 2 KiB."""
_ASKING = b"*1\r\n$6\r\nASKING\r\n"


class Outcome(Enum):
    """How a command ended that the server did not refuse."""

    DONE = "done"
    """Stored, verified, deleted, or held."""
    NOT_HELD = "not held"
    UNANSWERED = "unanswered"
    """The connection broke before the reply."""


Reply = Outcome | Refused | FailureCause
"""A FailureCause is of a value that was received and is no block of this key and namespace."""


@dataclass(slots=True)
class Request:
    """One command about one block, and what became of it.

    Attributes:
        name: the key on the server.
        buffer: the payload to send, or where to put it.
        server: where a server sent us, instead of the one that should have the block.
        asking: the slot moves right now, and its new owner was named by its old one.
    """

    key: OffloadKey
    name: bytes
    buffer: memoryview = _NO_PAYLOAD
    server: Server | None = None
    asking: bool = False
    reply: Reply = Outcome.UNANSWERED


Operation = Callable[[Wire, Sequence[Request]], None]
"""Sends the commands of a batch and notes each reply as it arrives; a broken connection leaves the rest UNANSWERED."""


class Exchanges:
    """What is said about blocks of one length and namespace."""

    def __init__(self, sealer: Sealer, block_bytes: int, prefix: str, ttl_milliseconds: int | None) -> None:
        """Args: ttl_milliseconds: how long the server keeps a block after its last writing; None for ever."""
        self._sealer = sealer
        self._name_prefix = f"{prefix}:{sealer.namespace.fingerprint.hex()}:".encode()
        self._block_bytes = block_bytes
        self._value_bytes = HEADER_BYTES + block_bytes
        self._value_line = b"$%d\r\n" % self._value_bytes
        self._ahead = max(1, _AHEAD_BYTES // block_bytes)
        if ttl_milliseconds is None:
            self._set, self._set_end = b"*3\r\n$3\r\nSET\r\n", b"\r\n"
        else:
            digits = b"%d" % ttl_milliseconds
            self._set = b"*5\r\n$3\r\nSET\r\n"
            self._set_end = b"\r\n$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(digits), digits)

    def name(self, key: OffloadKey) -> bytes:
        """Return the name of a block's value on the server."""
        return self._name_prefix + hexlify(key)

    def write(self, wire: Wire, requests: Sequence[Request]) -> None:
        """SET every block: its payload leaves from where it is, or encrypted, and its header follows.

        A large piece is summed when it has been sent: the processor's cache has it by then, and the server works. What
        stands before a large payload goes ahead of it: the server finds room for it while the first piece is sent.
        """
        heads = [self._set_head(request) for request in requests]  # before payloads have emptied the caches
        pieces: list[bytes | memoryview] = []
        gathered = 0
        for head, request in zip(heads, requests, strict=True):
            pieces.append(head)
            if self._block_bytes >= _SENT_BYTES:
                wire.send(pieces)
                pieces, gathered = [], 0
            stream = self._sealer.seal_stream(request.key, self._block_bytes)
            for start in range(0, self._block_bytes, _SENT_BYTES):
                piece = request.buffer[start : start + _SENT_BYTES]
                pieces.append(stream.take(piece))
                gathered += piece.nbytes
                if gathered >= _SENT_BYTES:
                    wire.send(pieces)
                    pieces, gathered = [], 0
                stream.note(piece)
            pieces.append(stream.header() + self._set_end)
        wire.send(pieces)
        for request in requests:
            line = _status(wire, request)
            request.reply = Refused.parse(line[1:]) if line[:1] == b"-" else _expect(line, b"+OK")

    def read(self, wire: Wire, requests: Sequence[Request]) -> None:
        """GET every block into its buffer, and verify it there."""
        gets = [_packed(b"*2\r\n$3\r\nGET\r\n", [request]) for request in requests]
        wire.send([b"".join(gets[: self._ahead])])
        most = len(self._value_line)
        late = max(0, self._block_bytes - _LATE_BYTES)
        for number, request in enumerate(requests):
            line = _status(wire, request, most)
            stream = self._sealer.open_stream(request.key, request.buffer)
            is_value = line == self._value_line[:-2]
            if is_value and late:
                wire.fill(stream.room(0, late), stream.note)
            if number + self._ahead < len(requests):
                wire.send([gets[number + self._ahead]])
            if is_value:
                wire.fill(stream.room(late, self._block_bytes), stream.note, HEADER_BYTES + 2)
                request.reply = _verified(stream.verify(wire.take(HEADER_BYTES, 0)))
            else:
                self._note_no_value(wire, request, line)

    def find(self, wire: Wire, requests: Sequence[Request]) -> None:
        """Ask whether each block is held."""
        self._ask(wire, b"*2\r\n$6\r\nEXISTS\r\n", requests)

    def look(self, wire: Wire, keys: Sequence[OffloadKey]) -> list[bool | None]:
        """Return which of `keys`, all of one length, a single server holds; None where it refused to say.

        Groups are counted first, which is far cheaper than one question a block: of a prefix, all groups but one are
        held whole or not at all. The blocks of the others are asked for one by one.
        """
        groups = [keys[start : start + _GROUP] for start in range(0, len(keys), _GROUP)]
        wire.send([self._counting(group) for group in groups])
        held: list[bool | None] = []
        for group, count in zip(groups, wire.integers(len(groups)), strict=True):
            held += [None if count not in (0, len(group)) else count != 0] * len(group)
        unclear = [index for index, answer in enumerate(held) if answer is None]
        if unclear:
            wire.send([self._asking_each([keys[index] for index in unclear])])
            for index, flag in zip(unclear, wire.flags(len(unclear)), strict=True):
                held[index] = None if isinstance(flag, Refused) else flag
        return held

    def delete(self, wire: Wire, requests: Sequence[Request]) -> None:
        """Let the server forget the blocks."""
        self._ask(wire, b"*2\r\n$6\r\nUNLINK\r\n", requests)

    def _ask(self, wire: Wire, command: bytes, requests: Sequence[Request]) -> None:
        wire.send([_packed(command, requests)])
        if any(request.asking for request in requests):
            for request in requests:
                line = _status(wire, request)
                request.reply = Refused.parse(line[1:]) if line[:1] == b"-" else _flag(line == b":1")
        else:
            for request, flag in zip(requests, wire.flags(len(requests)), strict=True):
                request.reply = flag if isinstance(flag, Refused) else _flag(flag)

    def _counting(self, keys: Sequence[OffloadKey]) -> bytes:
        """Return the command that counts which of `keys` are held."""
        return b"*%d\r\n$6\r\nEXISTS%b\r\n" % (1 + len(keys), self._names(b"", keys))

    def _asking_each(self, keys: Sequence[OffloadKey]) -> bytes:
        """Return the commands that ask for each of `keys`."""
        return self._names(b"\r\n*2\r\n$6\r\nEXISTS", keys)[2:] + b"\r\n"

    def _names(self, command: bytes, keys: Sequence[OffloadKey]) -> bytes:
        """Return `command` and a name, for each of `keys`."""
        length = len(keys[0])
        before = b"%b\r\n$%d\r\n%b" % (command, len(self._name_prefix) + 2 * length, self._name_prefix)
        return before + hexlify(b"".join(keys), b"|", -length).replace(b"|", before)

    def _set_head(self, request: Request) -> bytes:
        """Return what is sent before a payload."""
        return (_ASKING if request.asking else b"") + self._set + _bulk(request.name) + self._value_line

    def _note_no_value(self, wire: Wire, request: Request, line: bytes) -> None:
        """Note what a line says that announces no value of the right length; a value of another is skipped."""
        if line[:1] == b"-":
            request.reply = Refused.parse(line[1:])
        elif line == b"$-1":
            request.reply = Outcome.NOT_HELD
        else:
            request.reply = FailureCause.CORRUPT
            self._skip(wire, line)

    def _skip(self, wire: Wire, line: bytes) -> None:
        length = parse_count(line[1:])
        if line[:1] != b"$" or length is None:
            raise ConnectionBrokenError(Break.GARBAGE, "a reply that is no value")
        if length > _MAX_SKIPPED * self._value_bytes:
            raise ConnectionBrokenError(Break.CLOSED, "a value that is far too long")
        wire.skip(length)


def ask_memory(wire: Wire) -> tuple[int, int] | None:
    """Return the bytes that a server holds, and its `maxmemory` (0: no limit); None where it does not say.

    Source: https://valkey.io/commands/info/.
    """
    wire.send([b"*2\r\n$4\r\nINFO\r\n$6\r\nmemory\r\n"])
    line = wire.line()
    if line[:1] == b"-":
        return None
    length = parse_count(line[1:])
    if line[:1] != b"$" or length is None or length > _MAX_INFO_BYTES:
        raise ConnectionBrokenError(Break.GARBAGE, "a reply that is no text")
    fields = dict(row.partition(b":")[::2] for row in wire.take(length, 0).splitlines())
    used, limit = (parse_count(fields.get(name, b"")) for name in (b"used_memory", b"maxmemory"))
    return None if used is None or limit is None else (used, limit)


def _verified(cause: FailureCause | None) -> Reply:
    if cause is None:
        return Outcome.DONE
    return FailureCause.CORRUPT if cause is FailureCause.ABSENT else cause


def _bulk(text: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(text), text)


def _packed(command: bytes, requests: Sequence[Request]) -> bytes:
    return b"".join(
        [
            (_ASKING if request.asking else b"") + b"%b$%d\r\n%b\r\n" % (command, len(request.name), request.name)
            for request in requests
        ]
    )


def _status(wire: Wire, request: Request, *most: int) -> bytes:
    """Return the line that answers a request; what a server says about ASKING is not interesting."""
    if request.asking:
        wire.line(*most)
    return wire.line(*most)


def _expect(line: bytes, expected: bytes) -> Reply:
    if line != expected:
        raise ConnectionBrokenError(Break.GARBAGE, "a reply that does not answer the command")
    return Outcome.DONE


def _flag(held: bool) -> Reply:
    return Outcome.DONE if held else Outcome.NOT_HELD
