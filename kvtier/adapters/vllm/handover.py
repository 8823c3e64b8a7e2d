"""Hands the arena of an engine core to its workers, over an abstract Unix socket.

The core listens on an abstract name made of the engine's id. A worker connects, announces its rank and the layout of
its blocks, receives the arena's file descriptor, maps it and confirms. Both sides check that the other runs under the
same user, and that the core is the worker's own process or one of its ancestors. So two engines with the same id never
share memory. The kernel frees the name when the core stops listening or dies.

Messages are JSON objects, one per packet:

    worker to core   {"rank": 0, "num_blocks": 64, "block_bytes": 4096, "identity": {...} or null, "uses_lora": false,
                      "problem": "...", "weights_follow": true}
    core to worker   {"error": ""} with the descriptor, or {"error": "..."}
    worker to core   {"attached": true}
    worker to core   {"identity": {...} or null, "problem": "..."}, maybe minutes later, if `weights_follow` was true
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
"""Largest message that is received; an announcement is far smaller."""
_STEP_SECONDS = 0.02
"""Longest time until a waiting thread notices `stop`."""
REPLY_SECONDS = 10.0
"""Longest wait for a worker's announcement, or for the core's answer to it."""
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True)
class Announcement:
    """A worker's first message.

    Attributes:
        rank: the worker's rank.
        num_blocks, block_bytes: shape of the arena that the worker expects.
        identity: everything but the weights that makes stored bytes incompatible; None if it is not known.
        uses_lora: the model serves LoRA adapters.
        problem: why there is no identity, in a few words.
        weights_follow: this worker will send the weights' identity, for all workers.
        prefill_rate: guess of the tokens per second that the worker prefills; None on accelerators.
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
    """A worker's message about its engine's weights.

    Attributes:
        identity: names and digests that differ for other weights; None if they are not known.
        problem: why there is no identity, in a few words.
    """

    identity: Mapping[str, str | int] | None
    problem: str = ""


def socket_name(engine_id: str) -> str:
    """Return the abstract socket address for an engine's id."""
    # A digest, since the kernel allows 108 bytes (unix(7)) and an id may be longer.
    digest = hashlib.blake2b(engine_id.encode(), digest_size=16).hexdigest()
    return f"\0kvtier/{os.getuid()}/{digest}"


class ArenaHost:
    """The core's side: a thread accepts connections until every worker has attached, then calls back and ends.

    Each worker has its own thread, which waits as long as the worker lives. Registering the arena with a device takes
    about a second for some GiB, and reading the weights may take minutes.
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
        """`start` begins to listen.

        Args:
            world_size: number of workers.
            on_complete: called on the host's thread when all workers have attached, with the announcements in the
                order of ranks.
            on_weights: called later on another thread, when a worker that announced `weights_follow` has sent them or
                has ended.
            reply_seconds: longest wait for the announcement of a connected worker.
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
        """In a forked child, close the copy of the listening socket."""
        # The kernel frees an abstract name with the socket's last descriptor. It must be free when the parent ends.
        self._stop = threading.Event()
        if self._listening is not None:
            self._listener.detach()
            self._listening.close()

    def start(self) -> None:
        """Listen, and serve workers on a thread.

        Raises:
            OSError: another engine of this machine listens under the same id.
        """
        # SEQPACKET keeps message boundaries: one send is one receive, and the descriptor comes with its message.
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
        """End the host's thread; idempotent. A callback on that thread may call it, too."""
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
        except (OSError, ValueError, TypeError) as error:  # it has ended, or what it sent is no message
            weights = Weights(None, f"nothing was learned from the worker that reads the weights ({error})")
        while not self._completed.wait(_STEP_SECONDS):
            if self._stop.is_set():
                return
        if not self._stop.is_set():
            self._on_weights(weights)

    def _wait_for(self, connection: socket.socket) -> dict[str, Any]:
        """Return the next message, however late it comes; {} when the host stops."""
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
        take: receives the mapped arena and owns it from then on; called before the core gets the confirmation.
        wait_for_weights: called after the confirmation if the announcement has `weights_follow`.

    Returns:
        "" if the arena was taken. Else the reason to try again: no core listens, or the listener is not this worker's.

    Raises:
        ValueError: the core refused; another attempt would be refused, too.
        OSError: the descriptor could not be received or mapped.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(REPLY_SECONDS)
        try:
            connection.connect(socket_name(engine_id))
        except OSError as error:
            # An abstract name without listener gives ECONNREFUSED, and a full queue of connections gives EAGAIN.
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
                os.close(descriptor)  # a mapping stays without its descriptor
        connection.send(_packed({"attached": True}))
        if announcement.weights_follow and wait_for_weights is not None:
            _try_to_send(connection, asdict(wait_for_weights()))
    return ""


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return (process id, user id) of a Unix socket's other end, as the kernel noted them at connect or listen."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return pid, uid


def lineage(pid: int) -> list[int]:
    """Return `pid`, its parent's id and so on, as far as /proc shows them."""
    found: list[int] = []
    while pid > 0 and pid not in found:
        found.append(pid)
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            break
        pid = int(stat.rpartition(")")[2].split()[1])  # the name before it may hold spaces and parentheses
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
        return  # the other end has ended, and the engine ends with it
