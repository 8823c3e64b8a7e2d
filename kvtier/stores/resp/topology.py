"""Finds the server of a block: a single server, or the node of a cluster that owns the block's slot."""

from __future__ import annotations

import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence

from redis.crc import key_slot

from kvtier.errors import StoreUnavailableError
from kvtier.log import logger
from kvtier.stores.resp.commands import Request
from kvtier.stores.resp.connections import Server, ServerLostError
from kvtier.stores.resp.options import RespOptions
from kvtier.stores.resp.slots import NUM_SLOTS, SlotRange, ask_slots, parse_port
from kvtier.stores.resp.wire import ConnectionBrokenError, Refused, parse_count

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0
"""Seconds before a lost node is tried again: doubled each time, times a random factor of 0.5 to 1.5."""
_MAX_SERVERS = 1024
"""Most servers that a cluster may name. Valkey recommends at most about 1,000 nodes."""
_REFRESH_SECONDS = 0.5
"""Least time between two reads of the slot table."""


class Topology(ABC):
    """The servers, and which of them has a block. Threads share it."""

    @abstractmethod
    def share_out(self, requests: Sequence[Request]) -> list[tuple[Server, list[Request]]]:
        """Return each server with its requests; requests for a lost server are left out."""

    @property
    @abstractmethod
    def servers(self) -> Collection[Server]:
        """All servers with blocks, including lost ones."""

    @property
    def only_server(self) -> Server | None:
        """The server, if there is just one; else None."""
        return None

    @abstractmethod
    def redirect(self, request: Request, refused: Refused) -> bool:
        """Follow a redirection; return whether to send the request again."""

    @abstractmethod
    def lose(self, server: Server, reason: str) -> None:
        """Learn that a server cannot be used.

        Raises:
            StoreUnavailableError: no server is left.
        """

    def regain(self, server: Server) -> None:
        """Learn that a server has answered."""
        return

    @abstractmethod
    def close(self) -> None:
        """Close every connection."""


class SingleServer(Topology):
    """One server with all blocks."""

    def __init__(self, settings: RespOptions) -> None:
        """Raises: StoreUnavailableError: the server does not answer, or refuses the login."""
        self._server = Server(settings)
        try:
            self._server.check()
        except ServerLostError as error:
            self._server.close()
            raise StoreUnavailableError(str(error)) from error

    @property
    def servers(self) -> Collection[Server]:
        return [self._server]

    @property
    def only_server(self) -> Server:
        return self._server

    def share_out(self, requests: Sequence[Request]) -> list[tuple[Server, list[Request]]]:
        return [(self._server, list(requests))] if requests else []

    def redirect(self, request: Request, refused: Refused) -> bool:
        """Raise StoreUnavailableError: only a node of a cluster redirects, and `cluster` is not set."""
        raise StoreUnavailableError(f"{self._server.address} is a node of a cluster: set cluster: true")

    def lose(self, server: Server, reason: str) -> None:
        """Raise StoreUnavailableError: the tier goes down, and opens the store anew later."""
        raise StoreUnavailableError(reason)

    def close(self) -> None:
        """Close every connection."""
        self._server.close()


class _Absence:
    """A lost node: when it is tried again, and the pause after that."""

    def __init__(self) -> None:
        self.pause = _FIRST_PAUSE
        self.retry_at = 0.0
        self.postpone()

    def postpone(self) -> None:
        self.retry_at = time.monotonic() + self.pause * random.uniform(0.5, 1.5)
        self.pause = min(2 * self.pause, _LONGEST_PAUSE)


