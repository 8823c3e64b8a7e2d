"""Sends commands and receives replies on one connection, without copying payloads.

It knows the part of RESP2 (https://valkey.io/topics/protocol/) that GET, SET, EXISTS and UNLINK need.
"""

from __future__ import annotations

import ssl
import struct
import time
from collections.abc import Sequence
from enum import Enum
from operator import attrgetter
from socket import IPPROTO_TCP, MSG_WAITALL, SO_RCVTIMEO, SO_SNDTIMEO, SOL_SOCKET, TCP_INFO, socket
from typing import NamedTuple

from kvtier.errors import StoreError
from kvtier.foreign_text import first_line
from kvtier.stores.vectored import without_head

BUFFER_BYTES = 64 * 1024
"""Bytes per receive call for replies other than payloads."""
_NUM_BYTES = attrgetter("nbytes")
_TIMEVAL = struct.Struct("@ll")
BATCH_BYTES = 512 << 10
"""Payload bytes that are sent or asked for at once, unless one block has more. The kernel keeps bytes that are on their
way in memory of its own. More of them leave the processor's cache before the other side copies them, which costs client
and server processor time (benchmarks/figures.md)."""
_BYTES_PER_SECOND = 2e9
"""More than one connection usually moves. So many bytes per second of a round trip keep a distant server busy, too."""
_MIN_RTT = struct.Struct("148xI")
"""`tcpi_min_rtt` of `struct tcp_info`, microseconds, since Linux 4.6 (linux/tcp.h)."""
_MAX_LINE_BYTES = 8 * 1024
_MAX_DIGITS = 20
_MAX_PIECES = 512
"""Most buffers per sendmsg call; Linux allows 1,024."""


class Break(Enum):
    """Why a connection is of no more use."""

    CLOSED = "closed"
    """The server closed it; a new connection may work at once."""
    TIMED_OUT = "timed out"
    REFUSED = "refused"
    """The server refused a command that is needed for all others."""
    GARBAGE = "garbage"
    """A reply was not valid, so the following bytes cannot be understood."""


class ConnectionBrokenError(StoreError):
    """The connection is of no more use. Replies that had arrived before are valid."""

    def __init__(self, kind: Break, what: str) -> None:
        super().__init__(what)
        self.kind = kind


_UNKNOWN = ("unknown command", "unsupported command")
"""How errors begin for commands that a server, or a proxy before it, does not have."""


class Refused(NamedTuple):
    """An error reply: its first word, such as "OOM" or "MOVED", and the rest."""

    code: str
    text: str

    @classmethod
    def parse(cls, line: bytes) -> Refused:
        """Parse an error line without its "-"."""
        code, _, text = first_line(line.decode("utf-8", "replace")).partition(" ")
        return cls(code, text)

    @property
    def is_final(self) -> bool:
        """Whether the server will refuse the command every time: the user may not use it, or there is no such command.

        Other refusals pass: of a replica, or of a server that is loading, busy or full.
        """
        return self.code == "NOPERM" or (self.code == "ERR" and self.text.startswith(_UNKNOWN))

    def __str__(self) -> str:
        return f"{self.code} {self.text}".strip()


