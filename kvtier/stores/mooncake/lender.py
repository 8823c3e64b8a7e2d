"""A process that lends memory of this host to the pool, for all engines here with the same options.

What a process lends is lost when it ends, and an I/O process may be killed. So the lender is a process of its own. An
I/O process holds a lease, which is a connection to the lender's socket. The lender ends some time after the last lease
has ended: neither a new I/O process nor an engine's restart loses blocks. The socket has an abstract name (unix(7)), so
that no file is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import time

from kvtier import forks
from kvtier.errors import StoreUnavailableError, describe
from kvtier.stores.mooncake.client import join
from kvtier.stores.mooncake.lender_socket import START_SECONDS, connect, lender_address, lender_arguments
from kvtier.stores.mooncake.options import MooncakeOptions

GRACE_SECONDS = 60.0
"""How long a lender goes on without a lease: longer than a new I/O process takes, and than many restarts."""
_RETRY_SECONDS = 0.05
_LENDS = b"lends\n"
_MAX_ANSWER_BYTES = 1024


class Lease:
    """Keeps a lender alive until `close`, or until this process ends."""

    def __init__(self, connection: socket.socket) -> None:
        """Args: connection: to a lender that has said it lends."""
        self._connection = connection
        connection.setblocking(False)
        forks.register(self)

    def leave_to_parent(self) -> None:
        """In a forked child, close its copy of the connection: the lender must not wait for the child's end."""
        self._connection.close()

    @property
    def is_alive(self) -> bool:
        """Whether the lender still runs."""
        try:
            return self._connection.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        """End the lease; the lender ends if it gets no other."""
        self._connection.close()


def ask_lender(options: MooncakeOptions, grace_seconds: float = GRACE_SECONDS) -> Lease:
    """Return a lease of this host's lender, after starting it if there is none.

    Args:
        options: with a `segment`.
        grace_seconds: of a new lender.

    Raises:
        StoreUnavailableError: it cannot lend the memory, or another user holds its name.
    """
    arguments = lender_arguments(options.to_json())
    deadline = time.monotonic() + START_SECONDS
    lender: subprocess.Popen[bytes] | None = None
    while True:
        connection = connect(lender_address(arguments))
        if connection is not None and _has_answered(connection, deadline):
            return Lease(connection)
        if lender is None or lender.poll() is not None:  # the former one was just ending
            # -P keeps the working directory out of the module path: with -m, a file there could shadow a module.
            command = [sys.executable, "-P", "-m", __name__, json.dumps(arguments), str(grace_seconds)]
            # Its output would keep the engine's pipes open after the engine's end.
            lender = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        if time.monotonic() > deadline:
            raise StoreUnavailableError(f"the process that lends memory does not start in {START_SECONDS:g} s")
        time.sleep(_RETRY_SECONDS)


def _has_answered(connection: socket.socket, deadline: float) -> bool:
    """Wait until the lender says that it lends; return False, with the connection closed, if it was just ending.

    Raises:
        StoreUnavailableError: it cannot lend, or does not answer.
    """
    try:
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        answer = connection.recv(_MAX_ANSWER_BYTES)
    except ConnectionError:
        answer = b""
    except OSError as error:
        answer = describe(error).encode()
    if answer == _LENDS:
        return True
    connection.close()
    if not answer:
        return False
    raise StoreUnavailableError(f"no memory is lent: {answer.decode(errors='replace').strip()}")


def lend(options: MooncakeOptions, grace_seconds: float, address: bytes) -> None:
    """Lend memory until there was no lease for `grace_seconds`; return at once if another process does it already."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(address)
        except OSError:
            return
        listener.listen(64)
        try:
            client = join(options, options.segment)
        except StoreUnavailableError as error:
            _serve(listener, str(error).encode(), 1.0)
            return
        try:
            _serve(listener, _LENDS, grace_seconds)
        finally:
            client.close()


def _serve(listener: socket.socket, answer: bytes, grace_seconds: float) -> None:
    """Answer each connection, and return when there was none for `grace_seconds`."""
    listener.setblocking(False)
    alone_since = time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while len(selector.get_map()) > 1 or time.monotonic() < alone_since + grace_seconds:
            for key, _ in selector.select(min(1.0, grace_seconds)):
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    with contextlib.suppress(ConnectionError):  # its process may have ended, or waited long enough
                        connection.sendall(answer)
                    selector.register(connection, selectors.EVENT_READ)
                else:  # a lease has nothing to say but its end
                    selector.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]  # only sockets are registered
                    alone_since = time.monotonic()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    lend(MooncakeOptions.read(given), float(sys.argv[2]), lender_address(given))
