"""Configuration: what an engine says about itself, and what a user may set. It is checked once, here.

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
            ConfigError: a size is no positive int.
        """
        _check_count("tokens_per_block", self.tokens_per_block)


@dataclass(frozen=True)
class OffloadingConfig:
    """What an engine says when it asks for a spec.

    Attributes:
        extra_config: the user's configuration, as `TieringConfig` declares it; not changed.
        groups: the KV cache groups, at least one, by group index.
        engine_block_bytes: bytes of one engine block over all layers and all workers, of the largest group; the
            workers have equal shares of it, in the order of their ranks.
        namespace: identity of the blocks; None if the engine cannot tell (persistent tiers then refuse to start).
        engine_id: unique among the engines of one machine.
        world_size: workers that share the arena.
        rank: this process's place among them.
        data_parallel_index, data_parallel_size: this engine among equal ones that share a configuration; a size of
            None is a number that the engine does not know.
        uses_lora: block hashes carry the names of adapters, not their contents.
        enable_kv_cache_events: the engine asks for `take_events`.
        namespace_follows: the engine tells later, by `TieringOffloadingSpec.identify`; persistent tiers wait for it.
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

    def __post_init__(self) -> None:
        """Check what every spec relies on.

        Raises:
            ConfigError: `extra_config` is no mapping, no group, or a count out of range.
        """
        if not isinstance(self.extra_config, Mapping):
            raise ConfigError("extra_config", self.extra_config, "a mapping of option names to values expected")
        if not self.groups:
            raise ConfigError("groups", self.groups, "at least one KV cache group")
        _check_count("engine_block_bytes", self.engine_block_bytes)
        _check_count("world_size", self.world_size)
        if self.engine_block_bytes % self.world_size:
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


class TrustedWeights(Enum):
    """What tells weights from others."""

    CONTENTS = "contents"
    NAME = "name"


class CPUConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a user may set for `CPUOffloadingSpec`."""

    cpu_bytes_to_use: Annotated[
        int | str,
        msgspec.Meta(description='host memory of one engine, over all its workers: bytes, or a text such as "10GiB"'),
    ]
    spec_name: Annotated[
        Text, msgspec.Meta(description="registered name of the spec, or the name of its class in `spec_module_path`")
    ] = DEFAULT_SPEC
    spec_module_path: Annotated[Text | None, msgspec.Meta(description="module of a spec of your own")] = None
    block_size: Annotated[
        _Count | None,
        msgspec.Meta(
            description="tokens in one offloaded block, a multiple of the engine's block (the default); larger"
            " blocks make larger writes and coarser hits"
        ),
    ] = None
    blocks_per_chunk: Annotated[
        _Count | None,
        msgspec.Meta(
            description="the same in the engine's blocks; the one to use where KV groups have blocks of several sizes"
        ),
    ] = None
    eviction_policy: Annotated[
        Text,
        msgspec.Meta(
            description='which blocks leave host memory: "lru", "arc", "s3fifo", "tinylfu", "prefix", any registered'
            ' policy, or "auto", which changes it while the engine runs'
        ),
    ] = "lru"
    shadow_caches: Annotated[
        bool,
        msgspec.Meta(
            description="count what other policies, and half and twice the size, would have hit (metrics"
            ' `kvtier_shadow_*`); "auto" always does'
        ),
    ] = False
    offload_prompt_only: Annotated[
        bool | None,
        msgspec.Meta(
            description="engines offer only blocks of prompts, not of answers. Given, it is the admission of tiers"
            " that do not say; absent, it is true if there are secondary tiers and each admits prompts only"
        ),
    ] = None
    self_describing_kv_events: Annotated[bool, msgspec.Meta(description="engines attach token ids to KV events")] = (
        False
    )
    canonical_layout: Annotated[bool, msgspec.Meta(description="not supported: false only")] = False
    load_deadline: Annotated[
        Seconds | None,
        msgspec.Meta(
            description="longest a request waits for tiers, seconds; then the rest is computed. Absent, it waits for"
            " blocks only while they arrive sooner than they are computed"
        ),
    ] = TieringSettings.load_deadline
    probe_deadline: Annotated[
        Seconds | None,
        msgspec.Meta(
            description="longest a request waits for one tier to say whether it has a block, seconds. A tier's own"
            " option goes before this one; without either, each tier has what fits its medium"
        ),
    ] = TieringSettings.probe_deadline
    lease_timeout: Annotated[
        Seconds, msgspec.Meta(description="longest a request holds promoted blocks that it does not load, seconds")
    ] = TieringSettings.lease_timeout
    drain_timeout: Annotated[
        Seconds, msgspec.Meta(description="longest a reset or an exit waits for tiers, seconds")
    ] = TieringSettings.drain_timeout
    tier_deadline: Annotated[
        Seconds,
        msgspec.Meta(
            description="a tier that has jobs, and of which nothing has progressed for so many seconds, is not used"
            " until something has. A long queue that moves is not late. A tier's own `job_deadline` is another"
            " option: it ends the tier's I/O process"
        ),
    ] = TieringSettings.tier_deadline
    promotion_budget: Annotated[
        _Share, msgspec.Meta(description="share of host memory that blocks on their way up may take")
    ] = TieringSettings.promotion_budget
    retain_share: Annotated[
        float,
        msgspec.Meta(
            ge=0,
            le=1,
            description="share of host memory, and of each tier with an index, that blocks may hold which requests ask"
            " to keep for a time by a hint; 0 for none",
        ),
    ] = TieringSettings.retain_share
    tenant_quotas: Annotated[
        bool,
        msgspec.Meta(
            description="no tenant that requests name by a hint holds more than an equal share of host memory, and of"
            " each tier with an index, while others want theirs"
        ),
    ] = TieringSettings.tenant_quotas
    prefill_rate: Annotated[
        Seconds | None,
        msgspec.Meta(
            description="tokens per second that the engine computes, until kvtier has measured it; absent, 10,000, or"
            " less on a CPU."
            " Given, it bounds the wait for answers of tiers, too"
        ),
    ] = TieringSettings.prefill_rate
    on_reset: Annotated[
        ResetPolicy,
        msgspec.Meta(
            description='"new_epoch": after the engine resets its prefix cache, nothing stored before is served'
            ' again, in any tier; "keep": it is'
        ),
    ] = TieringSettings.on_reset
    allow_lora: Annotated[
        bool,
        msgspec.Meta(
            description="trust the names of LoRA adapters: block hashes carry names, not contents. Without it, tiers"
            " that outlive the engine stay off under LoRA"
        ),
    ] = False
    trust_weights: Annotated[
        TrustedWeights,
        msgspec.Meta(
            description="how engines that read weights from files tell them from others across restarts: by all of"
            ' their "contents", or by their "name" alone, a path, or a repository and its revision'
        ),
    ] = TrustedWeights.CONTENTS
    record: Annotated[
        Text | None,
        msgspec.Meta(
            description="path of a new file that gets a recording of the requests, for `kvtier simulate` and `kvtier"
            " plan`; keys are hashed with a salt that nobody keeps"
        ),
    ] = None
    record_limit: Annotated[int | str, msgspec.Meta(description="most bytes of the recording, which then ends")] = (
        DEFAULT_RECORD_LIMIT
    )

    def settings(self, tokens_per_block: int, kv_events: bool) -> TieringSettings:
        """Return the part that the tiering manager reads."""
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
    """What a user may set for `TieringOffloadingSpec`."""

    secondary_tiers: Annotated[
        list[dict[str, Any]],
        msgspec.Meta(
            description="tiers below host memory, asked in this order. Each is a mapping with `type`, and optionally"
            ' `module_path`, `name`, `admission` ("always", "second_touch", "prompt_only") and `probe_deadline`;'
            " every other key is an option of the tier"
        ),
    ] = []  # msgspec copies the default for every instance

    def __repr__(self) -> str:
        """Show the options without secrets."""
        return f"{type(self).__name__}({shown_option('', msgspec.structs.asdict(self))})"


