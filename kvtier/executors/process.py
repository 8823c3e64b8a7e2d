"""The scheduler's side of an I/O process: starts it, exchanges packets with it, and ends it, without waiting."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain

from kvtier import forks
from kvtier.descriptors import Descriptor
from kvtier.errors import ProtocolError, StoreUnavailableError
from kvtier.executors.base import Ended, IOExecutor, Report, StoreDescription
from kvtier.executors.loop import cancelled
from kvtier.executors.protocol import (
    MAX_MESSAGES,
    MAX_PACKET_BYTES,
    REPORTS,
    Cancel,
    Chore,
    IndexBatch,
    Open,
    Part,
    PartResult,
    Probe,
    ProbeAnswer,
    Request,
    StoreReport,
    decode,
    encode,
)
from kvtier.executors.queue import TaskQueue
from kvtier.keys import OffloadKey
from kvtier.redaction import is_secret_variable

_MAX_PACKETS = 512
_MAX_INDEX_BATCHES = 2
"""Most packets and index packets that one poll receives, so that a large index does not hold up a scheduler step."""

_CLOSED = (
    "this process has closed descriptors that kvtier needs, as daemons do when they start: make the cache after that"
)

_SECONDS_TO_EXIT = 0.2
"""Time that a process has to exit after its socket has closed. After that, `poll` reports its end anyway."""

_SECONDS_BETWEEN_LOOKS = 0.02
"""Time between two looks at a process without a pidfd, whose end no descriptor announces."""


def _environment(description: StoreDescription) -> dict[str, str]:
    """Return the environment of an I/O process: without other stores' secrets, one BLAS thread, the same `sys.path`."""
    path = os.pathsep.join(entry for entry in map(_written_out, sys.path) if entry)
    named, own = set(_texts(description.options)), tuple(description.environment_secrets)
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name in named or name.startswith(own) or not is_secret_variable(name, value)
    }
    return {**inherited, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _texts(value: object) -> Iterator[str]:
    """Yield the strings in options, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(map(_texts, value.values()))
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(_texts, value))


def _written_out(entry: str) -> str:
    """Return an entry of `sys.path`. The entry "" of an interactive interpreter becomes the current directory."""
    try:
        return entry or os.getcwd()
    except FileNotFoundError:
        return ""  # the current directory was removed, so it holds no modules


def _open_pidfd(pid: int) -> int:
    """Return a pidfd; -1 if the sandbox refuses pidfd_open, or this build of Python lacks it."""
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):
        return -1


class IOProcess(IOExecutor):
    """One process that maps the arena and runs a store.

    `python -m` starts it, in a session of its own. It inherits three descriptors: a sequenced-packet socket, the arena,
    and, if the sandbox allows one, a pidfd of this process. It is a new interpreter and no fork, because the engine
    has threads: a forked child has none of them, but keeps the locks that they held.
    """

    def __init__(self, description: StoreDescription, arena: Descriptor) -> None:
        """Args: arena: of the arena's memfd, which the process maps. The caller closes it."""
        self._description = description
        self._arena = arena
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd: Descriptor | None = None
        self._socket: socket.socket | None = None
        self._descriptor: Descriptor | None = None
        self._queue = TaskQueue[Part, Open | Probe | Cancel | Chore]()
        self._unsent: list[Request] = []
        """Messages taken from the queue, in the order in which they will be sent."""
        self._packet: tuple[bytes, int] | None = None
        """The packet that the socket did not take yet, and how many of `_unsent` are in it."""
        self._local: list[Report] = []
        self._submitted = False
        self._num_awaited = 0
        """Blocks of submitted parts without an answer, and probes without one."""
        self._buffer = memoryview(bytearray(MAX_PACKET_BYTES + 1))
        self._ended_at: float | None = None
        forks.register(self)

    def leave_to_parent(self) -> None:
        """In a forked child, close the copies of socket and pidfd. The I/O process keeps working for the parent."""
        self._let_go()
        if self._pidfd is not None:
            self._pidfd.close()
        if self._process is not None:
            self._process.returncode = 0  # it is no child of this process, which cannot wait for it
            self._process = None

    @property
    def pid(self) -> int | None:
        """Id of the process; None before it starts and after it is reaped."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process. This takes a millisecond or two, longer than any other method.

        Raises:
            StoreUnavailableError: the machine refused, or the store's options are not JSON that fits a packet.
        """
        ours: socket.socket | None = None
        theirs: socket.socket | None = None
        parent = -1
        if not self._arena.is_ours():
            raise StoreUnavailableError(_CLOSED)
        try:
            request = Open(self._description.to_json())
            encode((request,))
        except ProtocolError as error:
            raise StoreUnavailableError(f"options of its store: {error}") from error
        try:
            # Such a socket keeps the boundaries of packets and, unlike a datagram socket, shows the end of its peer.
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            parent = _open_pidfd(os.getpid())
            inherited = (theirs.fileno(), self._arena.number, parent)
            arguments = map(str, (*inherited, os.getpid()))
            # -P keeps the working directory out of the module path: with -m, a file there could shadow a module.
            self._process = subprocess.Popen(
                [sys.executable or "python3", "-P", "-m", "kvtier.executors.server", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[fd for fd in inherited if fd >= 0],
                start_new_session=True,
                env=_environment(self._description),
            )
            pidfd = _open_pidfd(self._process.pid)
            self._pidfd = Descriptor(pidfd) if pidfd >= 0 else None
        except OSError as error:
            if ours is not None:
                ours.close()
            raise StoreUnavailableError(f"cannot start an I/O process: {error}") from error
        finally:
            if theirs is not None:
                theirs.close()
            if parent >= 0:
                os.close(parent)
        ours.setblocking(False)
        self._socket, self._descriptor = ours, Descriptor(ours.fileno())
        self._queue.put(request)
        self._send_queued()

    def submit(self, part: Part) -> None:
        """Queue blocks. The first part after a poll is sent at once; later ones are sent together at the next send."""
        self._num_awaited += part.num_blocks
        if self._submitted or self._unsent:
            self._queue.put(part)
            return
        self._submitted = True
        self._unsent.append(part)  # it may skip the queue: `_send_queued` empties that unless messages stay unsent
        self._send_queued()

    def probe(self, probe_id: int, keys: Sequence[OffloadKey]) -> None:
        self._num_awaited += 1
        self._queue.put(Probe.of(probe_id, keys))
        self._send_queued()

    def do(self, chore: Chore) -> None:
        self._queue.put(chore)
        self._send_queued()

    def poll(self) -> list[Report]:
        reports, self._local = self._local, []
        if self._socket is None:
            return reports
        self._submitted = False
        self.flush()
        num_index = 0
        for _ in range(_MAX_PACKETS):
            packet = self._receive()
            if packet is None:
                break
            if not packet:
                reports += [] if reports else self._ended()  # its end is reported after its last results
                break
            arrived = decode(packet, REPORTS)
            reports += arrived
            num_index += isinstance(arrived[0], IndexBatch)
            if num_index >= _MAX_INDEX_BATCHES or self._is_last_answer(arrived):
                break
        return reports

    def _is_last_answer(self, arrived: list[StoreReport]) -> bool:
        """Note what was answered; return whether it was all that was asked for.

        Then the next look at the socket would mostly find nothing, for the price of a system call. What comes unasked
        waits for the next poll.
        """
        before = left = self._num_awaited
        for report in arrived:
            if isinstance(report, PartResult):
                left -= len(report.successes)
            elif isinstance(report, ProbeAnswer):
                left -= 1
        self._num_awaited = left
        return left <= 0 < before

    def flush(self) -> None:
        if self._unsent or self._queue:
            self._send_queued()

    def cancel(self, serials: Collection[int]) -> None:
        """Answer the unsent parts of these jobs as cancelled. Ask the process to cancel those that have not begun."""
        self._packet = None  # its messages are still in `_unsent`, and it may hold a cancelled part
        parts, kept = self._queue.cancel(serials), []
        for task in self._unsent:
            if isinstance(task, Part) and task.serial in serials:
                parts.append(task)
            else:
                kept.append(task)
        self._unsent = kept
        self._local.extend(map(cancelled, parts))
        self._num_awaited -= sum(part.num_blocks for part in parts)
        self._queue.put(*Cancel.of(list(serials)))
        self._send_queued()

    def retire(self) -> None:
        """Close the socket. The process ends when its running calls have ended."""
        if self._socket is not None and self._descriptor is not None and self._descriptor.is_ours():
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # a process forked in C may hold the socket open, too
        self._let_go()

    def _let_go(self) -> None:
        """Close this process's end of the socket, and forget what was queued."""
        if self._socket is not None:
            self._socket.detach()  # its number may be another file's by now; `Descriptor` checks
            self._socket = None
        if self._descriptor is not None:
            self._descriptor.close()
        self._packet, self._queue = None, TaskQueue()
        self._unsent.clear()
        self._local.clear()

    def kill(self) -> None:
        """Kill the process with SIGKILL. A stopped one dies, too; one in an uninterruptible call when that ends."""
        self.retire()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                # A pidfd never names another process, even if the pid was reaped elsewhere and used again.
                if self._pidfd is not None and self._pidfd.is_ours():
                    signal.pidfd_send_signal(self._pidfd.number, signal.SIGKILL)
                else:
                    self._process.kill()  # there is no pidfd, or another part of this process closed it

    def has_ended(self) -> bool:
        """Return whether the process is gone and reaped. The kernel has unmapped its memory by then."""
        if self._process is None:
            return True
        if self._process.poll() is None:
            return False
        self.retire()
        self._process = None
        if self._pidfd is not None:
            self._pidfd.close()
        return True

    def wait(self, seconds: float) -> None:
        """Wait for a packet or the end of the process; without a pidfd, at most `_SECONDS_BETWEEN_LOOKS`."""
        if self._pidfd is None:
            seconds = min(seconds, _SECONDS_BETWEEN_LOOKS)
        poller = select.poll()
        for descriptor in (self._pidfd, self._descriptor):
            if descriptor is not None and descriptor.is_ours():
                poller.register(descriptor.number, select.POLLIN)
        poller.poll(seconds * 1000)

    def _send_queued(self) -> None:
        """Send questions, loads and stores, in this order, until the socket's buffer is full."""
        while self._socket is not None and (self._unsent or self._queue):
            if self._packet is None:
                self._unsent = self._unsent or self._queue.take_any(MAX_MESSAGES)
                self._packet = encode(self._unsent)
            packet, count = self._packet
            try:
                self._socket.send(packet, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:
                return  # the process is gone: `poll` finds out and reports the cause
            self._packet = None
            del self._unsent[:count]

    def _receive(self) -> memoryview | bytes | None:
        """Return a packet, until the next call; an empty one if the socket has closed; None if there is none now."""
        if self._socket is None:
            return b""
        try:
            length = self._socket.recv_into(self._buffer)
        except BlockingIOError:
            return None
        except OSError:
            return b""
        if length > MAX_PACKET_BYTES:
            raise ProtocolError("a packet that is too long")
        return self._buffer[:length]

    def _ended(self) -> list[Report]:
        """Return why the process ended. Return nothing for up to `_SECONDS_TO_EXIT` while it has not exited yet."""
        self._ended_at = self._ended_at or time.monotonic()
        code = None if self._process is None else self._process.poll()
        if code is None:
            late = time.monotonic() - self._ended_at > _SECONDS_TO_EXIT
            return [Ended("I/O process closed its socket")] if late else []
        return [Ended(f"I/O process died of signal {-code}" if code < 0 else f"I/O process exited with {code}")]