class Cluster(Topology):
    """A cluster, whose primary nodes own the slots. The table of owners is read from any node."""

    def __init__(self, settings: RespOptions) -> None:
        """Raises: StoreUnavailableError: no node answers, or all refuse the login."""
        self._settings = settings
        self._reached_at = settings.nodes_reached_at
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._refreshed_at = 0.0
        self._servers: dict[tuple[str, int], Server] = {}
        self._table: list[Server | None] = [None] * NUM_SLOTS
        self._absent: dict[Server, _Absence] = {}
        try:
            self._read_slots([self._server_at(host, port) for host, port in settings.address.servers])
        except (ServerLostError, ConnectionBrokenError) as error:
            self.close()
            raise StoreUnavailableError(str(error)) from None

    def share_out(self, requests: Sequence[Request]) -> list[tuple[Server, list[Request]]]:
        """Return each node with its requests; requests for lost nodes, or for slots without an owner, are left out."""
        shares: dict[Server, list[Request]] = {}
        if self._absent or None in self._table:
            self._refresh()  # another node may have taken over the slots
        table = self._table
        for request in requests:
            server = request.server or table[key_slot(request.name)]
            if server is not None:
                shares.setdefault(server, []).append(request)
        return [(server, share) for server, share in shares.items() if self._may_try(server)]

    @property
    def servers(self) -> Collection[Server]:
        return {owner for owner in self._table if owner is not None}

    def redirect(self, request: Request, refused: Refused) -> bool:
        """Follow MOVED and ASK to the server that they name; after MOVED, also read the whole table again."""
        slot, _, address = refused.text.partition(" ")
        host, _, port = address.rpartition(":")
        slot_number, port_number = parse_count(slot.encode()), parse_port(port)
        if slot_number is None or slot_number >= NUM_SLOTS or port_number is None:
            return False
        former = self._table[slot_number]
        host = host.strip("[]") or (former.host if former else "")
        if (host, port_number) not in self._servers and len(self._servers) >= _MAX_SERVERS:
            return False
        request.server = self._server_at(host, port_number)
        request.asking = refused.code == "ASK"
        if not request.asking:
            self._table[slot_number] = request.server
            self._refresh()
        return True

    def lose(self, server: Server, reason: str) -> None:
        """Do not use a node for a while; log this once."""
        if not server.was_reached:
            reason += " (if the cluster names its nodes by addresses of its own network, set address_map)"
        with self._lock:
            absence = self._absent.get(server)
            if absence is None:
                self._absent[server] = _Absence()
            else:
                absence.postpone()
            all_lost = set(self.servers) <= self._absent.keys()
        if absence is None:
            logger.warning("resp: lost a node of the cluster: %s; its blocks are misses, other nodes serve", reason)
        if all_lost:
            raise StoreUnavailableError(f"no node of the cluster can be used: {reason}")

    def regain(self, server: Server) -> None:
        """Use a node again; log this if the node was lost."""
        if server in self._absent:
            with self._lock:
                absence = self._absent.pop(server, None)
            if absence is not None:
                logger.warning("resp: node %s of the cluster serves again", server.address)

    def close(self) -> None:
        """Close every connection."""
        for server in self._servers.values():
            server.close()

    def _may_try(self, server: Server) -> bool:
        """Return whether to use a node: it is not lost, or it is time for one thread to try it again."""
        if server not in self._absent:
            return True
        with self._lock:
            absence = self._absent.get(server)
            if absence is None:
                return True
            if time.monotonic() < absence.retry_at:
                return False
            absence.postpone()
            return True

    def _server_at(self, host: str, port: int) -> Server:
        with self._lock:
            server = self._servers.get((host, port))
            if server is None:
                reached = self._reached_at.get((host, port)) or self._reached_at.get((host, 0)) or (host, port)
                server = self._servers[host, port] = Server(self._settings, reached[0], reached[1] or port)
            return server

    def _refresh(self) -> None:
        """Read the table of slots, unless a thread has done so a moment ago."""
        if time.monotonic() - self._refreshed_at < _REFRESH_SECONDS or not self._refreshing.acquire(blocking=False):
            return
        try:
            self._refreshed_at = time.monotonic()
            seeds = [self._server_at(host, port) for host, port in self._settings.address.servers]
            # try lost nodes last, since each may cost the connect timeout
            self._read_slots(sorted({*self.servers, *seeds}, key=lambda server: server in self._absent))
        except (ServerLostError, ConnectionBrokenError) as error:
            logger.debug("resp: slots not read: %s", error)  # the old table stays; MOVED replies correct it
        finally:
            self._refreshing.release()

    def _read_slots(self, servers: Sequence[Server]) -> None:
        """Read the table from the first server that answers.

        Raises:
            ServerLostError, ConnectionBrokenError: no server answers; this is the last one's error.
        """
        deadline = time.monotonic() + self._settings.timeout
        for number, server in enumerate(servers, start=1):
            try:
                ranges = server.exchange(ask_slots, deadline)
            except (ServerLostError, ConnectionBrokenError):
                if number == len(servers):
                    raise
                continue
            self._take_table(server, ranges)
            return

    def _take_table(self, asked: Server, ranges: Sequence[SlotRange]) -> None:
        table: list[Server | None] = [None] * NUM_SLOTS
        for first, last, host, port in ranges:
            if ((host or asked.host), port) in self._servers or len(self._servers) < _MAX_SERVERS:
                owner = self._server_at(host or asked.host, port)
                table[first : last + 1] = [owner] * (last + 1 - first)
        self._table = table
        self._forget_absent(set(filter(None, table)))

    def _forget_absent(self, owners: Iterable[Server]) -> None:
        """Forget lost nodes that own no slots any more."""
        with self._lock:
            for server in self._absent.keys() - set(owners):
                del self._absent[server]


def open_topology(settings: RespOptions) -> Topology:
    """Connect to the server or cluster of the settings.

    Raises:
        StoreUnavailableError: no server answers, or all refuse the login.
    """
    return Cluster(settings) if settings.cluster else SingleServer(settings)