class Wire:
    """One connected socket, plain or TLS.

    Every method may raise ConnectionBrokenError; the connection must then be closed. The timeout bounds each wait. The
    deadline of `begin` bounds a whole exchange, also if bytes arrive one by one.

    Attributes:
        in_flight_bytes: how many bytes of payloads should be on their way at most.
    """

    def __init__(self, connected: socket, timeout: float) -> None:
        """Args: timeout: seconds for each wait."""
        self._socket = connected
        self._scatters = not isinstance(connected, ssl.SSLSocket)
        self._whole = 0
        if self._scatters:
            # Let the kernel apply the timeout: with MSG_WAITALL it then fills a whole piece in one call. With Python's
            # own timeout the socket is non-blocking, and Python wakes up for every packet.
            connected.settimeout(None)
            seconds, rest = divmod(timeout, 1)
            limit = _TIMEVAL.pack(int(seconds), int(rest * 1e6))
            connected.setsockopt(SOL_SOCKET, SO_RCVTIMEO, limit)
            connected.setsockopt(SOL_SOCKET, SO_SNDTIMEO, limit)
            self._whole = MSG_WAITALL
        else:
            connected.settimeout(timeout)
        self.in_flight_bytes = in_flight_bytes(round_trip(connected))
        self._buffer = bytearray(BUFFER_BYTES)
        self._memory = memoryview(self._buffer)
        self._start = self._end = 0
        self._deadline = 0.0

    def begin(self, deadline: float) -> None:
        """Start an exchange that must end by `deadline` (of `time.monotonic`)."""
        if self._start != self._end:
            raise ConnectionBrokenError(Break.GARBAGE, "a reply without a command")
        self._deadline = deadline

    def send(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Send the pieces in order."""
        if not self._scatters:
            for piece in pieces:
                self._check_deadline()
                try:
                    self._socket.sendall(piece)
                except OSError as error:
                    raise _broken(error) from error
            return
        views = [memoryview(piece) for piece in pieces]
        left = sum(map(_NUM_BYTES, views))
        while left:
            self._check_deadline()
            try:
                sent = self._socket.sendmsg(views[:_MAX_PIECES])
            except OSError as error:
                raise _broken(error) from error
            left -= sent
            if left:
                views = without_head(views, sent)

    def line(self, most: int = BUFFER_BYTES) -> bytes:
        """Return the next line without its line end.

        Args:
            most: most bytes to have in the buffer, so that no part of a following payload gets into it.
        """
        while (end := self._buffer.find(b"\r\n", self._start, self._end)) < 0:
            held = self._end - self._start
            if held >= _MAX_LINE_BYTES:
                raise ConnectionBrokenError(Break.GARBAGE, "a line without an end")
            self._receive_line(max(1, most - held))
        line = bytes(self._memory[self._start : end])
        self._start = end + 2
        return line

    def flags(self, count: int) -> list[bool | Refused]:
        """Return the next `count` replies, each 0, 1 or an error."""
        answers: list[bool | Refused] = []
        while len(answers) < count:
            whole = min((self._end - self._start) // 4, count - len(answers))
            replies = bytes(self._memory[self._start : self._start + 4 * whole])
            if (
                whole
                and replies[0::4] == b":" * whole
                and replies[2::4] + replies[3::4] == b"\r" * whole + b"\n" * whole
            ):
                answers += [digit != 0x30 for digit in replies[1::4]]
                self._start += 4 * whole
            else:
                answers.append(self._flag(self.line()))
        return answers

    def fill(self, view: memoryview, behind: int = 0) -> None:
        """Fill the view with the next bytes.

        Args:
            behind: number of bytes that will certainly follow; they are received in the same call, for `take`, which
                saves a system call.
        """
        done = min(view.nbytes, self._end - self._start)
        if done:
            view[:done] = self._memory[self._start : self._start + done]
            self._start += done
        while done < view.nbytes:
            if behind and self._scatters:
                done += self._receive_with_line(view[done:], behind)
            else:
                done += self._receive(view[done:], self._whole)

    def take_if(self, replies: bytes) -> bool:
        """Take the next replies if they are these bytes; else take none and return False.

        At least as many bytes must be certain to arrive; those that are missing are received in one call if possible.
        """
        end = self._start + len(replies)
        if end > self._end:
            self._receive_line(end - self._end, self._whole)
            end = self._start + len(replies)
        if end > self._end or self._buffer[self._start : end] != replies:
            return False
        self._start = end
        return True

    def take(self, count: int, most_after: int) -> bytes:
        """Return the next `count` bytes, and drop the line end after them.

        Args:
            most_after: most bytes to receive after the line end, so that no part of a payload gets into the buffer.
        """
        while (held := self._end - self._start) < count + 2:
            self._receive_line(count + 2 + most_after - held)
        taken = bytes(self._memory[self._start : self._start + count])
        self._start += count
        self._drop_end_of_line()
        return taken

    def skip(self, count: int) -> None:
        """Receive and drop `count` bytes and a line end."""
        while count:
            if self._start == self._end:
                self._receive_line(min(count, BUFFER_BYTES))
            dropped = min(count, self._end - self._start)
            self._start += dropped
            count -= dropped
        self.take(0, 0)

    def integers(self, count: int) -> list[int | Refused]:
        """Return the next `count` replies, each a number or an error."""
        return [self._integer(self.line()) for _ in range(count)]

    def _integer(self, line: bytes) -> int | Refused:
        if line[:1] == b":" and (number := parse_count(line[1:])) is not None:
            return number
        if line[:1] == b"-":
            return Refused.parse(line[1:])
        raise ConnectionBrokenError(Break.GARBAGE, "a reply that is not a number")

    def _flag(self, line: bytes) -> bool | Refused:
        if line in (b":0", b":1"):
            return line == b":1"
        if line[:1] == b"-":
            return Refused.parse(line[1:])
        raise ConnectionBrokenError(Break.GARBAGE, "a reply that is neither 0 nor 1")

    def _drop_end_of_line(self) -> None:
        if self._buffer[self._start : self._start + 2] != b"\r\n":
            raise ConnectionBrokenError(Break.GARBAGE, "a value that is longer than announced")
        self._start += 2

    def _receive_with_line(self, view: memoryview, behind: int) -> int:
        """Receive at least one byte into the view; bytes after the view go into the buffer, which must be empty."""
        self._check_deadline()
        try:
            received: int = self._socket.recvmsg_into([view, self._memory[:behind]], 0, self._whole)[0]
        except OSError as error:
            raise _broken(error) from error
        if not received:
            raise ConnectionBrokenError(Break.CLOSED, "the server closed the connection")
        self._start, self._end = 0, max(0, received - view.nbytes)
        return min(received, view.nbytes)

    def _receive_line(self, most: int, flags: int = 0) -> None:
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end + most > BUFFER_BYTES:
            held = self._end - self._start
            self._memory[:held] = bytes(self._memory[self._start : self._end])
            self._start, self._end = 0, held
        self._end += self._receive(self._memory[self._end : self._end + most], flags)

    def _receive(self, view: memoryview, flags: int = 0) -> int:
        """Receive at least one byte into the view."""
        self._check_deadline()
        try:
            received = self._socket.recv_into(view, 0, flags)
        except OSError as error:
            raise _broken(error) from error
        if not received:
            raise ConnectionBrokenError(Break.CLOSED, "the server closed the connection")
        return received

    def _check_deadline(self) -> None:
        if time.monotonic() >= self._deadline:
            raise ConnectionBrokenError(Break.TIMED_OUT, "not done in time")


def in_flight_bytes(round_trip: float) -> int:
    """Return how many bytes of payloads should be on their way at most; args: round_trip: seconds."""
    return max(BATCH_BYTES, int(round_trip * _BYTES_PER_SECOND))


def round_trip(connected: socket) -> float:
    """Return the shortest round trip so far, in seconds; 0 for a Unix socket, or where the kernel does not tell."""
    try:
        return float(_MIN_RTT.unpack(connected.getsockopt(IPPROTO_TCP, TCP_INFO, _MIN_RTT.size))[0]) / 1e6
    except (OSError, struct.error):
        return 0.0


def parse_count(digits: bytes) -> int | None:
    """Return a number of up to 19 digits; None for anything else. The protocol's numbers have 64 bits."""
    return int(digits) if digits.isdigit() and len(digits) < _MAX_DIGITS else None


def _broken(error: OSError) -> ConnectionBrokenError:
    if isinstance(error, TimeoutError | BlockingIOError):
        return ConnectionBrokenError(Break.TIMED_OUT, "no answer in time")
    return ConnectionBrokenError(Break.CLOSED, f"connection lost: {error}")
