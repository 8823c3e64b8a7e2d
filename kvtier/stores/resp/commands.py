"""Batches of commands on one connection. Blocks are sealed when sent, and verified in place when received."""

from __future__ import annotations

import re
from binascii import hexlify, unhexlify
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain, cycle, repeat

from kvtier.keys import MAX_KEY_BYTES, MIN_KEY_BYTES, OffloadKey
from kvtier.stores.integrity.header import HEADER_BYTES
from kvtier.stores.integrity.sealing import Sealer
from kvtier.stores.resp.connections import Server
from kvtier.stores.resp.wire import BATCH_BYTES, Break, ConnectionBrokenError, Refused, Wire, parse_count
from kvtier.types import FailureCause

_MAX_SKIPPED = 4
"""Most bytes of a wrong value that are read and dropped, as a multiple of a value's length. For a longer one, the
connection is closed."""
_NO_PAYLOAD = memoryview(b"")
_GROUP = 32
"""Keys per EXISTS command, which returns the number of existing ones."""
_STORED = b"+OK\r\n"
"""The reply to a SET; no other one is shorter."""
_MAX_INFO_BYTES = 32 * 1024
"""Most bytes of an INFO section, which usually has 2 KiB."""
_MAX_SCANNED = 100_000
"""Most names in a page of a scan; a server sends about as many as it is asked to look at."""
_MAX_NAME_BYTES = 4096
_PATTERN = re.compile(rb"[*?\[\]\\^-]")
"""Characters that mean something in a pattern."""
_HEXADECIMAL = re.compile(rb"([0-9a-f]{2})+")
_ASKING = b"*1\r\n$6\r\nASKING\r\n"


class Outcome(Enum):
    """How a command ended that the server did not refuse."""

    DONE = "done"
    """The block was stored, read and verified, deleted, or exists."""
    NOT_HELD = "not held"
    """The block does not exist."""
    UNANSWERED = "unanswered"
    """The connection broke before the reply."""


Reply = Outcome | Refused | FailureCause
"""A FailureCause says why a received value is not valid, or why the command was not carried out."""


@dataclass(slots=True)
class Request:
    """One command for one block, and its reply.

    Attributes:
        name: the key on the server.
        buffer: the payload to send, or the memory for a received one; of that, the payload's part once it is verified.
        server: a server to which another one has redirected us; None for the one in the slot table.
        asking: the cluster moves the slot right now, and its old owner redirected us (ASK).
    """

    key: OffloadKey
    name: bytes
    buffer: memoryview = _NO_PAYLOAD
    server: Server | None = None
    asking: bool = False
    reply: Reply = Outcome.UNANSWERED


Operation = Callable[[Sequence[Wire], Sequence[Request]], None]
"""Sends commands to one server, and sets each request's reply as it arrives. If a connection breaks, the remaining
requests stay UNANSWERED."""


