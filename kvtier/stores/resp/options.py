"""Where the server is, who we are, and how long we wait: checked once, where it is configured."""

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
from kvtier.stores.integrity.secrets import GuardedOptions, read_place

_SCHEMES = {"redis": False, "valkey": False, "rediss": True, "valkeys": True}
_URL = '"redis://HOST:PORT/DATABASE", "rediss://..." for TLS, or "unix:///PATH"'
_DATABASE = re.compile(r"[0-9]{1,9}")
_PREFIX = re.compile(r"[!-z|~]{1,64}")
"""Printable, and without the braces that would put every block into one slot of a cluster."""
_NODE = re.compile(r"(?:\[([0-9A-Fa-f:.%]+)\]|([\w.-]+))(?::(\d{1,5}))?")
_FILES = ("tls_ca_file", "tls_cert_file", "tls_key_file")
MAX_TTL_SECONDS = 10 * 366 * 86400


@dataclass(frozen=True)
class Address:
    """Where the server is, read from its urls.

    Attributes:
        servers: host and port; for a cluster, any of its nodes. Empty if `unix_path` says where.
    """

    servers: tuple[tuple[str, int], ...] = ()
    unix_path: str | None = None
    tls: bool = False
    database: int = 0


_Seconds = msgspec.Meta(gt=0, le=3600)


