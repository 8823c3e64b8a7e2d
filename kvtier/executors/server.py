"""The I/O process: `python -m kvtier.executors.server SOCKET ARENA PARENT PID`.

SOCKET, ARENA and PARENT are inherited descriptors; PARENT is a pidfd, or -1. PID is the parent's process id.

The process opens one store, reports its index, and moves blocks between store and arena on a few threads, until the
socket closes or the parent ends. Then it starts no new call, and exits when the running ones have ended.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence

from kvtier.errors import ConfigError, ProtocolError, StoreUnavailableError
from kvtier.executors.base import StoreDescription
from kvtier.executors.loop import StoreLoop
from kvtier.executors.pieces import Piece, arena_slots
from kvtier.executors.protocol import (
    MAX_PACKET_BYTES,
    REQUESTS,
    Cancel,
    Delete,
    IndexEnd,
    Keep,
    ListKeys,
    Open,
    Part,
    PartResult,
    Probe,
    Ready,
    Request,
    StoreReport,
    Unavailable,
    decode,
    encode,
)
from kvtier.executors.runner import StoreRunner
from kvtier.log import logger
from kvtier.primary.arena import Arena, Rows, arena_rows
from kvtier.primary.foreign_arena import ForeignArena

_MAX_SECONDS_AFTER_END = 60.0
"""Most time for running calls after the parent has ended. A longer call is cut short, and its block then fails its
checksum."""

_SECONDS_BETWEEN_LOOKS = 0.5
"""Time between two looks at the parent's process id, if there is no pidfd."""

_SECONDS_QUIET = 0.5
"""Time after the last job began until the store may work ahead more often."""
_SECONDS_BETWEEN_REPORTS = 0.5

EXIT_GARBAGE, EXIT_UNAVAILABLE, EXIT_CUT_SHORT = 3, 4, 5


class _EndOfParent(Exception):
    """The parent has ended, or has closed its socket."""


class Channel:
    """The socket to the parent. Every wait also ends when the parent does."""

    def __init__(self, packets: socket.socket, parent_fd: int, parent_pid: int) -> None:
        """Args: parent_fd: a pidfd; -1 if there is none, and then the parent's process id is checked regularly."""
        self._socket = packets
        self._socket.setblocking(False)
        self._parent_fd = parent_fd
        self._parent_pid = parent_pid
        self._send_lock = threading.Lock()
        self._arrivals = self._poller(select.POLLIN)
        self._buffer = memoryview(bytearray(MAX_PACKET_BYTES + 1))

    def wait_for_end(self) -> None:
        """Wait until the parent ends or the socket closes. Reads nothing."""
        with contextlib.suppress(_EndOfParent):
            self._wait(self._poller(0))

    def receive(self) -> list[Request]:
        """Wait for a packet of messages.

        Raises:
            _EndOfParent: the parent has ended, or closed its socket.
            ProtocolError: the packet is malformed.
        """
        while True:
            self._wait(self._arrivals)
            try:
                length = self._socket.recv_into(self._buffer)
            except BlockingIOError:
                continue
            except OSError as error:
                raise _EndOfParent from error
            if not length:
                raise _EndOfParent
            if length > MAX_PACKET_BYTES:
                raise ProtocolError("a packet that is too long")
            return decode(self._buffer[:length], REQUESTS)

    def send(self, messages: Sequence[StoreReport]) -> None:
        """Send messages, in as few packets as possible. Waits while the socket is full.

        Raises:
            _EndOfParent: the parent has ended, or closed its socket.
        """
        sent = 0
        while sent < len(messages):
            packet, count = encode(messages[sent:])
            self._send_packet(packet)
            sent += count

    def _send_packet(self, packet: bytes) -> None:
        with self._send_lock:
            while True:
                try:
                    self._socket.send(packet, socket.MSG_NOSIGNAL)
                    return
                except BlockingIOError:
                    self._wait(self._poller(select.POLLOUT))
                except OSError as error:
                    raise _EndOfParent from error

    def _poller(self, events: int) -> select.poll:
        """Return a poller for events of the socket and the end of the parent. Threads must not share it."""
        poller = select.poll()
        poller.register(self._socket, events)
        if self._parent_fd >= 0:
            poller.register(self._parent_fd, select.POLLIN)
        return poller

    def _wait(self, poller: select.poll) -> None:
        if self._parent_fd >= 0:
            if self._parent_fd in dict(poller.poll()):
                raise _EndOfParent
            return
        while not poller.poll(_SECONDS_BETWEEN_LOOKS * 1000):
            if os.getppid() != self._parent_pid:  # it ended, and the kernel gave its children to another process
                raise _EndOfParent


