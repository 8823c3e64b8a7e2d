"""The options that adapters over a staging arena share. The engine above has a cache in host memory of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

import msgspec

from kvtier.config import KVCacheGroup, OffloadingConfig, Seconds
from kvtier.errors import ConfigError
from kvtier.namespace import Namespace
from kvtier.options import check_known, convert_option
from kvtier.redaction import shown_option
from kvtier.sizes import parse_size
from kvtier.spec.staging import StagingSpec


class StagingOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The tiers, and the memory and the time that moves to and from them may take."""

    tiers: Annotated[
        list[dict[str, Any]], msgspec.Meta(description="the tiers, as `secondary_tiers` in kvtier's configuration")
    ]
    staging_bytes: Annotated[
        int | str,
        msgspec.Meta(
            description="host memory for bytes on their way to or from the tiers: bytes, or a text; at least two of the"
            " largest objects, or pages"
        ),
    ] = "256MiB"
    call_deadline: Annotated[
        Seconds,
        msgspec.Meta(description="longest time that one call of the engine waits for the tiers, seconds"),
    ] = 5.0
    model_identity: Annotated[
        str,
        msgspec.Meta(
            description="a text that you change with a model's weights: the engine tells a name only, and what was"
            " stored with another text misses"
        ),
    ] = ""

    def __repr__(self) -> str:
        """Show the options without secrets."""
        return f"{type(self).__name__}({shown_option('', msgspec.structs.asdict(self))})"

    @classmethod
    def read(cls, given: Mapping[str, Any] | None) -> Self:
        """Check a mapping that a user wrote, without the options of the tiers.

        Raises:
            ConfigError: a key is unknown or missing, or a value is of a wrong type or out of range.
        """
        given = given or {}
        fields = {field.name: field for field in msgspec.structs.fields(cls)}
        check_known(given, fields)
        for name, field in fields.items():
            if field.required and name not in given:
                raise ConfigError(name, None, "required")
        options = cls(**{key: convert_option(value, fields[key].type, key) for key, value in given.items()})
        if not options.tiers:
            raise ConfigError("tiers", options.tiers, "at least one tier")
        return options

    def make_spec(
        self, identity: Mapping[str, str | int], block_bytes: int, rank: int = 0, num_ranks: int = 1
    ) -> StagingSpec:
        """Return the spec of the tiers; nothing is allocated or opened.

        Args:
            identity: what decides the meaning of a block's bytes, in addition to its key.
            block_bytes: bytes in one block of the tiers.
            rank, num_ranks: of the processes that share the directories and capacities of this configuration.

        Raises:
            ConfigError: the tiers' configuration is wrong, or a tier has an admission rule.
        """
        if parse_size("staging_bytes", self.staging_bytes) < block_bytes:
            raise ConfigError("staging_bytes", self.staging_bytes, f"at least {block_bytes} bytes, one block")
        spec = StagingSpec(
            OffloadingConfig(
                extra_config={
                    "cpu_bytes_to_use": self.staging_bytes,
                    "secondary_tiers": self.tiers,
                    "spec_name": "StagingSpec",
                },
                groups=(KVCacheGroup(tokens_per_block=1),),
                engine_block_bytes=block_bytes,
                namespace=Namespace(identity),
                data_parallel_index=rank,
                data_parallel_size=num_ranks,
                tiers_key="tiers",
            )
        )
        spec.refuse_admission()
        return spec
