"""Options of tier type `resp`: address, credentials, TLS and timeouts."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any
from urllib.parse import SplitResult, unquote

import msgspec

from kvtier.errors import ConfigError, StoreUnavailableError
from kvtier.foreign_text import is_utf8
from kvtier.redaction import HIDDEN, split_address
from kvtier.stores.compression.options import CompressedOptions, Compression
from kvtier.stores.integrity.secrets import read_place

_SCHEMES = {"redis": False, "valkey": False, "rediss": True, "valkeys": True}
_URL = '"redis://HOST:PORT/DATABASE", "rediss://..." for TLS, or "unix:///PATH"'
_DATABASE = re.compile(r"[0-9]{1,9}")
_PREFIX = re.compile(r"[!-z|~]{1,64}")
"""Printable characters without braces: in a cluster, a name in braces alone decides the slot of a key."""
_NODE = re.compile(r"(?:\[([0-9A-Fa-f:.%]+)\]|([\w.-]+))(?::(\d{1,5}))?")
_FILES = ("tls_ca_file", "tls_cert_file", "tls_key_file")
_PAIRED_CONNECTIONS = 4
"""With fewer connections each has a thread, so that no load waits for a store."""
MAX_TTL_SECONDS = 10 * 366 * 86400


@dataclass(frozen=True)
class Address:
    """The address of the server, parsed from the urls.

    Attributes:
        servers: host and port; for a cluster, of any of its nodes. Empty if `unix_path` is set.
    """

    servers: tuple[tuple[str, int], ...] = ()
    unix_path: str | None = None
    tls: bool = False
    database: int = 0


_Seconds = msgspec.Meta(gt=0, le=3600)


class RespOptions(CompressedOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of tier type `resp`. They contain the place of a password, but no password."""

    url: Annotated[
        str | list[str],
        msgspec.Meta(
            description="`redis://HOST:PORT/DATABASE`, `rediss://...` for TLS, `unix:///PATH`; `valkey://` and"
            " `valkeys://` mean the same. For a cluster one node, or a list of several: any that answers tells of"
            " the others. No user and no password in it: they would end up in logs"
        ),
    ]
    cluster: Annotated[
        bool, msgspec.Meta(description="the url names nodes of a cluster; slots and failovers are followed")
    ] = False
    address_map: Annotated[
        dict[str, str] | None,
        msgspec.Meta(
            description="addresses of nodes that a cluster names by addresses of its own network (NAT, Docker):"
            ' `{"10.0.0.5:6379": "db.example:7001"}`, or `{"10.0.0.5": "db.example"}`, which leaves the port as it is'
        ),
    ] = None
    username: Annotated[str | None, msgspec.Meta(description="with a password only")] = None
    password_env: Annotated[
        str | None,
        msgspec.Meta(
            description="name of an environment variable with the password. It is read again for each connection, so"
            " that it may change. It is never logged, and only this tier's I/O process gets it"
        ),
    ] = None
    password_file: Annotated[str | None, msgspec.Meta(description="path of a file with the password instead")] = None
    tls_ca_file: Annotated[
        str | None,
        msgspec.Meta(
            description="file with the authority that signed the server's certificate (PEM), if the system does not"
            " trust it"
        ),
    ] = None
    tls_cert_file: Annotated[
        str | None, msgspec.Meta(description="file with the client's certificate (PEM), if the server asks for one")
    ] = None
    tls_key_file: Annotated[str | None, msgspec.Meta(description="file with the key of that certificate (PEM)")] = None
    tls_verify: Annotated[
        bool, msgspec.Meta(description="whether to verify the server's certificate; set false only in tests")
    ] = True
    prefix: Annotated[
        str, msgspec.Meta(description="prefix of all key names: 1 to 64 printable characters, no space and no brace")
    ] = "kvtier"
    ttl: Annotated[
        Annotated[float, msgspec.Meta(ge=1, le=MAX_TTL_SECONDS)] | None,
        msgspec.Meta(
            description="seconds that the server keeps a block after its last write. Without it, the server's eviction"
            " policy decides"
        ),
    ] = None
    connections: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            le=64,
            description="most parallel connections to each server. A thread uses up to two; with fewer than four,"
            " with TLS, a secret, `compress` or a cluster, one",
        ),
    ] = 8
    connect_timeout: Annotated[float, _Seconds, msgspec.Meta(description="seconds to connect")] = 1.0
    timeout: Annotated[
        float,
        _Seconds,
        msgspec.Meta(
            description="seconds for one call, at most 4 MiB of blocks or one block, also if bytes arrive slowly"
        ),
    ] = 5.0

    @property
    def connections_per_call(self) -> int:
        """Connections that one call of the store uses at once.

        While the server is busy with what came on one, a call sends or receives on the other, so that half as many
        threads keep the server as busy: they wait less for the interpreter, and take less processor time. Where each
        byte takes more processor time (TLS, a secret, compression), or a call goes to several servers, each connection
        has a thread of its own.
        """
        guarded = self.secret_env is not None or self.secret_file is not None
        needs_threads = self.address.tls or self.cluster or guarded or self.compress is not Compression.OFF
        return 1 if needs_threads or self.connections < _PAIRED_CONNECTIONS else 2

    @property
    def threads(self) -> int:
        """Parallel calls of the store, each with its own connections."""
        return self.connections // self.connections_per_call

    @property
    def address(self) -> Address:
        """The address in the urls.

        Raises:
            ConfigError: a url is not valid, or the urls do not fit together; the error shows no password.
        """
        urls = [self.url] if isinstance(self.url, str) else self.url
        parts = [_parse(text) for text in urls]
        if not parts:
            raise ConfigError("url", self.url, f"at least one of {_URL}")
        first = parts[0]
        if any((part.scheme, part.path) != (first.scheme, first.path) for part in parts):
            raise ConfigError("url", urls, "urls with the same scheme and database")
        if first.scheme == "unix":
            return Address(unix_path=unquote(first.path))
        return Address(
            servers=tuple((part.hostname or "localhost", part.port or 6379) for part in parts),
            tls=_SCHEMES[first.scheme],
            database=_database(first, urls[0]),
        )

    @property
    def nodes_reached_at(self) -> dict[tuple[str, int], tuple[str, int]]:
        """The address map: host and port by host and port. Port 0 stands for any port, or for the same one.

        Raises:
            ConfigError: an entry is not an address, or only one of its sides has a port.
        """
        nodes = [(_parse_node(named), _parse_node(reached)) for named, reached in (self.address_map or {}).items()]
        known = {named: reached for named, reached in nodes if named and reached and bool(named[1]) == bool(reached[1])}
        if len(known) < len(nodes):
            raise self._map_error('addresses by addresses, "HOST:PORT" both or "HOST" both')
        return known

    def check(self, block_bytes: int, policies: Mapping[str, type[Any]]) -> None:
        """Refuse options that contradict each other or the environment."""
        if find_spec("redis") is None:
            raise ConfigError("type", "resp", "needs redis-py: pip install 'kvtier[redis]'")
        self._check_topology(self.address)
        self._check_values()
        self.read_password()
        super().check(block_bytes, policies)

    def read_password(self) -> str | None:
        """Return the present password; None if none is configured.

        Raises:
            ConfigError: its place is empty or cannot be read; the error names the key and the place.
        """
        if self.password_env is not None:
            password = os.environ.get(self.password_env, "")
            if not password or not is_utf8(password):
                allowed = "the name of an environment variable that is set to text in UTF-8"
                raise ConfigError("password_env", self.password_env, allowed)
            return password
        if self.password_file is None:
            return None
        content, why = read_place(self.password_file)
        password = content.decode("utf-8", "surrogateescape")
        if not why and not (password and is_utf8(password)):
            why = "it is not UTF-8" if password else "it is empty"
        if why:
            raise ConfigError("password_file", self.password_file, f"a readable file with a password; {why}")
        return password

    def without_password(self, text: str) -> str:
        """Hide the password in a server's message: a server that does not know AUTH repeats the whole command."""
        for place in (self.password_env, self.password_file):
            if place is not None:
                with contextlib.suppress(ConfigError):
                    text = text.replace(self.read_password() or HIDDEN, HIDDEN)
        return text

    def credentials(self) -> tuple[str, ...]:
        """Return (password,) or (username, password) for a new connection.

        Raises:
            StoreUnavailableError: the password cannot be read.
        """
        try:
            password = self.read_password() or ""
        except ConfigError as error:
            raise StoreUnavailableError(str(error)) from None
        return (password,) if self.username is None else (self.username, password)

    def _check_topology(self, address: Address) -> None:
        if self.cluster and address.unix_path is not None:
            raise ConfigError("cluster", True, "only with addresses of hosts, not with a Unix socket")
        if self.cluster and address.database:
            raise ConfigError("url", self.url, "a url without a database: a cluster has only database 0")
        if len(address.servers) > 1 and not self.cluster:
            raise ConfigError("url", self.url, "one server; several need cluster: true")
        if self.nodes_reached_at and not self.cluster:
            raise self._map_error("only with cluster: true")
        if not address.tls:
            for key in _FILES:
                if getattr(self, key) is not None:
                    raise ConfigError(key, getattr(self, key), "only with a rediss:// url")

    def _map_error(self, allowed: str) -> ConfigError:
        return ConfigError("address_map", f"{len(self.address_map or {})} addresses", allowed)

    def _check_values(self) -> None:
        if self.password_env is not None and self.password_file is not None:
            raise ConfigError("password_file", self.password_file, "not together with password_env")
        if self.username is not None and self.password_env is None and self.password_file is None:
            raise ConfigError("username", self.username, "only with password_env or password_file")
        if not _PREFIX.fullmatch(self.prefix):
            raise ConfigError("prefix", self.prefix, "1 to 64 printable characters, no space and no brace")
        for key in _FILES:
            path = getattr(self, key)
            if path is not None and not os.access(path, os.R_OK):
                raise ConfigError(key, path, "a readable file")


def _parse(url: str) -> SplitResult:
    parts = split_address(url)
    if parts is None or parts.scheme not in (*_SCHEMES, "unix") or parts.query or parts.fragment:
        raise ConfigError("url", url, f"{_URL} expected")
    if "@" in parts.netloc:
        raise ConfigError("url", url, "a url without user and password: set username and password_env or password_file")
    if parts.scheme == "unix" and (parts.netloc or not parts.path.strip("/")):
        raise ConfigError("url", url, '"unix:///PATH" expected')
    return parts


def _parse_node(text: str) -> tuple[str, int] | None:
    found = _NODE.fullmatch(text)
    if found is None or int(found[3] or 1) not in range(1, 65536):
        return None
    return found[1] or found[2], int(found[3] or 0)


def _database(parts: SplitResult, url: str) -> int:
    text = parts.path.strip("/")
    if text and not _DATABASE.fullmatch(text):
        raise ConfigError("url", url, "a database number after the last slash")
    return int(text or 0)