C = TypeVar("C", bound=CPUConfig)


def parse_config(extra_config: Mapping[str, Any], kind: type[C]) -> C:
    """Return the user's configuration, checked.

    Args:
        extra_config: as the user wrote it; not changed.
        kind: `CPUConfig`, `TieringConfig`, or a subclass with keys of its own.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range, `cpu_bytes_to_use` missing, or
            `canonical_layout` asked for.
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
    """Return the options by their names of today, and say once per call which to change.

    Raises:
        ConfigError: an option is there under both names.
    """
    former = {old: new for old, new in _RENAMED.items() if old in extra_config}
    for old, new in former.items():
        if new in extra_config:
            raise ConfigError(old, extra_config[old], f"not together with {new}, which is its name now")
        logger.warning("kvtier: the option %s is called %s now; the old name still works", old, new)
    return {former.get(key, key): value for key, value in extra_config.items()}


def json_schema(kind: type[CPUConfig] = TieringConfig) -> dict[str, Any]:
    """Return the JSON schema of the user's configuration."""
    return msgspec.json.schema(kind)


def engine_blocks_per_block(user: CPUConfig, groups: Sequence[KVCacheGroup]) -> int:
    """Return how many engine blocks one offloaded block joins.

    Raises:
        ConfigError: `block_size` is no multiple of the engine block, contradicts `blocks_per_chunk`, or is given
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
        ConfigError: not even one fits.
    """
    num_blocks = parse_size("cpu_bytes_to_use", user.cpu_bytes_to_use) // block_bytes
    if num_blocks < 1:
        raise ConfigError("cpu_bytes_to_use", user.cpu_bytes_to_use, f"at least {block_bytes} bytes, one block")
    return num_blocks
