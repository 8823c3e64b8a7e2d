"""The configuration: what an engine tells of itself, and the options of a user, which are checked here.

`tier_config.py` has the keys of one secondary tier.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, TypeVar

import msgspec

from kvtier.errors import ConfigError
from kvtier.namespace import Namespace
from kvtier.options import check_known, convert_option
from kvtier.primary.huge_pages import HugePages
from kvtier.redaction import shown_option
from kvtier.sizes import parse_size
from kvtier.tiering.settings import ResetPolicy, TieringSettings

logger = logging.getLogger("kvtier")

DEFAULT_SPEC = "CPUOffloadingSpec"
DEFAULT_RECORD_LIMIT = "1GiB"

Text = Annotated[str, msgspec.Meta(min_length=1)]
_Count = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
_Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


def _check_count(key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(key, value, "an int, at least 1, expected")


@dataclass(frozen=True)
class KVCacheGroup:
    """Layers of a model that share one block table.

    Attributes:
        tokens_per_block: tokens in one engine block of the group, at least 1.
        layer_names: the layers, in the engine's order.
    """

    tokens_per_block: int
    layer_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ConfigError: a size is not a positive int.
        """
        _check_count("tokens_per_block", self.tokens_per_block)


@dataclass(frozen=True)
class OffloadingConfig:
    """What an engine tells of itself when it makes a spec.

    Attributes:
        extra_config: the user's configuration, as `TieringConfig` declares it; it is not changed.
        groups: the KV cache groups, at least one, by group index.
        engine_block_bytes: bytes of one engine block of the largest group, over all layers and all workers. The
            workers have equal shares of it, in the order of their ranks; if `replicated`, they share all of it.
        namespace: identity of the blocks; None if the engine cannot give one (persistent tiers then do not start).
        engine_id: unique among the engines of one machine.
        world_size: number of workers that share the arena.
        rank: index of this process among them.
        data_parallel_index: index of this engine among equal engines that share a configuration.
        data_parallel_size: number of these engines; None if the engine does not know it.
        uses_lora: True if the engine uses LoRA; block hashes contain adapters' names, not their contents.
        enable_kv_cache_events: True if the engine calls `take_events`.
        namespace_follows: True if the engine gives the namespace later, by `TieringOffloadingSpec.identify`;
            persistent tiers start then.
        replicated: True if a block is the same in all workers. It is stored once, by rank 0, and all of them load it.
        tiers_key: what the user calls `secondary_tiers`, for errors.
    """

    extra_config: Mapping[str, Any] = field(repr=False)  # where users put passwords, allowed or not
    groups: tuple[KVCacheGroup, ...]
    engine_block_bytes: int
    namespace: Namespace | None = None
    engine_id: str = ""
    world_size: int = 1
    rank: int = 0
    data_parallel_index: int = 0
    data_parallel_size: int | None = 1
    uses_lora: bool = False
    enable_kv_cache_events: bool = False
    namespace_follows: bool = False
    replicated: bool = False
    tiers_key: str = "secondary_tiers"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: `extra_config` is not a mapping, there is no group, or a count is out of range.
        """
        if not isinstance(self.extra_config, Mapping):
            raise ConfigError("extra_config", self.extra_config, "a mapping of option names to values expected")
        if not self.groups:
            raise ConfigError("groups", self.groups, "at least one KV cache group")
        _check_count("engine_block_bytes", self.engine_block_bytes)
        _check_count("world_size", self.world_size)
        if self.engine_block_bytes % self.num_shares:
            allowed = f"a multiple of world_size={self.world_size}: each worker has an equal share of a block"
            raise ConfigError("engine_block_bytes", self.engine_block_bytes, allowed)
        if not 0 <= self.rank < self.world_size:
            raise ConfigError("rank", self.rank, f"0 to {self.world_size - 1}, for world_size={self.world_size}")
        size = self.data_parallel_size
        if size is not None:
            _check_count("data_parallel_size", size)
        if self.data_parallel_index < 0 or (size is not None and self.data_parallel_index >= size):
            allowed = "an int, at least 0" if size is None else f"0 to {size - 1}, for data_parallel_size={size}"
            raise ConfigError("data_parallel_index", self.data_parallel_index, allowed)

    @property
    def num_shares(self) -> int:
        """Number of parts of a block, each of which one worker stores."""
        return 1 if self.replicated else self.world_size

    @property
    def share(self) -> int:
        """Index of the part of a block that this process loads."""
        return 0 if self.replicated else self.rank


class TrustedWeights(Enum):
    """What identifies a model's weights."""

    CONTENTS = "contents"
    NAME = "name"


class CPUConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A user's options for `CPUOffloadingSpec`."""

    cpu_bytes_to_use: Annotated[
        int | str,
        msgspec.Meta(description='host memory of one engine, over all its workers: bytes, or a text such as "10GiB"'),
    ]
    huge_pages: Annotated[
        HugePages,
        msgspec.Meta(
            description='whether host memory is in huge pages, with which a disk is faster: "auto" uses them where the'
            ' host offers them, "require" refuses to start without them, "off" does not ask for them'
        ),
    ] = HugePages.AUTO
    arena_path: Annotated[
        Text | None,
        msgspec.Meta(
            description="folder on a tmpfs that holds the host memory's file (which has no name there), for a tmpfs"
            ' mounted with "huge="; if absent, the file is in no folder'
        ),
    ] = None
    spec_name: Annotated[
        Text, msgspec.Meta(description="registered name of the spec, or the name of its class in `spec_module_path`")
    ] = DEFAULT_SPEC
    spec_module_path: Annotated[Text | None, msgspec.Meta(description="module of a spec of your own")] = None
    block_size: Annotated[
        _Count | None,
        msgspec.Meta(
            description="tokens in one offloaded block, a multiple of the engine's block (the default); larger"
            " blocks make larger writes and coarser hits. In vLLM, models with sliding windows or states take only the"
            " default"
        ),
    ] = None
    blocks_per_chunk: Annotated[
        _Count | None,
        msgspec.Meta(
            description="the size of an offloaded block in engine blocks, instead of `block_size`; needed if KV groups"
            " have blocks of different sizes"
        ),
    ] = None
    eviction_policy: Annotated[
        Text,
        msgspec.Meta(
            description='which blocks are evicted from host memory: "lru", "arc", "s3fifo", "tinylfu", "prefix" ("auto"'
            " is the same), or any registered policy"
        ),
    ] = "lru"
    offload_prompt_only: Annotated[
        bool | None,
        msgspec.Meta(
            description="engines offer only blocks of prompts, not of answers. If given, it is also the `admission` of"
            " tiers without one. If absent, it is true if there are secondary tiers and each has `admission`"
            ' "prompt_only"'
        ),
    ] = None
    self_describing_kv_events: Annotated[bool, msgspec.Meta(description="engines attach token ids to KV events")] = (
        False
    )
    sync_load_budget_bytes: Annotated[
        int,
        msgspec.Meta(
            ge=0,
            description="vLLM from 0.33 on: hits in host memory up to this many bytes of one worker per step are loaded"
            " within the step, and their requests start one step earlier; 0 for none",
        ),
    ] = 0
    canonical_layout: Annotated[bool, msgspec.Meta(description="not supported: false only")] = False
    load_deadline: Annotated[
        Seconds | None,
        msgspec.Meta(
            description="longest time that a request waits for tiers, seconds; then the engine computes the rest. If"
            " absent, it waits for blocks only while they are expected sooner than the engine could compute them"
        ),
    ] = TieringSettings.load_deadline
    probe_deadline: Annotated[
        Seconds | None,
        msgspec.Meta(
            description="longest time that a request waits for one tier to say whether it has a block, seconds. A"
            " tier's own `probe_deadline` overrides this one; without either, the tier's type decides"
        ),
    ] = TieringSettings.probe_deadline
    lease_timeout: Annotated[
        Seconds,
        msgspec.Meta(description="longest time that a request holds promoted blocks that it does not load, seconds"),
    ] = TieringSettings.lease_timeout
    drain_timeout: Annotated[
        Seconds, msgspec.Meta(description="longest time that a reset or an exit waits for tiers, seconds")
    ] = TieringSettings.drain_timeout
    tier_deadline: Annotated[
        Seconds,
        msgspec.Meta(
            description="a tier with jobs that makes no progress for this time, in seconds, is not used until it makes"
            " some. A long queue that moves is no reason. A tier's own `job_deadline` is another option: it ends the"
            " tier's I/O process"
        ),
    ] = TieringSettings.tier_deadline
    promotion_budget: Annotated[
        _Share, msgspec.Meta(description="largest share of host memory for blocks that are being promoted")
    ] = TieringSettings.promotion_budget
    retain_share: Annotated[
        float,
        msgspec.Meta(
            ge=0,
            le=1,
            description="largest share of host memory, and of each tier with an index, for blocks that requests' hints"
            " ask to keep for a time; 0 for none",
        ),
    ] = TieringSettings.retain_share
    tenant_quotas: Annotated[
        bool,
        msgspec.Meta(
            description="while tenants, which hints of requests name, compete for host memory or for a tier with an"
            " index, none of them holds more than an equal share of it"
        ),
    ] = TieringSettings.tenant_quotas
    prefill_rate: Annotated[
        Seconds | None,
        msgspec.Meta(
            description="tokens per second that the engine computes, used until kvtier has measured it. If absent, it"
            " is 10,000, or less on a CPU. Given or measured, it also bounds the wait for answers of tiers"
        ),
    ] = TieringSettings.prefill_rate
    on_reset: Annotated[
        ResetPolicy,
        msgspec.Meta(
            description='"new_epoch": after the engine resets its prefix cache, all blocks stored before miss, in'
            ' every tier; "keep": blocks in secondary tiers still hit'
        ),
    ] = TieringSettings.on_reset
    allow_lora: Annotated[
        bool,
        msgspec.Meta(
            description="trust the names of LoRA adapters: block hashes contain names, not contents. Without it, an"
            " engine with LoRA does not use tiers that outlive it"
        ),
    ] = False
    trust_weights: Annotated[
        TrustedWeights,
        msgspec.Meta(
            description="how an engine that reads weights from files recognizes them after a restart: by all of their"
            ' "contents", or only by their "name": a path, or a repository and its revision'
        ),
    ] = TrustedWeights.CONTENTS
    record: Annotated[
        Text | None,
        msgspec.Meta(
            description="path of a new file for a recording of the requests, for `kvtier simulate` and `kvtier plan`;"
            " keys are hashed with a random salt that is not saved"
        ),
    ] = None
    record_limit: Annotated[
        int | str, msgspec.Meta(description="size at which the recording ends, bytes, or a text")
    ] = DEFAULT_RECORD_LIMIT
    spans: Annotated[
        bool,
        msgspec.Meta(
            description="whether OpenTelemetry spans are made of loads, promotions and cascades, for the tracer"
            " provider of the engine's process; needs `kvtier[otel]`"
        ),
    ] = False

    def settings(self, tokens_per_block: int, kv_events: bool) -> TieringSettings:
        """Return the tiering manager's settings."""
        return TieringSettings(
            load_deadline=self.load_deadline,
            probe_deadline=self.probe_deadline,
            lease_timeout=self.lease_timeout,
            drain_timeout=self.drain_timeout,
            tier_deadline=self.tier_deadline,
            promotion_budget=self.promotion_budget,
            prefill_rate=self.prefill_rate,
            retain_share=self.retain_share,
            tenant_quotas=self.tenant_quotas,
            tokens_per_block=tokens_per_block,
            on_reset=self.on_reset,
            kv_events=kv_events,
        )


