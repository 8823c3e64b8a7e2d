"""A small TCP proxy that treats what a server says badly: late, slowly, in pieces, in another order, or not at all."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass

from kvtier.testing.patience import PATIENCE_SECONDS

_PIECE_BYTES = 64 * 1024
_POLL_SECONDS = 0.02


@dataclass
class Faults:
    """What happens to replies from now on; requests pass untouched.

    Attributes:
        delay: seconds before each piece.
        rate: bytes a second.
        cut_after: bytes after which the connection is closed, hard.
        change: gets all that the server said before it fell silent for a moment, returns what the client gets.
        swallow: nothing comes back.
        refuse: new connections are closed at once.
        most_served: connections beyond so many are accepted, and wait for ever.
    """

    delay: float = 0.0
    rate: float | None = None
    cut_after: int | None = None
    change: Callable[[bytes], bytes] | None = None
    swallow: bool = False
    refuse: bool = False
    most_served: int | None = None


class Proxy:
    """Listens on a port of its own and passes everything to `target`; set `faults` at any moment."""

    def __init__(
        self,
        target: tuple[str, int],
        certificate: tuple[str, str] | None = None,
        client_ca: str | None = None,
    ) -> None:
        """Args:
        certificate: PEM files of certificate and key: clients must speak TLS.
        client_ca: PEM file of who must have signed the certificate that clients then have to show.
        """
        self.target = target
        self.faults = Faults()
        self.num_connections = 0
        self._context: ssl.SSLContext | None = None
        if certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(*certificate)
            if client_ca is not None:
                self._context.load_verify_locations(client_ca)
                self._context.verify_mode = ssl.CERT_REQUIRED
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(_POLL_SECONDS)
        self.address: tuple[str, int] = self._listener.getsockname()
        self._kept_waiting: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"{'redis' if self._context is None else 'rediss'}://{self.address[0]}:{self.address[1]}"

    def heal(self) -> None:
        self.faults = Faults()

    def close(self) -> None:
        self._closing.set()
        self._listener.close()
        for client in self._kept_waiting:
            client.close()
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            self.num_connections += 1
            if self.faults.most_served is not None and self.num_connections > self.faults.most_served:
                self._kept_waiting.append(client)
                continue
            if self.faults.refuse:
                client.close()
                continue
            thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(client.close)
            with contextlib.suppress(OSError):
                client.settimeout(PATIENCE_SECONDS)
                if self._context is not None:
                    client = self._context.wrap_socket(client, server_side=True)
                    stack.callback(client.close)
                server = stack.enter_context(socket.create_connection(self.target, timeout=PATIENCE_SECONDS))
                requests = threading.Thread(target=self._pass_on, args=(client, server), daemon=True)
                requests.start()
                self._pass_back(server, client)
                for end in (client, server):
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)
                requests.join(5)

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while (piece := self._receive(client)) is not None:
                server.sendall(piece)
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def _pass_back(self, server: socket.socket, client: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while (piece := self._receive(server)) is not None:
                faults = self.faults
                if faults.change is not None:
                    piece = faults.change(piece + self._more(server))
                if faults.swallow:
                    continue
                if faults.cut_after is not None and passed + len(piece) >= faults.cut_after:
                    client.sendall(piece[: max(0, faults.cut_after - passed)])
                    return
                passed += len(piece)
                if faults.delay:
                    self._closing.wait(faults.delay)
                if faults.rate is None:
                    client.sendall(piece)
                else:
                    self._trickle(piece, client, faults)

    def _trickle(self, piece: bytes, client: socket.socket, faults: Faults) -> None:
        assert faults.rate is not None
        step = max(1, int(faults.rate * _POLL_SECONDS))
        for start in range(0, len(piece), step):
            if self._closing.is_set():
                return
            client.sendall(piece[start : start + step])
            if self.faults is faults:
                self._closing.wait(_POLL_SECONDS)

    def _more(self, server: socket.socket) -> bytes:
        """Return what follows until the server is silent for a moment."""
        pieces = []
        while select.select([server], [], [], 0.05)[0]:
            piece = server.recv(_PIECE_BYTES)
            if not piece:
                break
            pieces.append(piece)
        return b"".join(pieces)

    def _receive(self, end: socket.socket) -> bytes | None:
        """Return a piece; None at the end of the connection or of the proxy."""
        while not self._closing.is_set():
            if isinstance(end, ssl.SSLSocket) and end.pending():
                return end.recv(_PIECE_BYTES)
            if select.select([end], [], [], _POLL_SECONDS)[0]:
                return end.recv(_PIECE_BYTES) or None
        return None


def split_replies(stream: bytes) -> list[bytes]:
    """Return the whole replies (lines and bulk strings) that a stream of RESP2 begins with, and the rest."""
    replies, start = [], 0
    while (end := stream.find(b"\r\n", start)) >= 0:
        end += 2
        if stream[start : start + 1] == b"$" and (length := int(stream[start + 1 : end - 2])) >= 0:
            end += length + 2
        if end > len(stream):
            break
        replies.append(stream[start:end])
        start = end
    return [*replies, stream[start:]] if start < len(stream) else replies
