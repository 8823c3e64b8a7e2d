"""Hides secrets in options that are shown.

A value is hidden if its option's name suggests a secret. This includes options for the *place* of a secret, since users
put the secret itself there. Of an address only scheme, host and port are shown: passwords may be before the host, in
the path, the query and the fragment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import SplitResult, urlsplit

from kvtier.foreign_text import shown

HIDDEN = "***"
MAX_DEPTH = 16
"""Of lists and mappings in an option's value: none has more than three levels."""
_SECRET_PARTS = ("secret", "passw", "passphrase", "credential", "apikey", "connection_string")
_SECRET_WORDS = frozenset({"token", "key", "pwd", "pw", "pass", "auth", "authorization", "sas", "dsn", "signature"})
_ADDRESS_WORDS = frozenset({"url", "urls", "uri", "endpoint"})
_ADDRESS = re.compile(r"://(\S*)")
_PASSWORD = re.compile(r"://[^/?#\s]*:[^/?#\s]*@")
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.%]+\]|[\w.-]+)(?::\d{0,5})?")
_HOST_AND_PORT = re.compile(r"(?:\[[0-9A-Fa-f:.%]+\]|[\w.-]+):\d{1,5}")


def shown_option(name: str, value: object, depth: int = 0) -> object:
    """Return the value of the option `name` without secrets, also in lists and mappings, down to `MAX_DEPTH`."""
    if depth > MAX_DEPTH:
        return ...
    if isinstance(value, Mapping):
        return {
            key: shown_option(key if isinstance(key, str) else shown(key), item, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        items = [shown_option(name, item, depth + 1) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool):
        return value
    if is_secret(name):
        return HIDDEN
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{len(value)} bytes"
    if not isinstance(value, str):
        return value
    if not _words(name).isdisjoint(_ADDRESS_WORDS) and "://" not in value:
        return value if _HOST_AND_PORT.fullmatch(value) else HIDDEN
    return _ADDRESS.sub(_shown_address, value)


def _text_of(key: object) -> str:
    return key if isinstance(key, str) else shown(key)


def split_address(address: str) -> SplitResult | None:
    """Return the parts of an address; None if it is malformed: Python's error would quote it, with a password."""
    try:
        parts = urlsplit(address)
        _ = parts.port  # `urlsplit` checks the port only here
    except ValueError:
        return None
    return parts


def is_secret(name: str) -> bool:
    """Return whether an option's name suggests a secret, or the place of one."""
    return any(part in name.lower() for part in _SECRET_PARTS) or not _words(name).isdisjoint(_SECRET_WORDS)


def is_secret_variable(name: str, value: str) -> bool:
    """Return whether an environment variable is named like a secret, or is an address with a password.

    Addresses of proxies do not count, since many client libraries need them.
    """
    return is_secret(name) or (_PASSWORD.search(value) is not None and not name.lower().endswith("_proxy"))


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower()))


def _shown_address(found: re.Match[str]) -> str:
    host = re.split("[/?#]", found[1], maxsplit=1)[0]
    more = found[1][len(host) :]
    if "@" in found[1] or not _HOST.fullmatch(host):
        return f"://{HIDDEN}"
    return f"://{host}/{HIDDEN}" if more.strip("/") else f"://{host}{more}"
