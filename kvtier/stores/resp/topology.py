"""Which server has which block: one that has all of them, or a cluster that shares them out by slots."""

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
"""Seconds before a lost node is tried again, doubled every time, and half as much more or less."""
_MAX_SERVERS = 1024
"""Named by a cluster, all together: Valkey's own bound is some 1,000 nodes."""
_REFRESH_SECONDS = 0.5
"""Between two looks at who has which slot."""


class Topology(ABC):
    """Servers, and the way to them. Threads share it."""

    @abstractmethod
    def share_out(self, requests: Sequence[Request]) -> list[tuple[Server, list[Request]]]:
        """Return each server with its requests; those of a server that is lost are left out."""

    @property
    @abstractmethod
    def servers(self) -> Collection[Server]:
        """Those that share the blocks, lost ones included."""

    @property
    def only_server(self) -> Server | None:
        """The server that has everything, if one has."""
        return None

    @abstractmethod
    def redirect(self, request: Request, refused: Refused) -> bool:
        """Note where the server sent us instead; return whether asking again can help."""

    @abstractmethod
    def lose(self, server: Server, reason: str) -> None:
        """Note that a server cannot be used.

        Raises:
            StoreUnavailableError: none is left.
        """

    def regain(self, server: Server) -> None:
        """Note that a server answered."""
        return

    @abstractmethod
    def close(self) -> None:
        """Close every connection."""


class SingleServer(Topology):
    """One server has everything."""

    def __init__(self, settings: RespOptions) -> None:
        """Raises: StoreUnavailableError: it does not answer, or does not let us in."""
        self._server = Server(settings)
        try:
            self._server.check()
        except ServerLostError as error:
            self._server.close()
            raise StoreUnavailableError(str(error)) from error

    @property
    def servers(self) -> Collection[Server]:
        """The one."""
        return [self._server]

    @property
    def only_server(self) -> Server:
        """The one."""
        return self._server

    def share_out(self, requests: Sequence[Request]) -> list[tuple[Server, list[Request]]]:
        """Return the server with all requests."""
        return [(self._server, list(requests))] if requests else []

    def redirect(self, request: Request, refused: Refused) -> bool:
        """Return False: a single server that names another one is part of a cluster, and not configured so.

        Raises:
            StoreUnavailableError: that.
        """
        raise StoreUnavailableError(f"{self._server.address} is a node of a cluster: set cluster: true")

    def lose(self, server: Server, reason: str) -> None:
        """Give up: the tier tries again."""
        raise StoreUnavailableError(reason)

    def close(self) -> None:
        """Close every connection."""
        self._server.close()


class _Absence:
    """A node that was lost: when it is tried again, and how patiently."""

    def __init__(self) -> None:
        self.pause = _FIRST_PAUSE
        self.retry_at = 0.0
        self.postpone()

    def postpone(self) -> None:
        self.retry_at = time.monotonic() + self.pause * random.uniform(0.5, 1.5)
        self.pause = min(2 * self.pause, _LONGEST_PAUSE)


class Cluster(Topology):
    """Primaries share the slots; any of them says which has which, and we keep its answer in a table."""

    def __init__(self, settings: RespOptions) -> None:
        """Raises: StoreUnavailableError: no node answers, or none lets us in."""
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
        """Return each node with its requests; those of lost nodes, and of slots that nobody has, are left out."""
        shares: dict[Server, list[Request]] = {}
        if self._absent or None in self._table:
            self._refresh()  # somebody may have taken over
        table = self._table
        for request in requests:
            server = request.server or table[key_slot(request.name)]
            if server is not None:
                shares.setdefault(server, []).append(request)
        return [(server, share) for server, share in shares.items() if self._may_try(server)]

    @property
    def servers(self) -> Collection[Server]:
        """The owners of slots."""
        return {owner for owner in self._table if owner is not None}

    def redirect(self, request: Request, refused: Refused) -> bool:
        """Follow MOVED and ASK to where they point; after MOVED, the whole table is read anew."""
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
        """Leave a node alone for a while; a line says so, once."""
        if not server.was_reached:
            reason += " (the option address_map says where nodes are that the cluster names by other addresses)"
        with self._lock:
            absence = self._absent.get(server)
            if absence is None:
                self._absent[server] = _Absence()
            else:
                absence.postpone()
            all_lost = set(self.servers) <= self._absent.keys()
        if absence is None:
            logger.warning("resp: lost a node of the cluster: %s; its blocks are misses, the others serve", reason)
        if all_lost:
            raise StoreUnavailableError(f"no node of the cluster can be used: {reason}")

    def regain(self, server: Server) -> None:
        """Use a node as before; a line says so, if it was lost."""
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
        """Return whether a node is there, or it is time for one thread to see whether it is there again."""
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
        """Ask the cluster who has which slot, unless somebody did a moment ago."""
        if time.monotonic() - self._refreshed_at < _REFRESH_SECONDS or not self._refreshing.acquire(blocking=False):
            return
        try:
            self._refreshed_at = time.monotonic()
            seeds = [self._server_at(host, port) for host, port in self._settings.address.servers]
            # lost ones last: each costs the time to connect
            self._read_slots(sorted({*self.servers, *seeds}, key=lambda server: server in self._absent))
        except (ServerLostError, ConnectionBrokenError) as error:
            logger.debug("resp: slots not read: %s", error)  # the table of before serves on; MOVED mends it
        finally:
            self._refreshing.release()

    def _read_slots(self, servers: Sequence[Server]) -> None:
        """Take the table of the first server that has one.

        Raises:
            ServerLostError, ConnectionBrokenError: none has, the last one's reason.
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
        """A node that has no slots any more is not missed."""
        with self._lock:
            for server in self._absent.keys() - set(owners):
                del self._absent[server]


def open_topology(settings: RespOptions) -> Topology:
    """Connect, as the settings say.

    Raises:
        StoreUnavailableError: nobody answers, or nobody lets us in.
    """
    return Cluster(settings) if settings.cluster else SingleServer(settings)
