"""One client of a Valkey server, in a process of its own: kvtier's resp tier, LMCache's client, or bare sockets.

What the process reads and prints: see `peer_worker`.
"""

from __future__ import annotations

import queue
import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from peer_worker import Pattern, keys_of, serve

from kvtier.abc import TierContext
from kvtier.cli.disk_speed.session import MeasuringSpec
from kvtier.errors import KVTierError
from kvtier.events import TierState
from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.primary.arena import Arena
from kvtier.types import JobMetadata, ReqContext, ScheduleEndContext

_JOB_BYTES = 4 << 20
_IN_FLIGHT_BYTES = 64 << 20
_GROUP_BYTES = 512 << 10
"""What a bare client with checksums sends or asks for at once."""
_STEP_SECONDS = 0.0005
"""Time between two looks for results, for every client."""
_START_SECONDS = 60.0


@dataclass(frozen=True)
class PeerOrder:
    """What a process runs.

    Attributes:
        peer: a key of `PEERS`.
        connections: None for the peer's default.
    """

    peer: str
    host: str
    port: int
    block_bytes: int
    num_blocks: int
    connections: int | None

    def keys(self, round_number: int) -> list[OffloadKey]:
        return keys_of(f"{self.peer}-{round_number}", self.num_blocks)


class Peer(ABC):
    """Moves jobs of blocks between the arena's slots and the server."""

    @abstractmethod
    def begin(self, job_id: int, keys: Sequence[OffloadKey], slots: range, load: bool) -> None:
        """Begin a job."""

    @abstractmethod
    def ended(self) -> list[int]:
        """Return the ids of jobs that have ended, without waiting long.

        Raises:
            KVTierError: a job failed.
        """

    def cpu_seconds(self) -> float:
        """Return the processor time so far of all that moves bytes, without the thread that waits for results."""
        return time.process_time() - time.thread_time()


class KVTierPeer(Peer):
    """The resp tier as an engine has it, with its I/O process and checksums."""

    def __init__(self, order: PeerOrder, arena: Arena) -> None:
        from kvtier.secondary.resp import RespTierManager

        spec = MeasuringSpec(TierContext(namespace=Namespace({"model": "peers"}), arena_fd=arena.fd))
        options = {} if order.connections is None else {"connections": order.connections}
        url = f"redis://{order.host}:{order.port}"
        self._tier = RespTierManager(spec, arena.view, "resp", url=url, **options)
        self._context = ReqContext("peers")
        self._tier.start()
        deadline = time.monotonic() + _START_SECONDS
        while self._tier.state is not TierState.UP:
            if time.monotonic() > deadline:
                raise KVTierError(f"the tier did not start: {self._tier.state.value} {self._tier.state_reason}")
            self.ended()

    def begin(self, job_id: int, keys: Sequence[OffloadKey], slots: range, load: bool) -> None:
        job = JobMetadata(job_id, keys, np.arange(slots.start, slots.stop, dtype=np.int32), load, self._context)
        (self._tier.submit_load if load else self._tier.submit_store)(job)
        self._tier.on_schedule_end(ScheduleEndContext())

    def ended(self) -> list[int]:
        time.sleep(_STEP_SECONDS)  # a step of a scheduler that has nothing else to do
        results = list(self._tier.get_finished_jobs())
        self._tier.on_schedule_end(ScheduleEndContext())
        if not all(result.success for result in results):
            raise KVTierError("a job failed")
        return [result.job_id for result in results]

    def cpu_seconds(self) -> float:
        pid = self._tier.io_pid
        if pid is None:
            raise KVTierError("the tier's I/O process is gone")
        return time.clock_gettime((~pid << 3) | 2)  # Linux numbers a process's CPU clock so, see clock_getcpuclockid(3)


class LMCachePeer(Peer):
    """LMCache's client in C++, with threads of its own in this process, and without checksums."""

    def __init__(self, order: PeerOrder, arena: Arena) -> None:
        from lmcache.lmcache_redis import LMCacheRedisClient

        self._client = LMCacheRedisClient(order.host, order.port, order.connections or 8)
        self._rows = [arena.row(slot) for slot in range(arena.num_blocks)]
        self._poller = select.poll()
        self._poller.register(self._client.event_fd(), select.POLLIN)
        self._jobs: dict[int, tuple[int, list[memoryview]]] = {}

    def begin(self, job_id: int, keys: Sequence[OffloadKey], slots: range, load: bool) -> None:
        names, rows = [key.hex() for key in keys], self._rows[slots.start : slots.stop]
        submit = self._client.submit_batch_get if load else self._client.submit_batch_set
        self._jobs[submit(names, rows)] = job_id, rows

    def ended(self) -> list[int]:
        time.sleep(_STEP_SECONDS)  # as for kvtier
        if not self._poller.poll(0):
            return []
        completions = self._client.drain_completions()
        if not all(ok and all(found or [True]) for _, ok, _, found in completions):
            raise KVTierError("a job failed")
        return [self._jobs.pop(future)[0] for future, *_ in completions]


class RawPeer(Peer):
    """One socket that sends and receives one block after the other, and checks nothing."""

    def __init__(self, order: PeerOrder, arena: Arena) -> None:
        self._socket = socket.create_connection((order.host, order.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._arena = arena
        self._small = memoryview(bytearray(64))
        self._ended: list[int] = []

    def begin(self, job_id: int, keys: Sequence[OffloadKey], slots: range, load: bool) -> None:
        move = self._get if load else self._set
        for key, slot in zip(keys, slots, strict=True):
            move(key.hex().encode(), self._arena.row(slot))
        self._ended.append(job_id)

    def ended(self) -> list[int]:
        ended, self._ended = self._ended, []
        return ended

    def cpu_seconds(self) -> float:
        return time.process_time()

    def _set(self, name: bytes, row: memoryview) -> None:
        self._socket.sendall(b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, row.nbytes))
        self._socket.sendall(row)
        self._socket.sendall(b"\r\n")
        receive(self._socket, self._small[:5])

    def _get(self, name: bytes, row: memoryview) -> None:
        self._socket.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name))
        receive(self._socket, self._small[: len(b"$%d\r\n" % row.nbytes)])
        receive(self._socket, row)
        receive(self._socket, self._small[:2])