class Exchanges:
    """The commands for blocks of one length and namespace."""

    def __init__(
        self, sealer: Sealer, block_bytes: int, prefix: str, ttl_milliseconds: int | None, shorter_too: bool = False
    ) -> None:
        """Args:
        ttl_milliseconds: how long the server keeps a block after its last write; None for no limit.
        shorter_too: whether shorter payloads are read, too.
        """
        self._least_bytes = 1 if shorter_too else block_bytes
        self._sealer = sealer
        self._name_prefix = f"{prefix}:{sealer.namespace.fingerprint.hex()}:".encode()
        self._block_bytes = block_bytes
        self._most_in_batch = max(1, BATCH_BYTES // block_bytes)
        self._value_bytes = HEADER_BYTES + block_bytes
        self._value_line = b"$%d\r\n" % self._value_bytes
        self._ttl = ttl_milliseconds
        if ttl_milliseconds is None:
            self._set, self._set_end = b"*3\r\n$3\r\nSET\r\n", b"\r\n"
        else:
            digits = b"%d" % ttl_milliseconds
            self._set = b"*5\r\n$3\r\nSET\r\n"
            self._set_end = b"\r\n$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(digits), digits)

    def name(self, key: OffloadKey) -> bytes:
        """Return the name of a block's value on the server."""
        return self._name_prefix + hexlify(key)

    def write(self, wires: Sequence[Wire], requests: Sequence[Request]) -> None:
        """SET every block: first its payload, plain or encrypted, then its header. A plain payload is not copied.

        The next blocks are sealed while the server takes those before. They are sent at once after that, while they are
        in the processor's cache. Between two batches runs little code, since it starts with a cold cache each time; the
        rest comes before the first and after the last.
        """
        keys, payloads = [request.key for request in requests], [request.buffer for request in requests]
        heads, end = list(map(self._set_head, requests)), self._set_end
        asking = any(request.asking for request in requests)
        most, window = self._most_in_batch, self._window(wires)
        most = min(self._sealer.most_sealed(self._block_bytes) or most, most)
        unanswered: deque[tuple[Wire, Sequence[Request]]] = deque()
        for wire, start in zip(cycle(wires), range(0, len(requests), most), strict=False):
            if len(unanswered) == window:
                _await_stored(*unanswered.popleft(), asking)
            batch = slice(start, start + most)
            pieces: list[bytes | memoryview] = []
            sealed = self._sealer.seal(keys[batch], payloads[batch])
            for head, payload, header in zip(heads[batch], *sealed, strict=True):
                pieces += head, payload, header + end
            wire.send(pieces)
            unanswered.append((wire, requests[batch]))
        for sent in unanswered:
            _await_stored(*sent, asking)

    def read(self, wires: Sequence[Wire], requests: Sequence[Request]) -> None:
        """GET every block into its buffer, and verify it in place.

        The next batch is requested as soon as the bytes of one are here, before its last block is summed.
        """
        window = self._window(wires)
        batches = _batches(requests, self._most_in_batch)
        asked = [_packed(b"*2\r\n$3\r\nGET\r\n", batch) for batch in batches]
        for wire, commands in zip(cycle(wires), asked[:window], strict=False):
            wire.send([commands])
        # The window is the same for each connection, so the batch that follows on one is a window later.
        for wire, batch, following in zip(cycle(wires), batches, chain(asked[window:], repeat(b"")), strict=False):
            for request in batch[:-1]:
                self._receive(wire, request)
            self._receive(wire, batch[-1], following)

    def batches_of(self, num_blocks: int) -> int:
        """Return how many batches so many blocks are."""
        return -(-num_blocks // self._most_in_batch)

    def _window(self, wires: Sequence[Wire]) -> int:
        """Return how many batches are on their way at most, as many on each connection.

        While the server is busy with one, the next is there. All connections together keep the network busy.
        """
        return len(wires) * -(-wires[0].in_flight_bytes // (self._most_in_batch * self._block_bytes))

    def _receive(self, wire: Wire, request: Request, following: bytes = b"") -> None:
        """Receive the reply to a GET, send the `following` commands, and verify the block."""
        line = _status(wire, request, len(self._value_line))
        payload_bytes = self._payload_bytes(line)
        if not payload_bytes:
            self._note_no_value(wire, request, line)
            if following:
                wire.send([following])
            return
        payload = request.buffer[:payload_bytes]
        stream = self._sealer.open_stream(request.key, payload)
        room = stream.room(0, payload_bytes)
        wire.fill(room, HEADER_BYTES + 2)
        header = wire.take(HEADER_BYTES, 0)
        if following:
            wire.send([following])
        stream.note(room)
        request.reply = _verified(stream.verify(header))
        if request.reply is Outcome.DONE and payload_bytes < self._least_bytes:
            request.reply = FailureCause.CORRUPT
        request.buffer = payload

    def find(self, wires: Sequence[Wire], requests: Sequence[Request]) -> None:
        """Ask with one EXISTS per block whether it exists."""
        self._ask(wires[0], b"*2\r\n$6\r\nEXISTS\r\n", requests)

    def look(self, wire: Wire, keys: Sequence[OffloadKey]) -> list[bool | None]:
        """Return which of `keys`, all of one length, exist on a single server; None where it refused to answer.

        One EXISTS per group of keys is much cheaper than one per key. The keys of a prefix are usually stored up to
        some point, so that all groups but one exist completely or not at all. Only the other groups are asked key by
        key.
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

    def keep(self, wires: Sequence[Wire], requests: Sequence[Request]) -> None:
        """TOUCH the blocks, which makes them the server's most recently used; if they expire, begin their time anew."""
        if self._ttl is None:
            self._ask(wires[0], b"*2\r\n$5\r\nTOUCH\r\n", requests)
            return
        digits = b"%d" % self._ttl
        commands = [
            (_ASKING if request.asking else b"") + b"*3\r\n$7\r\nPEXPIRE\r\n%b%b" % (_bulk(request.name), _bulk(digits))
            for request in requests
        ]
        self._answer(wires[0], b"".join(commands), requests)

    def delete(self, wires: Sequence[Wire], requests: Sequence[Request]) -> None:
        """UNLINK the blocks."""
        self._ask(wires[0], b"*2\r\n$6\r\nUNLINK\r\n", requests)

    def scan(self, wire: Wire, cursor: int, count: int) -> tuple[int, list[OffloadKey]] | Refused:
        """SCAN some of the server's names; return the next cursor, 0 at the end, and the keys of blocks among them.

        Args:
            count: about how many names the server looks at.
        """
        pattern = _PATTERN.sub(rb"\\\g<0>", self._name_prefix) + b"*"
        parts = (b"SCAN", b"%d" % cursor, b"MATCH", pattern, b"COUNT", b"%d" % count)
        wire.send([b"*%d\r\n" % len(parts) + b"".join(map(_bulk, parts))])
        line = wire.line()
        if line[:1] == b"-":
            return Refused.parse(line[1:])
        if line != b"*2":
            raise ConnectionBrokenError(Break.GARBAGE, "a reply that is no page of names")
        following = parse_count(_text(wire))
        number = parse_count(wire.line()[1:])
        if following is None or number is None or number > _MAX_SCANNED:
            raise ConnectionBrokenError(Break.GARBAGE, "a reply that is no page of names")
        return following, [key for _ in range(number) if (key := self._key(_text(wire))) is not None]

    def _key(self, name: bytes) -> OffloadKey | None:
        """Return the key of a block's name; None if it is no such name."""
        digits = name.removeprefix(self._name_prefix)
        is_block = len(digits) < len(name) and MIN_KEY_BYTES <= len(digits) / 2 <= MAX_KEY_BYTES
        return OffloadKey(unhexlify(digits)) if is_block and _HEXADECIMAL.fullmatch(digits) else None

    def _ask(self, wire: Wire, command: bytes, requests: Sequence[Request]) -> None:
        self._answer(wire, _packed(command, requests), requests)

    def _answer(self, wire: Wire, commands: bytes, requests: Sequence[Request]) -> None:
        """Send one command per request, and take the answers, each 0, 1 or an error."""
        wire.send([commands])
        if any(request.asking for request in requests):
            for request in requests:
                line = _status(wire, request)
                request.reply = Refused.parse(line[1:]) if line[:1] == b"-" else _flag(line == b":1")
        else:
            for request, flag in zip(requests, wire.flags(len(requests)), strict=True):
                request.reply = flag if isinstance(flag, Refused) else _flag(flag)

    def _counting(self, keys: Sequence[OffloadKey]) -> bytes:
        """Return the EXISTS command that counts the existing ones of `keys`."""
        return b"*%d\r\n$6\r\nEXISTS%b\r\n" % (1 + len(keys), self._names(b"", keys))

    def _asking_each(self, keys: Sequence[OffloadKey]) -> bytes:
        """Return an EXISTS command for each of `keys`."""
        return self._names(b"\r\n*2\r\n$6\r\nEXISTS", keys)[2:] + b"\r\n"

    def _names(self, command: bytes, keys: Sequence[OffloadKey]) -> bytes:
        """Return `command` followed by a name, for each of `keys`."""
        length = len(keys[0])
        before = b"%b\r\n$%d\r\n%b" % (command, len(self._name_prefix) + 2 * length, self._name_prefix)
        return before + hexlify(b"".join(keys), b"|", -length).replace(b"|", before)

    def _set_head(self, request: Request) -> bytes:
        """Return the part of a SET command before the payload."""
        whole = request.buffer.nbytes == self._block_bytes
        line = self._value_line if whole else b"$%d\r\n" % (HEADER_BYTES + request.buffer.nbytes)
        return (_ASKING if request.asking else b"") + self._set + _bulk(request.name) + line

    def _payload_bytes(self, line: bytes) -> int:
        """Return the length of the payload in the value that a line announces; 0 if it is no block's value."""
        if line == self._value_line[:-2]:
            return self._block_bytes
        length = parse_count(line[1:]) if line[:1] == b"$" else None
        payload_bytes = 0 if length is None else length - HEADER_BYTES
        return payload_bytes if 0 < payload_bytes < self._block_bytes else 0

    def _note_no_value(self, wire: Wire, request: Request, line: bytes) -> None:
        """Set the reply for a line that announces no value of the right length; skip a value of another length."""
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
            raise ConnectionBrokenError(Break.GARBAGE, "a reply that is not a value")
        if length > _MAX_SKIPPED * self._value_bytes:
            raise ConnectionBrokenError(Break.CLOSED, "a value that is far too long")
        wire.skip(length)


def ask_memory(wire: Wire) -> tuple[int, int] | Refused | None:
    """Return the bytes that a server uses, and its `maxmemory` (0: no limit); None if its answer has no such numbers.

    Source: https://valkey.io/commands/info/.
    """
    wire.send([b"*2\r\n$4\r\nINFO\r\n$6\r\nmemory\r\n"])
    line = wire.line()
    if line[:1] == b"-":
        return Refused.parse(line[1:])
    length = parse_count(line[1:])
    if line[:1] != b"$" or length is None or length > _MAX_INFO_BYTES:
        raise ConnectionBrokenError(Break.GARBAGE, "a reply that is not text")
    fields = dict(row.partition(b":")[::2] for row in wire.take(length, 0).splitlines())
    used, limit = (parse_count(fields.get(name, b"")) for name in (b"used_memory", b"maxmemory"))
    return None if used is None or limit is None else (used, limit)


def _text(wire: Wire) -> bytes:
    """Receive a short text."""
    line = wire.line()
    length = parse_count(line[1:])
    if line[:1] != b"$" or length is None or length > _MAX_NAME_BYTES:
        raise ConnectionBrokenError(Break.GARBAGE, "a reply that is not a short text")
    return wire.take(length, _MAX_NAME_BYTES)


def _verified(cause: FailureCause | None) -> Reply:
    if cause is None:
        return Outcome.DONE
    return FailureCause.CORRUPT if cause is FailureCause.ABSENT else cause


def _batches(requests: Sequence[Request], most: int) -> list[Sequence[Request]]:
    return [requests[start : start + most] for start in range(0, len(requests), most)]


def _bulk(text: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(text), text)


def _packed(command: bytes, requests: Sequence[Request]) -> bytes:
    return b"".join(
        [
            (_ASKING if request.asking else b"") + b"%b$%d\r\n%b\r\n" % (command, len(request.name), request.name)
            for request in requests
        ]
    )


def _await_stored(wire: Wire, requests: Sequence[Request], asking: bool) -> None:
    """Receive the replies to SET; args: asking: replies to ASKING are among them."""
    if not asking and wire.take_if(_STORED * len(requests)):
        for request in requests:
            request.reply = Outcome.DONE
        return
    for request in requests:
        line = _status(wire, request)
        request.reply = Refused.parse(line[1:]) if line[:1] == b"-" else _expect(line, b"+OK")


def _status(wire: Wire, request: Request, *most: int) -> bytes:
    """Return the line that answers a request; drop the reply to ASKING before it."""
    if request.asking:
        wire.line(*most)
    return wire.line(*most)


def _expect(line: bytes, expected: bytes) -> Reply:
    if line != expected:
        raise ConnectionBrokenError(Break.GARBAGE, "a reply that does not answer the command")
    return Outcome.DONE


def _flag(held: bool) -> Reply:
    return Outcome.DONE if held else Outcome.NOT_HELD