class RespOptions(GuardedOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of tier type `resp`; they name the place of a password, and never hold one."""

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
            description="where nodes are that a cluster names by addresses of its own network (NAT, Docker):"
            ' `{"10.0.0.5:6379": "db.example:7001"}`, or `{"10.0.0.5": "db.example"}`, which leaves the port as it is'
        ),
    ] = None
    username: Annotated[str | None, msgspec.Meta(description="with a password only")] = None
    password_env: Annotated[
        str | None,
        msgspec.Meta(
            description="name of an environment variable that holds the password. Read anew for each connection, so"
            " that it may change; never logged; no process but this tier's gets it"
        ),
    ] = None
    password_file: Annotated[str | None, msgspec.Meta(description="path of a file that holds the password instead")] = (
        None
    )
    tls_ca_file: Annotated[
        str | None,
        msgspec.Meta(description="who signed the server's certificate (PEM), if the system's authorities did not"),
    ] = None
    tls_cert_file: Annotated[
        str | None, msgspec.Meta(description="our own certificate (PEM), if the server asks for one")
    ] = None
    tls_key_file: Annotated[str | None, msgspec.Meta(description="the key of our own certificate (PEM)")] = None
    tls_verify: Annotated[
        bool, msgspec.Meta(description="whether the server must prove who it is; false is for tests")
    ] = True
    prefix: Annotated[
        str, msgspec.Meta(description="how key names begin: 1 to 64 printable characters, no space and no brace")
    ] = "kvtier"
    ttl: Annotated[
        Annotated[float, msgspec.Meta(ge=1, le=MAX_TTL_SECONDS)] | None,
        msgspec.Meta(
            description="seconds that the server keeps a block after it was last written; without it, the server"
            " decides"
        ),
    ] = None
    connections: Annotated[
        int, msgspec.Meta(ge=1, le=64, description="connections to each server, used at the same time")
    ] = 4
    connect_timeout: Annotated[float, _Seconds, msgspec.Meta(description="seconds to connect")] = 1.0
    timeout: Annotated[
        float,
        _Seconds,
        msgspec.Meta(
            description="seconds for one batch: some 2 MiB of blocks, or one block, however slowly it arrives"
        ),
    ] = 5.0

    @property
    def threads(self) -> int:
        """Calls into the store at the same time, each over a connection of its own."""
        return self.connections

    @property
    def address(self) -> Address:
        """What the urls say.

        Raises:
            ConfigError: they are none, or do not go together; the error never shows a password.
        """
        urls = [self.url] if isinstance(self.url, str) else self.url
        parts = [_parse(text) for text in urls]
        if not parts:
            raise ConfigError("url", self.url, f"at least one of {_URL}")
        first = parts[0]
        if any((part.scheme, part.path) != (first.scheme, first.path) for part in parts):
            raise ConfigError("url", urls, "the same scheme and database in each")
        if first.scheme == "unix":
            return Address(unix_path=unquote(first.path))
        return Address(
            servers=tuple((part.hostname or "localhost", part.port or 6379) for part in parts),
            tls=_SCHEMES[first.scheme],
            database=_database(first, urls[0]),
        )

    @property
    def nodes_reached_at(self) -> dict[tuple[str, int], tuple[str, int]]:
        """What the address map says: host and port by host and port; port 0 is any, or the same.

        Raises:
            ConfigError: an entry is no address, or names a port on one side only.
        """
        nodes = [(_parse_node(named), _parse_node(reached)) for named, reached in (self.address_map or {}).items()]
        known = {named: reached for named, reached in nodes if named and reached and bool(named[1]) == bool(reached[1])}
        if len(known) < len(nodes):
            raise self._map_error('addresses by addresses, "HOST:PORT" both or "HOST" both')
        return known

    def check(self, block_bytes: int, policies: Mapping[str, type[Any]]) -> None:
        """Refuse options that contradict each other, or what the environment shows."""
        if find_spec("redis") is None:
            raise ConfigError("type", "resp", "needs redis-py: pip install 'kvtier[redis]'")
        self._check_topology(self.address)
        self._check_values()
        self.read_password()
        super().check(block_bytes, policies)

    def read_password(self) -> str | None:
        """Return the password as it is now, None if none is configured.

        Raises:
            ConfigError: its place is empty or cannot be read; the error names the key and the place.
        """
        if self.password_env is not None:
            password = os.environ.get(self.password_env, "")
            if not password or not is_utf8(password):
                allowed = "the name of an environment variable that is set, to a text in UTF-8"
                raise ConfigError("password_env", self.password_env, allowed)
            return password
        if self.password_file is None:
            return None
        content, why = read_place(self.password_file)
        password = content.decode("utf-8", "surrogateescape")
        if not why and not (password and is_utf8(password)):
            why = "it is no UTF-8" if password else "it is empty"
        if why:
            raise ConfigError("password_file", self.password_file, f"a readable file that holds a password; {why}")
        return password

    def without_password(self, text: str) -> str:
        """Return a server's words; one that does not know a command repeats it, the password of AUTH included."""
        for place in (self.password_env, self.password_file):
            if place is not None:
                with contextlib.suppress(ConfigError):
                    text = text.replace(self.read_password() or HIDDEN, HIDDEN)
        return text

    def credentials(self) -> tuple[str, ...]:
        """Return (password,) or (username, password) for a new connection.

        Raises:
            StoreUnavailableError: the password cannot be read now.
        """
        try:
            password = self.read_password() or ""
        except ConfigError as error:
            raise StoreUnavailableError(str(error)) from None
        return (password,) if self.username is None else (self.username, password)

    def _check_topology(self, address: Address) -> None:
        if self.cluster and address.unix_path is not None:
            raise ConfigError("cluster", True, "a cluster is reached over TCP")
        if self.cluster and address.database:
            raise ConfigError("url", self.url, "no database: a cluster has one only")
        if len(address.servers) > 1 and not self.cluster:
            raise ConfigError("url", self.url, "one server; several need cluster: true")
        if self.nodes_reached_at and not self.cluster:
            raise self._map_error("cluster: true to go with it")
        if not address.tls:
            for key in _FILES:
                if getattr(self, key) is not None:
                    raise ConfigError(key, getattr(self, key), "a url with rediss:// to go with it")

    def _map_error(self, allowed: str) -> ConfigError:
        return ConfigError("address_map", f"{len(self.address_map or {})} addresses", allowed)

    def _check_values(self) -> None:
        if self.password_env is not None and self.password_file is not None:
            raise ConfigError("password_file", self.password_file, "either this or password_env")
        if self.username is not None and self.password_env is None and self.password_file is None:
            raise ConfigError("username", self.username, "password_env or password_file to go with it")
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
        raise ConfigError("url", url, "no user and no password here: username, password_env, password_file")
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
        raise ConfigError("url", url, "a number after the last slash, the database")
    return int(text or 0)
