"""Where the server is, who we are, and how long we wait: checked once, where it is configured."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self
from urllib.parse import SplitResult, unquote

from kvtier.errors import ConfigError, StoreUnavailableError
from kvtier.foreign_text import is_utf8
from kvtier.redaction import HIDDEN, split_address
from kvtier.stores.integrity.secrets import read_place

_SCHEMES = {"redis": False, "valkey": False, "rediss": True, "valkeys": True}
_URL = '"redis://HOST:PORT/DATABASE", "rediss://..." for TLS, or "unix:///PATH"'
_DATABASE = re.compile(r"[0-9]{1,9}")
_PREFIX = re.compile(r"[!-z|~]{1,64}")
"""Printable, and without the braces that would put every block into one slot of a cluster."""


@dataclass(frozen=True)
class RespSettings:
    """How to reach the server; holds the name of a password's place, never the password.

    Attributes:
        servers: host and port; for a cluster, any of its nodes. Empty if `unix_path` says where.
        ttl: seconds that a block is kept after it was written; None leaves it to the server.
        connect_timeout: seconds to connect.
        timeout: seconds that one batch may take: a block, or some 2 MiB of them.
    """

    servers: tuple[tuple[str, int], ...] = ()
    unix_path: str | None = None
    tls: bool = False
    database: int = 0
    cluster: bool = False
    username: str | None = None
    password_env: str | None = None
    password_file: str | None = None
    tls_ca_file: str | None = None
    tls_cert_file: str | None = None
    tls_key_file: str | None = None
    tls_verify: bool = True
    prefix: str = "kvtier"
    ttl: float | None = None
    connect_timeout: float = 1.0
    timeout: float = 5.0

    @classmethod
    def checked(cls, url: str | Sequence[str], **options: Any) -> Self:
        """Return settings from what a user configured; `options` are this class's other attributes.

        Raises:
            ConfigError: a value is not allowed; the error names its key and never shows a password.
        """
        urls = [url] if isinstance(url, str) else list(url)
        parts = [_parse(text) for text in urls]
        if not parts:
            raise ConfigError("url", url, f"at least one of {_URL}")
        first = parts[0]
        if any((part.scheme, part.path) != (first.scheme, first.path) for part in parts):
            raise ConfigError("url", urls, "the same scheme and database in each")
        is_unix = first.scheme == "unix"
        settings = cls(
            servers=() if is_unix else tuple((part.hostname or "localhost", part.port or 6379) for part in parts),
            unix_path=unquote(first.path) if is_unix else None,
            tls=_SCHEMES.get(first.scheme, False),
            database=0 if is_unix else _database(first, urls[0]),
            **options,
        )
        settings._check_topology(urls)
        settings._check_values()
        settings.read_password()
        return settings

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Return what `to_options` was given."""
        return cls(**{**options, "servers": tuple((host, port) for host, port in options.get("servers", ()))})

    def to_options(self) -> dict[str, Any]:
        """Return JSON values that `from_options` understands."""
        return asdict(self)

    @property
    def where(self) -> str:
        """The server's address, for a person."""
        return self.unix_path or ", ".join(f"{host}:{port}" for host, port in self.servers)

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

    def _check_topology(self, urls: Sequence[str]) -> None:
        if self.cluster and self.unix_path is not None:
            raise ConfigError("cluster", True, "a cluster is reached over TCP")
        if self.cluster and self.database:
            raise ConfigError("url", urls[0], "no database: a cluster has one only")
        if len(urls) > 1 and not self.cluster:
            raise ConfigError("url", urls, "one server; several need cluster: true")
        if not self.tls:
            for key in ("tls_ca_file", "tls_cert_file", "tls_key_file"):
                if getattr(self, key) is not None:
                    raise ConfigError(key, getattr(self, key), "a url with rediss:// to go with it")

    def _check_values(self) -> None:
        if self.password_env is not None and self.password_file is not None:
            raise ConfigError("password_file", self.password_file, "either this or password_env")
        if self.username is not None and self.password_env is None and self.password_file is None:
            raise ConfigError("username", self.username, "password_env or password_file to go with it")
        if not _PREFIX.fullmatch(self.prefix):
            raise ConfigError("prefix", self.prefix, "1 to 64 printable characters, no space and no brace")
        if self.ttl is not None and not 1 <= self.ttl <= 10 * 366 * 86400:
            raise ConfigError("ttl", self.ttl, "seconds, at least 1")
        for key in ("connect_timeout", "timeout"):
            value = getattr(self, key)
            if not (math.isfinite(value) and 0 < value <= 3600):
                raise ConfigError(key, value, "seconds, above 0 and up to 3600")
        for key in ("tls_ca_file", "tls_cert_file", "tls_key_file"):
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


def _database(parts: SplitResult, url: str) -> int:
    text = parts.path.strip("/")
    if text and not _DATABASE.fullmatch(text):
        raise ConfigError("url", url, "a number after the last slash, the database")
    return int(text or 0)
