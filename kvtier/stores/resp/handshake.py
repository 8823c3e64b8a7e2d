"""The socket during redis-py's login: it bounds the bytes and the time that redis-py reads from an unknown server."""

from __future__ import annotations

import time
from socket import MSG_PEEK, socket
from typing import Any

_MAX_BYTES = 64 << 10
"""Most bytes of the replies to AUTH, SELECT and PING, which are short lines; redis-py itself has no limit."""


class HandshakeSocket:
    """A connected socket, plain or TLS, until `Wire` takes over.

    redis-py's timeout bounds each wait. The deadline here also bounds replies that arrive byte by byte or never end.
    """

    def __init__(self, connected: socket, seconds: float) -> None:
        """Args: seconds: for all reads together, from now on."""
        self._connected = connected
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._bytes_left = _MAX_BYTES

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Receive as `socket.recv` does."""
        if flags & MSG_PEEK:
            return self._connected.recv(size, flags)
        self._prepare()
        received = self._connected.recv(min(size, self._bytes_left), flags)
        self._bytes_left -= len(received)
        return received

    def recv_into(self, buffer: Any, size: int = 0, flags: int = 0) -> int:
        """Receive as `socket.recv_into` does."""
        self._prepare()
        received = self._connected.recv_into(buffer, min(size or len(buffer), self._bytes_left), flags)
        self._bytes_left -= received
        return received

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connected, name)

    def _prepare(self) -> None:
        """Raise OSError if no more may be read."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no complete reply in time")
        if self._bytes_left <= 0:
            raise ConnectionAbortedError("the reply is too long")
        if self._connected.gettimeout() != 0:
            self._connected.settimeout(min(left, self._seconds))
