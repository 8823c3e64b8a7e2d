"""Connections to one server: redis-py opens them, `Wire` moves the bytes.

redis-py handles addresses, TLS, authentication, the database and the pool. Subclasses of its connection classes keep
the connected socket for `Wire`; these classes and the credential provider are redis-py's extension points.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from socket import MSG_PEEK, socket
from typing import Any, TypeVar

import redis
from redis._parsers import _RESP2Parser
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvtier.errors import StoreError
from kvtier.foreign_text import first_line
from kvtier.stores.resp.options import RespOptions
from kvtier.stores.resp.wire import ConnectionBrokenError, Refused, Wire

_FOREIGN = (redis.RedisError, OSError, RecursionError, ValueError)
"""What redis-py raises: its own errors, and those of its parser for unexpected replies (pushes, numbers)."""

_MAX_HANDSHAKE_BYTES = 64 << 10
"""Most bytes of the replies to AUTH, SELECT and PING, which are short lines; redis-py itself has no limit."""

_FURTHER_SECONDS = 0.25
"""Longest wait for each step of a further connection, on which no call depends: a proxy may accept one, and serve it
only when another one ends."""
_ALONE_SECONDS = 10.0
"""Time in which calls use one connection each after a further one was refused: tries cost time, and are logged."""

_Answer = TypeVar("_Answer")


class ServerLostError(StoreError):
    """No connection can be made; the message has the address and the reason."""


class HandshakeSocket:
    """A connected socket, plain or TLS, until `Wire` takes over: it bounds what redis-py reads during its login.

    redis-py's timeout bounds each wait. The deadline here also bounds replies that arrive byte by byte or never end.
    """

    def __init__(self, connected: socket, seconds: float) -> None:
        """Args: seconds: for all reads together, from now on."""
        self._connected = connected
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._bytes_left = _MAX_HANDSHAKE_BYTES

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


class _WithWire:
    """Keeps the socket, so that `Wire` can use it directly after redis-py has authenticated."""

    connected: socket
    wire: Wire
    pool: redis.ConnectionPool
    """To which the connection belongs."""
    socket_timeout: Any

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # With None, redis-py does not send CLIENT SETINFO. A user may lack the right to, and servers log each attempt.
        vars(self).update(driver_info=None, lib_name=None, lib_version=None)

    def _connect(self) -> HandshakeSocket:
        self.connected = super()._connect()  # type: ignore[misc] # redis-py's class, which this one is mixed into
        return HandshakeSocket(self.connected, self.socket_timeout)


class _TCPConnection(_WithWire, redis.Connection):
    """Over TCP."""


class _TLSConnection(_WithWire, redis.SSLConnection):
    """Over TLS."""


class _UnixConnection(_WithWire, redis.UnixDomainSocketConnection):
    """Over a Unix socket."""


class Credentials(redis.CredentialProvider):
    """Reads the password for each new connection, so that it may change while kvtier is running."""

    def __init__(self, settings: RespOptions) -> None:
        self._settings = settings

    def get_credentials(self) -> tuple[str, ...]:  # type: ignore[override] # redis-py declares two fixed lengths
        """Return (password,) or (username, password).

        Raises:
            redis.AuthenticationError: the password cannot be read. After an error of another kind, redis-py would keep
                the connection, without a login.
        """
        try:
            return self._settings.credentials()
        except StoreError as error:
            raise redis.AuthenticationError(str(error)) from None


def _client_options(settings: RespOptions) -> dict[str, Any]:
    """Return the arguments for redis-py's connections."""
    options: dict[str, Any] = {
        "socket_timeout": settings.timeout,
        "socket_connect_timeout": settings.connect_timeout,
        "protocol": 2,
        # Not hiredis: it allocates a list of as many elements as a server announces, before they arrive. That can be
        # 16 GiB, which the garbage collector then visits.
        "parser_class": _RESP2Parser,
    }
    if settings.password_env is not None or settings.password_file is not None:
        options["credential_provider"] = Credentials(settings)
    if settings.address.tls:
        options |= {
            "ssl_ca_certs": settings.tls_ca_file,
            "ssl_certfile": settings.tls_cert_file,
            "ssl_keyfile": settings.tls_key_file,
            "ssl_cert_reqs": "required" if settings.tls_verify else "none",
            "ssl_check_hostname": settings.tls_verify,
        }
    return options


