"""The I/O process: `python -m kvtier.secondary.io_main SOCKET ARENA PARENT`, three inherited descriptors.

It opens one store, reports its index, and moves blocks between store and arena on a few threads until the
socket or the parent ends. Then it starts no new call, and exits when the running ones have ended.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import select
import signal
import socket
import sys
import threading
import time

from kvtier.errors import ConfigError, ProtocolError, StoreUnavailableError
from kvtier.primary.arena import Arena, Rows, arena_rows
from kvtier.secondary.codec import MAX_MESSAGE_BYTES, decode, encode
from kvtier.secondary.executor import StoreDescription
from kvtier.secondary.inline import run_task
from kvtier.secondary.messages import (
    CancelWaiting,
    Delete,
    IndexEnd,
    Message,
    Options,
    Part,
    Probe,
    Ready,
    Unavailable,
)
from kvtier.secondary.part_queue import PartQueue
from kvtier.secondary.store_runner import StoreRunner, blocks_per_call, cancelled

_MOST_SECONDS_AFTER_END = 60.0
"""How long running calls may take after the end; a longer one is cut short, its block fails its checksum."""

EXIT_GARBAGE, EXIT_UNAVAILABLE, EXIT_CUT_SHORT = 3, 4, 5


class _EndOfParent(Exception):
    """The parent or its socket ended."""


class Channel:
    """The socket and the parent's pidfd, watched together."""

    def __init__(self, packets: socket.socket, parent_fd: int) -> None:
        self._socket = packets
        self._socket.setblocking(False)
        self._parent_fd = parent_fd
        self._send_lock = threading.Lock()

    def wait_for_end(self) -> None:
        """Wait until the parent or the socket ends; reads nothing."""
        poller = select.poll()
        poller.register(self._socket, 0)
        poller.register(self._parent_fd, select.POLLIN)
        poller.poll()

    def receive(self) -> Message:
        """Wait for a message.

        Raises:
            _EndOfParent: there will be none.
            ProtocolError: it is malformed.
        """
        while True:
            self._wait(select.POLLIN)
            try:
                packet, _, flags, _ = self._socket.recvmsg(MAX_MESSAGE_BYTES + 1)
            except BlockingIOError:
                continue
            except OSError as error:
                raise _EndOfParent from error
            if not packet:
                raise _EndOfParent
            if flags & socket.MSG_TRUNC:
                raise ProtocolError("a packet that is too long")
            return decode(packet)

    def send(self, message: Message) -> None:
        """Send a message, waiting as long as the parent is busy.

        Raises:
            _EndOfParent: nobody will read it.
        """
        packet = encode(message)
        with self._send_lock:
            while True:
                try:
                    self._socket.send(packet, socket.MSG_NOSIGNAL)
                    return
                except BlockingIOError:
                    self._wait(select.POLLOUT)
                except OSError as error:
                    raise _EndOfParent from error

    def _wait(self, events: int) -> None:
        poller = select.poll()
        poller.register(self._socket, events)
        poller.register(self._parent_fd, select.POLLIN)
        ready = dict(poller.poll())
        if self._parent_fd in ready:
            raise _EndOfParent


class Server:
    """A store, its threads, and the channel."""

    def __init__(self, channel: Channel, runner: StoreRunner, rows: Rows, description: StoreDescription) -> None:
        self._channel = channel
        self._runner = runner
        self._rows = rows
        self._num_blocks = description.num_blocks
        self._blocks_per_call = blocks_per_call(description.block_bytes)
        self._queue = PartQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"kvtier-io-{index}", daemon=True)
            for index in range(description.threads)
        ]

    def serve(self) -> None:
        """Report the index, then work until the parent ends.

        Raises:
            ProtocolError: the parent sent garbage.
            StoreUnavailableError: the index cannot be read.
        """
        try:
            self._channel.send(Ready(self._runner.num_slots))
            for batch in self._runner.index():
                self._channel.send(batch)
            self._channel.send(IndexEnd())
            for thread in self._threads:
                thread.start()
            while True:
                self._accept(self._channel.receive())
        except _EndOfParent:
            return
        finally:
            self._finish()

    def _finish(self) -> None:
        """Start no new call and wait for the running ones, as long as the watchdog lets them."""
        self._queue.close()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _accept(self, message: Message) -> None:
        if isinstance(message, Part):
            if max(message.arena_slots) >= self._num_blocks:
                raise ProtocolError("a slot outside the arena")
            for start in range(0, len(message.keys), self._blocks_per_call):
                self._queue.put(message.slice(start, start + self._blocks_per_call))
        elif isinstance(message, Probe | Delete):
            self._queue.put(message)
        elif isinstance(message, CancelWaiting):
            for part in self._queue.cancel():
                self._channel.send(cancelled(part))
        else:
            raise ProtocolError(f"{type(message).__name__} from a tier")

    def _work(self) -> None:
        with contextlib.suppress(_EndOfParent):
            while (task := self._queue.take()) is not None:
                report = run_task(self._runner, self._rows, task)
                if report is not None:
                    self._channel.send(report)
                if self._runner.lost is not None:
                    self._channel.send(Unavailable(self._runner.lost))


class Watchdog:
    """Ends the process some time after its parent, whatever it is stuck in; at once while the store still opens."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.open = threading.Event()
        threading.Thread(target=self._watch, name="kvtier-io-watchdog", daemon=True).start()

    def _watch(self) -> None:
        self._channel.wait_for_end()
        if self.open.is_set():
            time.sleep(_MOST_SECONDS_AFTER_END)
        os._exit(EXIT_CUT_SHORT)


def serve(socket_fd: int, arena_fd: int, parent_fd: int) -> int:
    """Live the life of an I/O process; return its exit status."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # it ends with its parent, and never in the middle of a write
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as name:
        name.write("kvtier-io")
    with contextlib.suppress(OSError, ValueError):  # a store may keep many files open; 1,024 is for select(2)
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    channel = Channel(socket.socket(fileno=socket_fd), parent_fd)
    watchdog = Watchdog(channel)
    try:
        first = channel.receive()
        if not isinstance(first, Options):
            raise ProtocolError(f"{type(first).__name__} before the options")
        try:
            description = StoreDescription.from_json(first.values)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"options: {error}") from error
        arena = Arena.attach(arena_fd, description.num_blocks, description.block_bytes)
        runner = StoreRunner(description)
        watchdog.open.set()
        try:
            Server(channel, runner, arena_rows(arena.view), description).serve()
        finally:
            runner.close()
    except _EndOfParent:
        return 0
    except ProtocolError as error:
        logging.getLogger("kvtier").error("I/O process received garbage: %s", error)
        return EXIT_GARBAGE
    except (StoreUnavailableError, ConfigError, OSError) as error:
        with contextlib.suppress(_EndOfParent):
            channel.send(Unavailable(str(error)))
        return EXIT_UNAVAILABLE
    return 0


if __name__ == "__main__":
    sys.exit(serve(*map(int, sys.argv[1:4])))
