"""The options of `KVTierL2Adapter`."""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvtier.adapters.staging_options import StagingOptions
from kvtier.sizes import parse_size
from kvtier.spec.staging import StagingSpec


class LMCacheOptions(StagingOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`adapter_params` in the configuration of LMCache's plugin adapter."""

    block_bytes: Annotated[
        int | str,
        msgspec.Meta(
            description="bytes in one block of the tiers; an object takes as many whole blocks as it needs, and a"
            " change makes stored objects miss"
        ),
    ] = "1MiB"

    def staging_spec(self) -> StagingSpec:
        """Return the spec of the tiers; nothing is allocated or opened.

        Raises:
            ConfigError: an option of a tier is wrong, or a size.
        """
        identity: dict[str, str | int] = {"lmcache.model_identity": self.model_identity}
        return self.make_spec(identity, parse_size("block_bytes", self.block_bytes))
