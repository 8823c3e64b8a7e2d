"""A `BlockStore` in Valkey or Redis: one value per block, named after prefix, namespace and the block's key."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Self

from kvtier.abc import StoreContext
from kvtier.errors import StoreError, StoreUnavailableError
from kvtier.keys import OffloadKey
from kvtier.log import logger
from kvtier.stores.failures import UNREADABLE, CleanUp
from kvtier.stores.integrity import open_sealer
from kvtier.stores.integrity.sealing import Sealer
from kvtier.stores.resp.commands import Exchanges, Operation, Outcome, Request, ask_memory
from kvtier.stores.resp.connections import Server, ServerLostError
from kvtier.stores.resp.fullness import Fullness
from kvtier.stores.resp.options import RespOptions
from kvtier.stores.resp.topology import Topology, open_topology
from kvtier.stores.resp.wire import BATCH_BYTES, Break, ConnectionBrokenError, Refused
from kvtier.stores.varied import VariedStore
from kvtier.types import FailureCause, KeyPage, StoreUsage

_ATTEMPTS = 3
"""One more attempt for a closed connection, and one for a slot that has moved."""
_LONGEST_PAUSE = 0.02
"""Longest random pause, in seconds, before a new connection: all engines lose their connections at the same moment."""
_BREAKS_TO_LOSE = 3
"""Broken connections in a row after which a server counts as lost."""
_SECONDS_BETWEEN_USAGES = 5.0
"""Time between two questions for a server's memory; each takes a round trip."""
_USAGE_TIMEOUT_SECONDS = 1.0
"""Short, since the results of a job wait for the answer."""
_REDIRECTIONS = frozenset({"MOVED", "ASK"})
_UNUSABLE = frozenset({"LOADING", "MASTERDOWN", "NOAUTH", "CLUSTERDOWN"})
"""Error codes of a server that cannot serve any command at the moment."""
_KNOWN_REFUSALS = frozenset({"ERR", "NOPERM", "READONLY", "MISCONF", "BUSY", "NOREPLICAS", "NOPROTO", "CROSSSLOT"})
"""Error codes that are logged once each; all other codes together are logged once."""
_CAUSES = {
    "OOM": FailureCause.NO_SPACE,
    "WRONGTYPE": FailureCause.CORRUPT,
    **dict.fromkeys(_UNUSABLE, FailureCause.UNREACHABLE),
}


