"""A socket as redis-py may read it: bounded in bytes and in time, whoever is at the other end."""

from __future__ import annotations

import time
from socket import MSG_PEEK, socket
from typing import Any

_MAX_BYTES = 64 << 10
"""Of replies to AUTH, SELECT and PING, which are lines; redis-py itself would collect whatever a server sends."""


class HandshakeSocket:
    """A connected socket, plain or TLS, until `Wire` takes over.

    redis-py's timeout ends a single wait; this deadline also ends trickles, and replies that never end.
    """

    def __init__(self, connected: socket, seconds: float) -> None:
        """Args: seconds: from now on, for all that is read."""
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
            raise TimeoutError("no whole reply in time")
        if self._bytes_left <= 0:
            raise ConnectionAbortedError("a reply without an end")
        if self._connected.gettimeout() != 0:
            self._connected.settimeout(min(left, self._seconds))
