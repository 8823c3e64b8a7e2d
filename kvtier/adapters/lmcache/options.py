"""The options of `KVTierL2Adapter`."""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvtier.adapters.staging_options import StagingOptions
from kvtier.primary.arena import align_block_bytes
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
    shared_memory: Annotated[
        bool,
        msgspec.Meta(
            description="whether the tiers' I/O processes work on LMCache's memory itself, without copies; it must have"
            " a name (`--no-l1-use-lazy --shm-name NAME`), and `--l1-align-bytes` be a multiple of `block_bytes`"
        ),
    ] = False

    def spec(self, num_blocks: int | None = None) -> StagingSpec:
        """Return the spec of the tiers; nothing is allocated or opened.

        Args:
            num_blocks: in an arena of the caller's; None for a staging arena of `staging_bytes`.

        Raises:
            ConfigError: an option of a tier is wrong, or a size.
        """
        identity: dict[str, str | int] = {"lmcache.model_identity": self.model_identity}
        block_bytes = parse_size("block_bytes", self.block_bytes)
        options = self
        if num_blocks is not None:
            options = msgspec.structs.replace(self, staging_bytes=num_blocks * align_block_bytes(block_bytes))
        return options.make_spec(identity, block_bytes)
