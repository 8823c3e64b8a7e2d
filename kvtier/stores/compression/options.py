"""The option `compress` of tiers whose blocks may vary in length."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from importlib.util import find_spec
from typing import Annotated, Any, Self

import msgspec

from kvtier.errors import ConfigError
from kvtier.stores.integrity.secrets import GuardedOptions


class Compression(Enum):
    """When blocks are compressed before they are stored."""

    OFF = "off"
    ZSTD = "zstd"
    AUTO = "auto"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Return what checked options say."""
        return cls(options.get("compress", "off"))


class CompressedOptions(GuardedOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the options of tiers whose blocks may vary in length."""

    compress: Annotated[
        Compression,
        msgspec.Meta(
            description='"zstd" compresses blocks without loss before they are stored, "auto" only while that is faster'
            ' by what is measured. The same for all engines that share blocks: with "off", compressed ones are misses'
        ),
    ] = Compression.OFF

    def check(self, block_bytes: int, policies: Mapping[str, type[Any]]) -> None:
        """Refuse to compress without the package that does it."""
        if self.compress is not Compression.OFF and find_spec("zstandard") is None:
            raise ConfigError("compress", self.compress.value, "needs zstandard: pip install 'kvtier[zstd]'")
        super().check(block_bytes, policies)