class Server:
    """Runs a store for the parent: threads move blocks, and the channel carries requests and reports."""

    def __init__(self, channel: Channel, runner: StoreRunner, rows: Rows, description: StoreDescription) -> None:
        self._channel = channel
        self._runner = runner
        self._rows = rows
        self._num_blocks = description.num_blocks
        self._loop = StoreLoop(description, description.threads)
        self._ending = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"kvtier-io-{index}", daemon=True)
            for index in range(description.threads)
        ]
        self._threads.append(threading.Thread(target=self._prepare, name="kvtier-io-ahead", daemon=True))

    def serve(self) -> None:
        """Report the index, then work until the parent ends or closes the socket.

        Raises:
            ProtocolError: the parent sent a malformed packet, or a request that is not allowed.
            StoreUnavailableError: the index cannot be read.
        """
        try:
            self._channel.send((Ready(self._runner.num_slots),))
            for batch in self._runner.index():
                self._channel.send((batch,))
            self._channel.send((IndexEnd(), *self._runner.usage_news()))
            for thread in self._threads:
                thread.start()
            while True:
                for request in self._channel.receive():
                    self._accept(request)
        except _EndOfParent:
            return
        finally:
            self._finish()

    def _finish(self) -> None:
        """Start no new call, and wait for the running ones. The watchdog limits this wait."""
        self._ending.set()
        self._loop.close()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _accept(self, request: Request) -> None:
        if isinstance(request, Part):
            if max(request.arena_slots) >= self._num_blocks:
                raise ProtocolError("a slot outside the arena")
            self._loop.put(request)
        elif isinstance(request, Probe | Delete | Keep | ListKeys):
            self._loop.put(request)
        elif isinstance(request, Cancel):
            self._channel.send(self._loop.cancel(frozenset(request.serials)))
        else:
            raise ProtocolError("a second store to open")

    def _work(self) -> None:
        with contextlib.suppress(_EndOfParent):
            self._loop.run(self._runner, self._move, self._channel.send)

    def _prepare(self) -> None:
        """Let the store work ahead: half of the time while there are no jobs, a tenth of the time beside jobs."""
        reported_at = -math.inf
        with contextlib.suppress(_EndOfParent):
            while not self._ending.is_set():
                started = time.monotonic()
                progress = self._runner.prepare()
                if progress is None:
                    return
                now = time.monotonic()
                if now - reported_at > _SECONDS_BETWEEN_REPORTS or progress.done >= progress.total:
                    self._channel.send((progress,))
                    reported_at = now
                share = 1 if started - self._loop.busy_at > _SECONDS_QUIET else 9
                self._ending.wait(share * (now - started))

    def _move(self, runner: StoreRunner, pieces: Sequence[Piece]) -> list[PartResult]:
        return runner.run(pieces, self._rows.of(arena_slots(pieces)))


class Watchdog:
    """Ends the process after its parent has ended or closed the socket, even if a thread hangs in the store.

    Running calls get `_MAX_SECONDS_AFTER_END`. While the store still opens, the process ends at once.

    Attributes:
        open: set when the store is open.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.open = threading.Event()
        threading.Thread(target=self._watch, name="kvtier-io-watchdog", daemon=True).start()

    def _watch(self) -> None:
        self._channel.wait_for_end()
        if self.open.is_set():
            time.sleep(_MAX_SECONDS_AFTER_END)  # this thread only watches; the process mostly ends before
        os._exit(EXIT_CUT_SHORT)


def serve(socket_fd: int, arena_fd: int, parent_fd: int, parent_pid: int) -> int:
    """Run an I/O process until its end; return its exit status."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Service managers signal every process of a service. This one must not end in the middle of a write, and ends
        # by itself after its parent.
        signal.signal(ignored, signal.SIG_IGN)
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as name:
        name.write("kvtier-io")
    # A store may open many files. The usual soft limit of 1,024 only protects programs that use select(2).
    with contextlib.suppress(OSError, ValueError):
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    channel = Channel(socket.socket(fileno=socket_fd), parent_fd, parent_pid)
    watchdog = Watchdog(channel)
    try:
        first, *more = channel.receive()
        if not isinstance(first, Open) or more:
            raise ProtocolError(f"{type(first).__name__} while no store is open")
        description = StoreDescription.from_json(first.description)
        kind = ForeignArena if description.arena_is_foreign else Arena
        arena = kind.attach(arena_fd, description.num_blocks, description.block_bytes)
        runner = StoreRunner(description, arena.is_in_huge_pages())
        watchdog.open.set()
        # Modules and the store stay until the end. To look through them again and again for garbage took 5% of the
        # processor time of a tier whose store is on the network.
        gc.collect()
        gc.freeze()
        try:
            Server(channel, runner, arena_rows(arena.view), description).serve()
        finally:
            runner.close()
    except _EndOfParent:
        return 0
    except ProtocolError as error:
        logger.error("I/O process received garbage: %s", error)
        return EXIT_GARBAGE
    except (StoreUnavailableError, ConfigError, OSError) as error:
        with contextlib.suppress(_EndOfParent):
            channel.send((Unavailable.because(error),))
        return EXIT_UNAVAILABLE
    return 0


if __name__ == "__main__":
    sys.exit(serve(*map(int, sys.argv[1:5])))