class Server:
    """One server and its connections, as many as there are threads that use it at once.

    Attributes:
        address: where it is, for messages; host: without the port.
        was_reached: it has let us in at least once.
    """

    def __init__(self, settings: RespOptions, host: str | None = None, port: int = 0) -> None:
        """Args: host, port: of the server; None for the address in the settings."""
        options = _client_options(settings)
        self.host = ""
        self.was_reached = False
        address = settings.address
        if address.unix_path is not None:
            kind: type = _UnixConnection
            options["path"], self.address = address.unix_path, address.unix_path
        else:
            if host is None:
                host, port = address.servers[0]
            kind = _TLSConnection if address.tls else _TCPConnection
            options |= {"host": host, "port": port}
            self.host = host
            self.address = f"{host}:{port}"
        if address.database:
            options["db"] = address.database
        self._settings = settings
        self._timeout = settings.timeout
        self._alone_until = 0.0
        self._idle: list[Any] = []
        """Idle connections. They are not returned to redis-py's pool, whose bookkeeping takes longer than a small
        block."""
        options |= {"connection_class": kind, "retry": Retry(NoBackoff(), 0)}
        self._pool = redis.ConnectionPool(**options)
        for name in ("socket_timeout", "socket_connect_timeout"):
            options[name] = min(options[name], _FURTHER_SECONDS)
        self._further_pool = redis.ConnectionPool(**options)

    def check(self) -> None:
        """Send a PING.

        Raises:
            ServerLostError: the server does not answer, or refuses the login.
        """
        connection = self._connection()
        try:
            self._ping(connection)
        finally:
            connection.pool.release(connection)

    def ask(self, *words: str | bytes) -> Any:
        """Send one command, and return redis-py's value of its reply, or a `Refused`. It is slower than `exchange`.

        Raises:
            ServerLostError: the server does not answer, or refuses the login.
        """
        connection = self._connection()
        try:
            connection.send_command(*words)
            return connection.read_response()
        except redis.ResponseError as error:
            # redis-py cuts the code off the messages that it has a class for
            code = "NOPERM" if isinstance(error, redis.exceptions.NoPermissionError) else ""
            return Refused.parse(f"{code} {error}".strip().encode(errors="replace"))
        except _FOREIGN as error:
            connection.disconnect()
            raise ServerLostError(self._why(error)) from None
        finally:
            connection.pool.release(connection)

    def exchange(self, operation: Callable[[Wire], _Answer], deadline: float) -> _Answer:
        """Run `operation` with one connection; as `exchange_on`."""
        return self.exchange_on(1, lambda wires: operation(wires[0]), deadline)

    def exchange_on(self, most: int, operation: Callable[[Sequence[Wire]], _Answer], deadline: float) -> _Answer:
        """Run `operation` with connections until `deadline` (of `time.monotonic`); return its result.

        Args:
            most: connections. It gets fewer where the server accepts no more of them, but at least one.

        Raises:
            ServerLostError: there is no connection; nothing was sent.
            ConnectionBrokenError: one broke; some commands may have been answered, on any of them.
        """
        connections = self._take(most)
        whole = False
        try:
            for connection in connections:
                connection.wire.begin(deadline)
            answer = operation([connection.wire for connection in connections])
            whole = True
            return answer
        except ConnectionBrokenError as error:
            raise ConnectionBrokenError(error.kind, f"{self.address}: {error}") from error
        finally:
            if whole:
                self._idle += connections
            else:
                self._give_back([*connections, *self._take_idle()])  # usually the other connections are broken, too

    def _take(self, most: int) -> list[Any]:
        """Return idle connections, or new ones.

        Raises:
            ServerLostError: there is none.
        """
        taken: list[Any] = []
        while not taken or (len(taken) < most and time.monotonic() >= self._alone_until):
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._further() if taken else self._connection()
                if connection is None:
                    self._alone_until = time.monotonic() + _ALONE_SECONDS
                    break
                connection.wire = Wire(connection.connected, self._timeout)
            taken.append(connection)
        return taken

    def _further(self) -> Any | None:
        """Return a new connection; None if the server has no place for it, which it says to the first command."""
        try:
            connection = self._connection(self._further_pool)
        except ServerLostError:
            return None
        try:
            self._ping(connection)
        except ServerLostError:
            connection.pool.release(connection)
            return None
        return connection

    def _ping(self, connection: Any) -> None:
        try:
            connection.send_command("PING")
            if connection.read_response() != b"PONG":
                raise redis.ConnectionError("a reply that does not answer PING")
        except _FOREIGN as error:
            connection.disconnect()
            raise ServerLostError(self._why(error)) from None  # the original error may contain the password

    def close(self) -> None:
        """Close every connection."""
        self._idle.clear()
        self._pool.disconnect()
        self._further_pool.disconnect()

    def _take_idle(self) -> list[Any]:
        taken = []
        while self._idle:
            with contextlib.suppress(IndexError):
                taken.append(self._idle.pop())
        return taken

    def _give_back(self, connections: Sequence[Any]) -> None:
        for connection in connections:
            connection.disconnect()
            connection.pool.release(connection)

    def _connection(self, pool: redis.ConnectionPool | None = None) -> Any:
        pool = self._pool if pool is None else pool
        try:
            connection: Any = pool.get_connection()
        except _FOREIGN as error:
            raise ServerLostError(self._why(error)) from None
        connection.pool = pool
        self.was_reached = True
        return connection

    def _why(self, error: Exception) -> str:
        """Return why there is no connection, with the password hidden in the server's words."""
        what = first_line(self._settings.without_password(str(error))) or type(error).__name__
        return what if self.address in what else f"{self.address}: {what}"