class RespStore(VariedStore):
    """Sealed blocks in a server that engines share.

    A value is a payload and its header. Plain payloads are sent from and received into the caller's buffers, without a
    copy. Blocks that do not verify are counted and deleted. Threads share the store; each call has its own connections.
    """

    def __init__(self, topology: Topology, settings: RespOptions, sealer: Sealer, context: StoreContext) -> None:
        """Args:
        topology: connected; `close` closes it.
        sealer: of the blocks.
        """
        self._topology = topology
        self._timeout = settings.timeout
        self._most_connections = settings.connections_per_call
        self._failures = context.failures
        self._block_bytes, self._compressed = context.block_bytes, context.compressed
        ttl = None if settings.ttl is None else int(settings.ttl * 1000)
        self._exchanges = Exchanges(sealer, context.block_bytes, settings.prefix, ttl, context.compressed)
        self._fullness = Fullness()
        self._breaks: Counter[Server] = Counter()
        self._usage: StoreUsage | None = None
        self._ask_usage_at = 0.0
        self._clean_up = CleanUp()
        self._told: set[str] = set()
        self._cannot_keep: set[Server] = set()
        self._lost: StoreUnavailableError | None = None
        """Why no server can be used, if an earlier call that has moved blocks found out."""

    @classmethod
    def open(cls, options: Mapping[str, Any], context: StoreContext) -> Self:
        """Connect; options: `RespOptions`.

        Raises:
            StoreUnavailableError: no server answers, or all refuse the login.
        """
        _, sealer = open_sealer(options, context.namespace, context.whole_bytes)
        settings = RespOptions.read(options)
        return cls(open_topology(settings), settings, sealer, context)

    def name(self, key: OffloadKey) -> bytes:
        """Return the name of a block's value on the server."""
        return self._exchanges.name(key)

    def contains(self, keys: Sequence[OffloadKey]) -> list[bool]:
        """Return per key whether the servers have it; the blocks of a cluster's lost node count as absent."""
        self._check()
        known = self._look(keys)
        requests = [Request(key, self.name(key)) for key, held in zip(keys, known, strict=True) if held is None]
        self._carry_out(self._exchanges.find, requests)
        if requests and all(_failed(request) for request in requests):
            raise StoreError(f"existence: {_explain(requests[0])}")
        found = iter(requests)
        return [next(found).reply is Outcome.DONE if held is None else held for held in known]

    def ask_held(self, keys: Sequence[OffloadKey]) -> list[bool]:
        """As `contains`, but raise StoreError if a server refuses to say, or breaks off; a lost node has nothing."""
        self._check()
        requests = [Request(key, self.name(key)) for key in keys]
        self._carry_out(self._exchanges.find, requests)
        if unclear := next(filter(_failed, requests), None):
            raise StoreError(f"existence: {_explain(unclear)}")
        return [request.reply is Outcome.DONE for request in requests]

    def _look(self, keys: Sequence[OffloadKey]) -> list[bool | None]:
        """Ask a single server with few commands; return None for the keys that must be asked one by one."""
        server = self._topology.only_server
        unknown: list[bool | None] = [None] * len(keys)
        if server is None or len(set(map(len, keys))) != 1:
            return unknown
        try:
            return server.exchange(lambda wire: self._exchanges.look(wire, keys), time.monotonic() + self._timeout)
        except (ServerLostError, ConnectionBrokenError):
            return unknown  # asking one by one will find out why

    def write(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        """Store the blocks; False also for a buffer of another length."""
        requests = self._requests(keys, buffers, self._compressed)
        self._move(self._exchanges.write, [request for request in requests if request is not None])
        return self._results(requests)

    def read_varied(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[int]:
        """Fill and verify buffers; return the lengths of the payloads, 0 for a block that failed."""
        requests = self._requests(keys, buffers)
        self._move(self._exchanges.read, [request for request in requests if request is not None])
        results = self._results(requests)
        broken = [request.key for request in requests if request is not None and _cause(request) in UNREADABLE]
        if broken:
            with self._clean_up:
                self.delete(broken)
        read = zip(requests, results, strict=True)
        return [request.buffer.nbytes if request is not None and success else 0 for request, success in read]

    def delete(self, keys: Sequence[OffloadKey]) -> None:
        """Forget `keys`."""
        self._check()
        requests = [Request(key, self.name(key)) for key in keys]
        self._carry_out(self._exchanges.delete, requests)
        undone = [request for request in requests if request.reply not in (Outcome.DONE, Outcome.NOT_HELD)]
        if undone:
            raise StoreError(f"deleting: {_explain(undone[0])}")

    def keep(self, keys: Sequence[OffloadKey], seconds: float) -> list[bool] | None:
        """Make the blocks the most recently used of their server; None if all servers always refuse that.

        A server that refuses is only asked what it has. If its refusal will not change, it is not tried there again:
        servers log each attempt.

        Raises:
            StoreError: no server answers.
        """
        self._check()
        requests = [Request(key, self.name(key)) for key in keys]
        if not self._cannot_keep.issuperset(self._topology.servers):
            self._carry_out(self._exchanges.keep, requests)
        if self._cannot_keep.issuperset(self._topology.servers):
            return None
        refused = [request for request in requests if isinstance(request.reply, Refused)]
        for request in refused:
            request.reply, request.server, request.asking = Outcome.UNANSWERED, None, False
        self._carry_out(self._exchanges.find, refused)
        if requests and all(request.reply not in (Outcome.DONE, Outcome.NOT_HELD) for request in requests):
            raise StoreError(f"keeping: {_explain(requests[0])}")
        return [request.reply is Outcome.DONE for request in requests]

    def list_keys(self, cursor: bytes, most: int) -> KeyPage:
        """SCAN one server after the other, in the order of their addresses. A lost node's blocks do not come.

        Raises:
            StoreError: the server does not answer, or refuses.
        """
        self._check()
        address, _, place = cursor.decode(errors="replace").partition(" ")
        servers = sorted((one for one in self._topology.servers if one.address >= address), key=lambda one: one.address)
        if not servers:
            return KeyPage([], None)
        server = servers[0]
        start = int(place) if server.address == address and place.isdecimal() else 0
        try:
            page = server.exchange(
                lambda wire: self._exchanges.scan(wire, start, most), time.monotonic() + self._timeout
            )
        except (ServerLostError, ConnectionBrokenError) as error:
            raise StoreError(f"listing: {error}") from error
        if isinstance(page, Refused):
            raise StoreError(f"listing: {page}")
        following, keys = page
        if following:
            return KeyPage(keys, f"{server.address} {following}".encode())
        return KeyPage(keys, f"{servers[1].address} 0".encode() if len(servers) > 1 else None)

    def usage(self) -> StoreUsage | None:
        """Return the memory and the limits of all servers, as of some seconds ago.

        The memory includes all data of a server, since a server does not tell how much of it are blocks.
        """
        return self._usage

    def _ask_usage(self) -> None:
        """Ask all servers for their memory, unless one will always refuse: servers may log each attempt."""
        self._ask_usage_at = math.inf
        deadline = time.monotonic() + min(self._timeout, _USAGE_TIMEOUT_SECONDS)
        try:
            told = [server.exchange(ask_memory, deadline) for server in self._topology.servers]
        except (ServerLostError, ConnectionBrokenError):
            self._usage = None  # this does not count as a broken connection; the next job will find out
        else:
            self._usage = _usage_of(told)
            if any(memory is None or (isinstance(memory, Refused) and memory.is_final) for memory in told):
                return
        self._ask_usage_at = time.monotonic() + _SECONDS_BETWEEN_USAGES

    def close(self) -> None:
        """Close every connection."""
        self._topology.close()

    def _requests(
        self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview], shorter_too: bool = False
    ) -> list[Request | None]:
        """Return one request per block; None for a buffer of another length."""
        if len(keys) != len(buffers):
            raise StoreError(f"{len(keys)} keys and {len(buffers)} buffers")
        least, name = 1 if shorter_too else self._block_bytes, self._exchanges.name
        return [
            Request(key, name(key), buffer) if least <= buffer.nbytes <= self._block_bytes else None
            for key, buffer in zip(keys, buffers, strict=True)
        ]

    def _check(self) -> None:
        if self._lost is not None:
            raise StoreUnavailableError(str(self._lost))

    def _move(self, operation: Operation, requests: Sequence[Request]) -> None:
        """Carry out the requests. If the last server is lost after blocks were moved, the next call raises that.

        Raises:
            StoreUnavailableError: no server can be used, and no block was moved.
        """
        self._check()
        try:
            self._carry_out(operation, requests)
        except StoreUnavailableError as error:
            if not any(request.reply is Outcome.DONE for request in requests):
                raise
            self._lost = error

    def _carry_out(self, operation: Operation, requests: Sequence[Request]) -> None:
        """Send the requests to their servers, and set the replies that arrive within the timeout.

        Raises:
            StoreUnavailableError: no server can be used.
        """
        deadline = time.monotonic() + self._timeout
        left = requests
        for attempt in range(_ATTEMPTS):
            repeat: list[Request] = []
            for server, share in self._topology.share_out(left):
                if operation == self._exchanges.write and self._fullness.refuse(server, share):
                    continue
                repeat += self._run(operation, server, share, deadline, attempt + 1 < _ATTEMPTS)
            if not repeat:
                return
            left = repeat

    def _run(
        self, operation: Operation, server: Server, share: list[Request], deadline: float, may_repeat: bool
    ) -> list[Request]:
        """Run a batch on one server; return the requests to send again."""
        closed = False
        if operation == self._exchanges.keep and server in self._cannot_keep:
            operation = self._exchanges.find
        try:
            most = self._connections_for(operation, share) if may_repeat else 1  # of two, the second may be to blame
            server.exchange_on(most, lambda wires: operation(wires, share), deadline)
        except ServerLostError as error:
            self._topology.lose(server, str(error))
            return []
        except ConnectionBrokenError as error:
            closed = error.kind is Break.CLOSED and may_repeat
            if closed:
                time.sleep(random.uniform(0, _LONGEST_PAUSE))
            else:
                self._note_break(server, error)
                for request in share:
                    if request.reply is Outcome.UNANSWERED:
                        request.reply = FailureCause.IO_ERROR
        else:
            self._breaks.pop(server, None)
            self._note_replies(server, share, operation)
        repeat = [request for request in share if closed and request.reply is Outcome.UNANSWERED]
        return repeat + (self._redirected(share) if may_repeat else [])

    def _connections_for(self, operation: Operation, share: Sequence[Request]) -> int:
        """Return on how many connections a batch goes at most.

        A few blocks go on one, and questions. So do loads of blocks that fill a connection: another one that the server
        sends meanwhile has left the processor's cache when it is received.
        """
        is_load = operation == self._exchanges.read
        if not (is_load or operation == self._exchanges.write) or (is_load and self._block_bytes > BATCH_BYTES):
            return 1
        return min(self._most_connections, self._exchanges.batches_of(len(share)))

    def _note_break(self, server: Server, error: ConnectionBrokenError) -> None:
        self._breaks[server] += 1
        if self._breaks[server] >= _BREAKS_TO_LOSE:
            self._breaks.pop(server, None)
            self._topology.lose(server, str(error))

    def _note_replies(self, server: Server, share: Sequence[Request], operation: Operation) -> None:
        """Update the server's state from its replies."""
        refusals = [request.reply for request in share if isinstance(request.reply, Refused)]
        unusable = next((refused for refused in refusals if refused.code in _UNUSABLE), None)
        if unusable is not None:
            self._topology.lose(server, f"{server.address}: {unusable}")
        else:
            self._topology.regain(server)
            self._tell(server, refusals)
            if operation == self._exchanges.write:
                self._fullness.learn(server, share, refusals)
            elif operation == self._exchanges.keep and any(refused.is_final for refused in refusals):
                self._cannot_keep.add(server)

    def _tell(self, server: Server, refusals: Sequence[Refused]) -> None:
        """Log each kind of refusal once, except for those that are handled elsewhere."""
        for refused in refusals:
            kind = refused.code if refused.code in _KNOWN_REFUSALS else ""
            if refused.code not in _CAUSES and refused.code not in _REDIRECTIONS and kind not in self._told:
                self._told.add(kind)
                logger.warning("resp: %s refuses: %s", server.address, refused)

    def _redirected(self, share: Sequence[Request]) -> list[Request]:
        redirected = []
        for request in share:
            refused = request.reply
            if not isinstance(refused, Refused) or refused.code not in _REDIRECTIONS:
                continue
            if self._topology.redirect(request, refused):
                request.reply = Outcome.UNANSWERED
                redirected.append(request)
        return redirected

    def _results(self, requests: Sequence[Request | None]) -> list[bool]:
        """Return per block whether it was moved, and count the others by cause."""
        causes = [FailureCause.IO_ERROR if request is None else _cause(request) for request in requests]
        for cause, blocks in Counter(filter(None, causes)).items():
            self._failures.count(cause, blocks)
        if time.monotonic() >= self._ask_usage_at:
            self._ask_usage()
        return [cause is None for cause in causes]


def _cause(request: Request) -> FailureCause | None:
    """Return why a block was not moved; None if it was."""
    reply = request.reply
    if reply is Outcome.DONE:
        return None
    if isinstance(reply, FailureCause):
        return reply
    if isinstance(reply, Refused):
        return _CAUSES.get(reply.code, FailureCause.IO_ERROR)
    return FailureCause.ABSENT if reply is Outcome.NOT_HELD else FailureCause.UNREACHABLE


def _usage_of(told: Sequence[tuple[int, int] | Refused | None]) -> StoreUsage | None:
    """Return the sum of what servers tell of their memory; None if one has not told it."""
    known = [memory for memory in told if memory is not None and not isinstance(memory, Refused)]
    if len(known) < len(told):
        return None
    limits = [limit for _, limit in known]
    return StoreUsage(None, sum(used for used, _ in known), sum(limits) if all(limits) else None)


def _failed(request: Request) -> bool:
    return isinstance(request.reply, Refused | FailureCause)


def _explain(request: Request) -> str:
    return str(request.reply) if isinstance(request.reply, Refused) else "no answer"
