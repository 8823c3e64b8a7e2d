"""Hands the arena of an engine core to its workers, over a Unix socket that has no file.

The core listens on a name in the abstract namespace, made of the engine's id. A worker connects, says who it is
and what its blocks look like, gets the memfd's descriptor, maps it and says so. Both sides check that the other
runs under the same user and that the core is the worker's own process or one of its ancestors, so that two engines
with one id never share memory. The name is gone when the core stops listening or dies.

Messages are JSON objects, one a packet:

    worker to core   {"rank": 0, "num_blocks": 64, "block_bytes": 4096, "identity": {...} or null, "uses_lora": false,
                      "problem": "...", "weights_follow": true}
    core to worker   {"error": ""}, with the descriptor; or {"error": "..."}
    worker to core   {"attached": true}
    worker to core   {"identity": {...} or null, "problem": "..."}, maybe minutes later, if the weights follow
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvtier import forks
from kvtier.descriptors import Descriptor
from kvtier.log import logger
from kvtier.primary.arena import Arena

MAX_MESSAGE_BYTES = 64 * 1024
"""Of an announcement; a peer that sends more is none of ours."""
_STEP_SECONDS = 0.02
"""How soon a wait notices that it is to end."""
REPLY_SECONDS = 10.0
"""For a peer that has connected to say what it wants."""
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True)
class Announcement:
    """What a worker says of itself.

    Attributes:
        rank: its place among the workers of the engine.
        num_blocks, block_bytes: shape of the arena it expects.
        identity: what makes its bytes incompatible with others, but for the weights; None if it cannot tell.
        uses_lora: the model serves LoRA adapters.
        problem: why there is no identity, in a few words.
        weights_follow: it will say which weights these are, for all workers.
        prefill_rate: guess of the tokens per second that it prefills; None on accelerators.
    """

    rank: int
    num_blocks: int
    block_bytes: int
    identity: Mapping[str, str | int] | None
    uses_lora: bool = False
    problem: str = ""
    weights_follow: bool = False
    prefill_rate: float | None = None


@dataclass(frozen=True)
class Weights:
    """What a worker says of the weights of its engine.

    Attributes:
        identity: what tells them from others, or None if it cannot tell.
        problem: why there is no identity, in a few words.
    """

    identity: Mapping[str, str | int] | None
    problem: str = ""


def socket_name(engine_id: str) -> str:
    """Return the abstract address for an engine's id, whatever its length."""
    digest = hashlib.blake2b(engine_id.encode(), digest_size=16).hexdigest()
    return f"\0kvtier/{os.getuid()}/{digest}"


