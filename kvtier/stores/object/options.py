"""Options of tier type `object`. Credentials are not among them: the provider's SDK finds them in the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Annotated, Any, NamedTuple

import msgspec

from kvtier.errors import ConfigError
from kvtier.options import JobDeadline, Threads, size_of
from kvtier.redaction import split_address
from kvtier.stores.compression.options import CompressedOptions
from kvtier.stores.integrity.header import HEADER_BYTES
from kvtier.stores.object.names import LAYOUT, MAX_BLOCKS, MAX_PREFIX_BYTES

_SCHEMES = ("s3", "gs", "az")
_SECRETS_OF_CLIENTS = {"s3": ("AWS_",), "gs": ("GOOGLE_",), "az": ("AZURE_",)}
_URL = '"s3://BUCKET/PREFIX", "gs://BUCKET/PREFIX" or "az://CONTAINER/PREFIX"'
_PREFIX = re.compile(r"[A-Za-z0-9._=-]+(/[A-Za-z0-9._=-]+)*")
MAX_PACK_BYTES = 4 << 20
MAX_TTL_SECONDS = 10 * 366 * 86400
MIN_PACKS = 32
"""Packs that the capacity must hold at least, so that a writer's share of the free room is at least one pack."""


class Place(NamedTuple):
    """The place of the packs: provider ("s3", "gs" or "az"), bucket, and prefix of the names."""

    provider: str
    bucket: str
    prefix: str


_Deadline = msgspec.Meta(ge=0.1, le=600)


class ObjectOptions(CompressedOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of tier type `object`. They contain no credentials."""

    url: Annotated[
        str,
        msgspec.Meta(
            description="`s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX` or `az://CONTAINER/PREFIX`. The default prefix is"
            " `kvtier`"
        ),
    ]
    capacity: Annotated[
        int, size_of("most bytes of all packs under the prefix, of all engines. Set the same value for all engines")
    ]
    endpoint: Annotated[
        str | None,
        msgspec.Meta(description="`https://HOST:PORT` of a server that is compatible with S3, or of Azurite"),
    ] = None
    region: Annotated[
        str | None, msgspec.Meta(description="region of the S3 bucket, if the environment does not name it")
    ] = None
    profile: Annotated[
        str | None, msgspec.Meta(description="profile of the AWS configuration with the credentials; needs boto3")
    ] = None
    path_style: Annotated[
        bool | None,
        msgspec.Meta(
            description="for S3: true to put the bucket's name into the path of requests, as most self-hosted servers"
            " need it. Without it, the client decides"
        ),
    ] = None
    allow_http: Annotated[bool, msgspec.Meta(description="whether blocks may be sent without TLS")] = False
    tls_ca_file: Annotated[
        str | None,
        msgspec.Meta(
            description="file with the authority that signed the server's certificate (PEM), if the system does not"
            " trust it"
        ),
    ] = None
    pack_size: Annotated[
        int,
        size_of(
            "most bytes of blocks in one object, up to 4 MiB and 64 blocks. A larger block has its own object",
            4096,
        ),
    ] = MAX_PACK_BYTES
    ttl: Annotated[
        Annotated[float, msgspec.Meta(ge=60, le=MAX_TTL_SECONDS)] | None,
        msgspec.Meta(
            description="seconds after which any engine deletes a pack. Without it, packs are deleted only to make room"
        ),
    ] = None
    refresh: Annotated[
        float, msgspec.Meta(ge=0.1, le=3600, description="seconds between two listings of other engines' packs")
    ] = 2.0
    threads: Threads = 4
    requests: Annotated[
        int, msgspec.Meta(ge=1, le=64, description="parallel requests for blocks in different packs")
    ] = 8
    connect_timeout: Annotated[float, _Deadline, msgspec.Meta(description="seconds to connect")] = 2.0
    timeout: Annotated[float, _Deadline, msgspec.Meta(description="seconds for a whole request")] = 10.0
    job_deadline: JobDeadline = 30.0

    @property
    def place(self) -> Place:
        """The parts of the url.

        Raises:
            ConfigError: the url is not valid; the error shows no credentials.
        """
        return _parse(self.url)

    @property
    def environment_secrets(self) -> tuple[str, ...]:
        """Prefixes of the environment variables with credentials that the provider's client reads by itself."""
        return _SECRETS_OF_CLIENTS[self.place.provider]

    def values_per_pack(self, block_bytes: int) -> int:
        """Return how many blocks a full pack holds."""
        return max(1, min(self.pack_size // block_bytes, MAX_BLOCKS))

    def check(self, block_bytes: int, policies: Mapping[str, type[Any]]) -> None:
        """Refuse options that contradict each other, the block size, or the environment."""
        if find_spec("obstore") is None:
            raise ConfigError("type", "object", "needs obstore: pip install 'kvtier[object]'")
        self._check_place(self.place.provider)
        if self.pack_size > MAX_PACK_BYTES:
            raise ConfigError("pack_size", self.pack_size, "at most 4 MiB, since one call of a store moves no more")
        least = MIN_PACKS * (block_bytes + HEADER_BYTES) * self.values_per_pack(block_bytes)
        if self.capacity < least:
            raise ConfigError("capacity", self.capacity, f"at least {least} bytes, {MIN_PACKS} packs")
        super().check(block_bytes, policies)

    @property
    def root(self) -> str:
        """The prefix of all object names."""
        return f"{self.place.prefix}/{LAYOUT}"

    @property
    def where(self) -> str:
        """The place, for messages."""
        at = f" at {self.endpoint}" if self.endpoint else ""
        provider, bucket, prefix = self.place
        return f"{provider}://{bucket}/{prefix}{at}"

    def _check_place(self, provider: str) -> None:
        if self.endpoint is not None:
            parts = split_address(self.endpoint)
            if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or provider == "gs":
                raise ConfigError("endpoint", self.endpoint, '"https://HOST:PORT", for s3:// and az://')
            if "@" in self.endpoint or parts.query or parts.fragment:
                allowed = "an address without credentials: put them in the environment or a profile"
                raise ConfigError("endpoint", self.endpoint, allowed)
            if parts.scheme == "http" and not self.allow_http:
                raise ConfigError("endpoint", self.endpoint, "https://; http:// needs allow_http: true")
        for key in ("region", "profile", "path_style"):
            if getattr(self, key) is not None and provider != "s3":
                raise ConfigError(key, getattr(self, key), "only with s3://")
        if self.profile is not None and find_spec("boto3") is None:
            raise ConfigError("profile", self.profile, "needs boto3: pip install boto3")
        if self.tls_ca_file is not None and not os.access(self.tls_ca_file, os.R_OK):
            raise ConfigError("tls_ca_file", self.tls_ca_file, "a readable file")


def _parse(url: str) -> Place:
    parts = split_address(url)
    if parts is None:
        raise ConfigError("url", url, f"{_URL} expected")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError("url", url, "a URL without credentials: put them in the environment or a profile")
    if parts.scheme not in _SCHEMES or not parts.netloc:
        raise ConfigError("url", url, f"{_URL} expected")
    prefix = parts.path.strip("/") or "kvtier"
    if len(prefix) > MAX_PREFIX_BYTES or not _PREFIX.fullmatch(prefix):
        allowed = f"a prefix of up to {MAX_PREFIX_BYTES} letters, digits, dots, dashes, underscores and slashes"
        raise ConfigError("url", url, allowed)
    return Place(parts.scheme, parts.netloc, prefix)