class TieringConfig(CPUConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A user's options for `TieringOffloadingSpec`."""

    secondary_tiers: Annotated[
        list[dict[str, Any]],
        msgspec.Meta(
            description="tiers below host memory, in the order in which they are asked. Each is a mapping with `type`,"
            ' and optionally `module_path`, `name`, `admission` ("always", "second_touch", "prompt_only") and'
            " `probe_deadline`; every other key is an option of the tier"
        ),
    ] = []  # msgspec copies the default for every instance

    def __repr__(self) -> str:
        """Show the options without secrets."""
        return f"{type(self).__name__}({shown_option('', msgspec.structs.asdict(self))})"


C = TypeVar("C", bound=CPUConfig)


def parse_config(extra_config: Mapping[str, Any], kind: type[C]) -> C:
    """Check the user's configuration and return it.

    Args:
        extra_config: as the user wrote it; it is not changed.
        kind: `CPUConfig`, `TieringConfig`, or a subclass with its own keys.

    Raises:
        ConfigError: a key is unknown, a value is of a wrong type or out of range, `cpu_bytes_to_use` is missing, or
            `canonical_layout` is true.
    """
    fields = {item.name: item for item in msgspec.structs.fields(kind)}
    if "secondary_tiers" in extra_config and "secondary_tiers" not in fields:
        value = extra_config["secondary_tiers"]
        raise ConfigError("secondary_tiers", value, 'spec_name "TieringOffloadingSpec" has tiers, this one has none')
    extra_config = _with_new_names(extra_config)
    check_known(extra_config, fields)
    parse_size("cpu_bytes_to_use", extra_config.get("cpu_bytes_to_use"))
    parse_size("record_limit", extra_config.get("record_limit", DEFAULT_RECORD_LIMIT))
    values = {key: convert_option(value, fields[key].type, key) for key, value in extra_config.items()}
    if values.get("canonical_layout"):
        allowed = "false only: kvtier stores each rank's own layout, and the namespace keeps ranks apart"
        raise ConfigError("canonical_layout", True, allowed)
    return kind(**values)


_RENAMED = {"job_deadline": "tier_deadline"}
"""Former names of options; a tier's own option `job_deadline` means something else."""


def _with_new_names(extra_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options under their current names; log a warning for each old name.

    Raises:
        ConfigError: an option is given under both names.
    """
    former = {old: new for old, new in _RENAMED.items() if old in extra_config}
    for old, new in former.items():
        if new in extra_config:
            raise ConfigError(old, extra_config[old], f"not together with {new}, its new name")
        logger.warning("kvtier: the option %s is now called %s; the old name still works", old, new)
    return {former.get(key, key): value for key, value in extra_config.items()}


def json_schema(kind: type[CPUConfig] = TieringConfig) -> dict[str, Any]:
    """Return the JSON schema of the user's configuration."""
    return msgspec.json.schema(kind)


def engine_blocks_per_block(user: CPUConfig, groups: Sequence[KVCacheGroup]) -> int:
    """Return the number of engine blocks in one offloaded block.

    Raises:
        ConfigError: `block_size` is not a multiple of the engine block, contradicts `blocks_per_chunk`, or is given
            although the groups' engine blocks differ.
    """
    if user.block_size is None:
        return user.blocks_per_chunk or 1
    sizes = sorted({group.tokens_per_block for group in groups})
    if len(sizes) > 1:
        allowed = f"the groups have engine blocks of {sizes} tokens; set blocks_per_chunk (engine blocks) instead"
        raise ConfigError("block_size", user.block_size, allowed)
    count, rest = divmod(user.block_size, sizes[0])
    if rest:
        raise ConfigError("block_size", user.block_size, f"a multiple of the engine block, {sizes[0]} tokens")
    if user.blocks_per_chunk not in (None, count):
        allowed = f"{count}, or absent: block_size={user.block_size} is {count} engine blocks of {sizes[0]} tokens"
        raise ConfigError("blocks_per_chunk", user.blocks_per_chunk, allowed)
    return count


def primary_blocks(user: CPUConfig, block_bytes: int) -> int:
    """Return how many blocks of `block_bytes` the primary tier holds, at least 1.

    Raises:
        ConfigError: not even one block fits.
    """
    num_blocks = parse_size("cpu_bytes_to_use", user.cpu_bytes_to_use) // block_bytes
    if num_blocks < 1:
        raise ConfigError("cpu_bytes_to_use", user.cpu_bytes_to_use, f"at least {block_bytes} bytes, one block")
    return num_blocks