class ArenaHost:
    """The core's side: a thread that serves every worker once, then calls back and ends.

    Each worker is waited for on a thread of its own, as long as it lives: where mapping the arena means to register it
    with a device, that takes a second for some GiB; and to read the weights may take minutes.
    """

    def __init__(
        self,
        engine_id: str,
        arena: Arena,
        world_size: int,
        on_complete: Callable[[list[Announcement]], None],
        on_weights: Callable[[Weights], None] = lambda weights: None,
        reply_seconds: float = REPLY_SECONDS,
    ) -> None:
        """Set up; nothing listens before `start`.

        Args:
            world_size: workers to be served.
            on_complete: called on the thread, with the announcements in the order of ranks, when all have attached.
            on_weights: called on another thread, later, when a worker whose weights follow has said them or ended.
            reply_seconds: longest wait for a worker that has connected to say who it is.
        """
        self._name = socket_name(engine_id)
        self._arena = arena
        self._world_size = world_size
        self._on_complete = on_complete
        self._on_weights = on_weights
        self._reply_seconds = reply_seconds
        self._completed = threading.Event()
        self._served: dict[int, Announcement] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvtier-arena-host", daemon=True)
        self._listening: Descriptor | None = None
        forks.register(self)

    def leave_to_parent(self) -> None:
        """In a forked child, close the copy of the listening socket: the name must be free when the parent ends."""
        self._stop = threading.Event()
        if self._listening is not None:
            self._listener.detach()
            self._listening.close()

    def start(self) -> None:
        """Listen, and serve on a thread.

        Raises:
            OSError: another engine of this machine listens under the same id.
        """
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.bind(self._name)
            self._listener.listen(self._world_size + 8)
            self._listener.settimeout(_STEP_SECONDS)
            self._listening = Descriptor(self._listener.fileno())
        except BaseException:
            self._listener.close()
            raise
        self._thread.start()

    def stop(self) -> None:
        """End the thread, unless it is the caller; idempotent."""
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(self._reply_seconds)

    def _run(self) -> None:
        with self._listener:
            while len(self._served) < self._world_size:
                if self._stop.is_set():
                    return
                try:
                    connection, _ = self._listener.accept()
                except TimeoutError:
                    continue
                threading.Thread(target=self._serve, args=(connection,), name="kvtier-arena-guest", daemon=True).start()
        self._on_complete([self._served[rank] for rank in range(self._world_size)])
        self._completed.set()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.settimeout(self._reply_seconds)
                pid, uid = peer_of(connection)
                if uid != os.getuid() or os.getpid() not in lineage(pid):
                    raise ValueError(f"process {pid} of user {uid} is no worker of this engine")
                announcement = Announcement(**_receive(connection))
                self._check(announcement)
                socket.send_fds(connection, [_packed({"error": ""})], [self._arena.fd])
                if self._wait_for(connection).get("attached") is True:
                    self._served[announcement.rank] = announcement
                    if announcement.weights_follow:
                        self._receive_weights(connection)
            except (OSError, ValueError, TypeError) as error:
                logger.warning("a worker could not be given the arena: %s", error)
                _try_to_send(connection, {"error": str(error)})

    def _receive_weights(self, connection: socket.socket) -> None:
        try:
            said = self._wait_for(connection)
            weights = Weights(said.get("identity"), said.get("problem") or said.get("error") or "")
        except OSError as error:
            weights = Weights(None, f"the worker that reads the weights has ended ({error})")
        while not self._completed.wait(_STEP_SECONDS):
            if self._stop.is_set():
                return
        if not self._stop.is_set():
            self._on_weights(weights)

    def _wait_for(self, connection: socket.socket) -> dict[str, Any]:
        """Return the next message, however late it comes; one without content when the host stops."""
        connection.settimeout(_STEP_SECONDS)
        while not self._stop.is_set():
            try:
                return _receive(connection)
            except TimeoutError:
                continue
        return {}

    def _check(self, announcement: Announcement) -> None:
        shape, wanted = (announcement.num_blocks, announcement.block_bytes), self._arena.view.shape
        if shape != wanted:
            raise ValueError(f"rank {announcement.rank} expects blocks of shape {shape}, the engine core has {wanted}")
        if not 0 <= announcement.rank < self._world_size:
            raise ValueError(f"rank {announcement.rank}: 0 to {self._world_size - 1} expected")


def attach_arena(
    engine_id: str,
    announcement: Announcement,
    take: Callable[[Arena], None],
    wait_for_weights: Callable[[], Weights] | None = None,
) -> str:
    """Ask the engine's core for its arena, once.

    Args:
        take: given the mapped arena, which it owns from now on, before the core is told.
        wait_for_weights: called after that if the announcement says that weights follow.

    Returns:
        "" if the arena was taken, else why not yet: no core listens, or it is no ancestor of this process.

    Raises:
        ValueError: the core refused for good.
        OSError: the descriptor could not be received or mapped.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(REPLY_SECONDS)
        try:
            connection.connect(socket_name(engine_id))
        except OSError as error:
            if error.errno in (errno.ECONNREFUSED, errno.EAGAIN, errno.ENOENT):
                return "no engine core listens"
            raise
        pid, uid = peer_of(connection)
        if uid != os.getuid() or pid not in lineage(os.getpid()):
            return f"process {pid} of user {uid} listens, which is not this worker's engine core"
        connection.send(_packed(asdict(announcement)))
        message, descriptors, _, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, 1)
        try:
            refusal = _unpacked(message).get("error")
            if refusal or not descriptors:
                raise ValueError(refusal or "the engine core sent no arena")
            take(Arena.attach(descriptors[0], announcement.num_blocks, announcement.block_bytes))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        connection.send(_packed({"attached": True}))
        if announcement.weights_follow and wait_for_weights is not None:
            _try_to_send(connection, asdict(wait_for_weights()))
    return ""


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return (process id, user id) of the other end of a Unix socket."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return pid, uid


def lineage(pid: int) -> list[int]:
    """Return a process, its parent, and so on, as far as /proc tells."""
    found: list[int] = []
    while pid > 0 and pid not in found:
        found.append(pid)
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            break
        pid = int(stat.rpartition(")")[2].split()[1])  # the name before it may hold anything
    return found


def _packed(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode()


def _unpacked(raw: bytes) -> dict[str, Any]:
    message = json.loads(raw) if raw else {"error": "the connection was closed"}
    if not isinstance(message, dict):
        raise ValueError(f"a JSON object expected, not {raw[:40]!r}")
    return message


def _receive(connection: socket.socket) -> dict[str, Any]:
    return _unpacked(connection.recv(MAX_MESSAGE_BYTES))


def _try_to_send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    try:
        connection.send(_packed(message))
    except OSError:
        return  # the other end is gone, and the engine with it