class SummedPeer(Peer):
    """The least that a client in Python does that sums each payload, without a tier, a process or headers around it.

    Each thread has a socket, and sends or asks for half a MiB at a time.
    """

    def __init__(self, order: PeerOrder, arena: Arena) -> None:
        self._arena = arena
        self._group = max(1, _GROUP_BYTES // order.block_bytes)
        self._jobs: queue.SimpleQueue[tuple[int, Sequence[OffloadKey], range, bool]] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        for _ in range(order.connections or 1):
            connection = socket.create_connection((order.host, order.port))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._work, args=(connection,), daemon=True).start()

    def begin(self, job_id: int, keys: Sequence[OffloadKey], slots: range, load: bool) -> None:
        self._jobs.put((job_id, keys, slots, load))

    def ended(self) -> list[int]:
        time.sleep(_STEP_SECONDS)  # as for kvtier
        ended = [self._ended.get() for _ in range(self._ended.qsize())]
        if None in ended:
            raise KVTierError("a connection was lost")
        return [job_id for job_id in ended if job_id is not None]

    def _work(self, connection: socket.socket) -> None:
        try:
            while True:
                job_id, keys, slots, load = self._jobs.get()
                names = [key.hex().encode() for key in keys]
                rows = [self._arena.row(slot) for slot in slots]
                for start in range(0, len(names), self._group):
                    group = slice(start, start + self._group)
                    (self._get if load else self._set)(connection, names[group], rows[group])
                self._ended.put(job_id)
        except OSError:
            self._ended.put(None)

    def _set(self, connection: socket.socket, names: list[bytes], rows: list[memoryview]) -> None:
        pieces: list[bytes | memoryview] = []
        for name, row in zip(names, rows, strict=True):
            xxhash.xxh3_128_digest(row)
            pieces += [b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, row.nbytes), row, b"\r\n"]
        left = sum(map(len, pieces))
        while left:
            sent = connection.sendmsg(pieces)
            left -= sent
            while pieces and sent >= len(pieces[0]):
                sent -= len(pieces.pop(0))
            if sent:
                pieces[0] = memoryview(pieces[0])[sent:]
        connection.recv(len(b"+OK\r\n") * len(names), socket.MSG_WAITALL)

    def _get(self, connection: socket.socket, names: list[bytes], rows: list[memoryview]) -> None:
        connection.sendall(b"".join(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name) for name in names))
        for row in rows:
            line = b"$%d\r\n" % row.nbytes
            connection.recvmsg_into([bytearray(len(line)), row, bytearray(2)], 0, socket.MSG_WAITALL)
            xxhash.xxh3_128_digest(row)


PEERS: dict[str, type[Peer]] = {"raw": RawPeer, "kvtier": KVTierPeer, "LMCache": LMCachePeer, "summed": SummedPeer}


def receive(connection: socket.socket, view: memoryview) -> None:
    """Receive until `view` is full."""
    done = 0
    while done < len(view):
        received = connection.recv_into(view[done:])
        if not received:
            raise ConnectionError("the other side is gone")
        done += received


class Session:
    """A peer, its arena, and what drives it."""

    def __init__(self, order: PeerOrder) -> None:
        self._order = order
        self._arena = Arena.create(order.num_blocks, order.block_bytes)
        self._pattern = Pattern(self._arena.view)
        self._peer = PEERS[order.peer](order, self._arena)

    def describe(self) -> dict[str, str]:
        """Return nothing: there is nothing special."""
        return {}

    def move(self, load: bool, round_number: int) -> dict[str, float]:
        """Store or load each block once; compare the bytes after a load.

        Raises:
            KVTierError: a job failed, or a byte differs.
        """
        keys = self._order.keys(round_number)
        if load:
            self._pattern.clear()
        else:
            self._pattern.fill(round_number)
        cpu, start = self._peer.cpu_seconds(), time.perf_counter()
        self._run(keys, load)
        seconds, cpu = time.perf_counter() - start, self._peer.cpu_seconds() - cpu
        if load:
            self._pattern.compare(round_number)
        gigabytes = self._pattern.words.nbytes / 1e9
        return {"gb_per_second": gigabytes / seconds, "cpu_per_gb": cpu / gigabytes, "gigabytes": gigabytes}

    def _run(self, keys: Sequence[OffloadKey], load: bool) -> None:
        job_blocks = max(1, _JOB_BYTES // self._order.block_bytes)
        most_jobs = max(2, _IN_FLIGHT_BYTES // (job_blocks * self._order.block_bytes))
        waiting = deque(range(0, len(keys), job_blocks))
        in_flight: set[int] = set()
        while waiting or in_flight:
            while waiting and len(in_flight) < most_jobs:
                start = waiting.popleft()
                stop = min(start + job_blocks, len(keys))
                self._peer.begin(start, keys[start:stop], range(start, stop), load)
                in_flight.add(start)
            in_flight.difference_update(self._peer.ended())

    def close(self) -> None:
        """Do nothing: what the peer holds ends with its process."""


if __name__ == "__main__":
    serve(lambda order: Session(PeerOrder(**order)))
