"""Where the bucket is and how long we wait: checked once, where it is configured. Credentials are left to the SDKs."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, Self

from kvtier.errors import ConfigError
from kvtier.redaction import split_address
from kvtier.sizes import parse_size
from kvtier.stores.object.names import LAYOUT, MOST_PREFIX_BYTES

_SCHEMES = {"s3": "s3", "gs": "gs", "az": "az"}
_URL = '"s3://BUCKET/PREFIX", "gs://BUCKET/PREFIX" or "az://CONTAINER/PREFIX"'
_PREFIX = re.compile(r"[A-Za-z0-9._=-]+(/[A-Za-z0-9._=-]+)*")
MOST_PACK_BYTES = 4 << 20
LEAST_PACKS = 32
"""Packs that the capacity must hold, so that a share of the free room is at least one."""


@dataclass(frozen=True)
class ObjectSettings:
    """How to reach the bucket; holds no credential.

    Attributes:
        provider: "s3", "gs" or "az".
        bucket, prefix: where packs are.
        capacity: most bytes of all packs under the prefix.
        pack_bytes: most bytes of blocks in a pack, if it holds several.
        ttl: seconds after which any instance deletes a pack; None for never.
        refresh: seconds between two looks at what others wrote.
        timeout, connect_timeout: seconds, of a request.
        requests: at the same time within one call.
    """

    provider: str
    bucket: str
    capacity: int
    prefix: str = "kvtier"
    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    path_style: bool | None = None
    allow_http: bool = False
    tls_ca_file: str | None = None
    pack_bytes: int = MOST_PACK_BYTES
    ttl: float | None = None
    refresh: float = 2.0
    timeout: float = 10.0
    connect_timeout: float = 2.0
    requests: int = 8

    @classmethod
    def checked(cls, url: str, *, capacity: int | str, pack_size: int | str = MOST_PACK_BYTES, **options: Any) -> Self:
        """Return settings from what a user configured; `options` are this class's other attributes.

        Raises:
            ConfigError: a value is not allowed; the error names its key and shows no credential.
        """
        provider, bucket, prefix = _parse(url)
        pack_bytes = parse_size("pack_size", pack_size, 4096)
        if pack_bytes > MOST_PACK_BYTES:
            raise ConfigError("pack_size", pack_size, "at most 4 MiB, what one call into a store moves")
        size = parse_size("capacity", capacity)
        settings = cls(provider, bucket, size, prefix, pack_bytes=pack_bytes, **options)
        settings._check_place()
        settings._check_values()
        return settings

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Return what `to_options` was given."""
        return cls(**options)

    def to_options(self) -> dict[str, Any]:
        """Return JSON values that `from_options` understands."""
        return asdict(self)

    @property
    def root(self) -> str:
        """What the names of all objects begin with."""
        return f"{self.prefix}/{LAYOUT}"

    @property
    def where(self) -> str:
        """The place, for a person."""
        at = f" at {self.endpoint}" if self.endpoint else ""
        return f"{self.provider}://{self.bucket}/{self.prefix}{at}"

    def _check_place(self) -> None:
        if self.endpoint is not None:
            parts = split_address(self.endpoint)
            if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or self.provider == "gs":
                raise ConfigError("endpoint", self.endpoint, '"https://HOST:PORT", for s3:// and az://')
            if "@" in self.endpoint or parts.query or parts.fragment:
                allowed = "no credentials here: the environment or a profile has them"
                raise ConfigError("endpoint", self.endpoint, allowed)
            if parts.scheme == "http" and not self.allow_http:
                raise ConfigError("endpoint", self.endpoint, "https, or allow_http: true to go with it")
        for key in ("region", "profile", "path_style"):
            if getattr(self, key) is not None and self.provider != "s3":
                raise ConfigError(key, getattr(self, key), "for s3:// only")
        if self.profile is not None and find_spec("boto3") is None:
            raise ConfigError("profile", self.profile, "needs boto3: pip install boto3")
        if self.tls_ca_file is not None and not os.access(self.tls_ca_file, os.R_OK):
            raise ConfigError("tls_ca_file", self.tls_ca_file, "a readable file")

    def _check_values(self) -> None:
        for key, least, most in (("timeout", 0.1, 600), ("connect_timeout", 0.1, 600), ("refresh", 0.1, 3600)):
            value = getattr(self, key)
            if not (math.isfinite(value) and least <= value <= most):
                raise ConfigError(key, value, f"seconds, {least} to {most}")
        if self.ttl is not None and not 60 <= self.ttl <= 10 * 366 * 86400:
            raise ConfigError("ttl", self.ttl, "seconds, at least 60")
        if not 1 <= self.requests <= 64:
            raise ConfigError("requests", self.requests, "an int, 1 to 64")


def _parse(url: str) -> tuple[str, str, str]:
    parts = split_address(url)
    if parts is None:
        raise ConfigError("url", url, f"{_URL} expected")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError("url", url, "no credentials here: the environment or a profile has them")
    if parts.scheme not in _SCHEMES or not parts.netloc:
        raise ConfigError("url", url, f"{_URL} expected")
    prefix = parts.path.strip("/") or "kvtier"
    if len(prefix) > MOST_PREFIX_BYTES or not _PREFIX.fullmatch(prefix):
        allowed = f"a prefix of up to {MOST_PREFIX_BYTES} letters, digits, dots, dashes, underscores and slashes"
        raise ConfigError("url", url, allowed)
    return _SCHEMES[parts.scheme], parts.netloc, prefix
