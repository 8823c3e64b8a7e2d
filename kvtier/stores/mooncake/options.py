"""Options of tier type `mooncake`: the pool's master, and the memory that this host lends to the pool."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from importlib.util import find_spec
from typing import Annotated, Any

import msgspec

from kvtier.errors import CapacityError, ConfigError
from kvtier.options import Threads, size_of
from kvtier.primary.memory_limit import check_memory
from kvtier.stores.compression.options import CompressedOptions
from kvtier.stores.mooncake.lender_socket import has_lender

_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.%]+)\]|([\w.-]+)):(\d{1,5})")
_PREFIX = re.compile(r"[\w.-]{1,64}", re.ASCII)
_MIN_SEGMENT_BYTES = 16 << 20
"""Mooncake's own smallest segment."""
MAX_TTL_SECONDS = 30 * 60
"""Mooncake's own longest soft pin, unless its master allows more."""


class Protocol(Enum):
    """How bytes travel between hosts."""

    TCP = "tcp"
    RDMA = "rdma"


class MooncakeOptions(CompressedOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of tier type `mooncake`."""

    master: Annotated[str, msgspec.Meta(description="`HOST:PORT` of the pool's `mooncake_master`")]
    segment: Annotated[
        int,
        size_of(
            'host memory that this host lends to the pool, besides `cpu_bytes_to_use`, for example "64GiB". With 0,'
            " blocks are kept only in the memory of other hosts",
            0,
        ),
    ] = 0
    protocol: Annotated[
        Protocol, msgspec.Meta(description="`tcp`, or `rdma` where Mooncake's package and the network have it")
    ] = Protocol.TCP
    devices: Annotated[
        str, msgspec.Meta(description="names of RDMA devices, with commas between them; Mooncake finds them if empty")
    ] = ""
    host: Annotated[
        str | None,
        msgspec.Meta(
            description="address at which other hosts reach this one; the one from which this host reaches the master"
            " if absent"
        ),
    ] = None
    metadata: Annotated[
        str,
        msgspec.Meta(
            description="Mooncake's metadata service, the same for all hosts. With the default, hosts ask each other"
        ),
    ] = "P2PHANDSHAKE"
    replicas: Annotated[int, msgspec.Meta(ge=1, le=8, description="hosts that keep each block")] = 1
    soft_pin: Annotated[
        Annotated[float, msgspec.Meta(gt=0, le=MAX_TTL_SECONDS)] | None,
        msgspec.Meta(
            description="seconds for which the pool evicts this engine's blocks only after all others, from their last"
            " use on"
        ),
    ] = None
    prefix: Annotated[
        str, msgspec.Meta(description="prefix of all key names: 1 to 64 letters, digits, `_`, `.` and `-`")
    ] = "kvtier"
    threads: Threads = 4
    connect_timeout: Annotated[float, msgspec.Meta(gt=0, le=60, description="seconds to connect to the master")] = 1.0

    @property
    def master_address(self) -> tuple[str, int]:
        """Host and port of the master.

        Raises:
            ConfigError: the option is no address.
        """
        match = _ADDRESS.fullmatch(self.master)
        port = int(match[3]) if match else 0
        if not match or not 0 < port < 65536:
            raise ConfigError("master", self.master, '"HOST:PORT"')
        return match[1] or match[2], port

    def check(self, block_bytes: int, policies: Mapping[str, type[Any]]) -> None:
        """Refuse options that contradict each other, the machine or the environment."""
        if find_spec("mooncake") is None:
            raise ConfigError("type", "mooncake", "needs Mooncake: pip install 'kvtier[mooncake]'")
        _ = self.master_address
        if not _PREFIX.fullmatch(self.prefix):
            raise ConfigError("prefix", self.prefix, 'letters, digits, "_", "." and "-", 1 to 64 of them')
        if self.devices and self.protocol is not Protocol.RDMA:
            raise ConfigError("devices", self.devices, 'only with protocol "rdma"')
        self._check_segment()
        super().check(block_bytes, policies)

    def _check_segment(self) -> None:
        if not self.segment:
            return
        if self.segment < _MIN_SEGMENT_BYTES:
            raise ConfigError("segment", self.segment, f"0, or at least {_MIN_SEGMENT_BYTES} bytes")
        if has_lender(self.to_json()):  # of another engine, or from before a restart: it has the memory already
            return
        try:
            check_memory(self.segment)
        except CapacityError as error:
            raise ConfigError("segment", self.segment, str(error)) from error
