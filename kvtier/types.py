"""The values that pass between the floors: results, contexts, jobs, specs. No behaviour beyond access."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtier.keys import OffloadKey

BlockIds = NDArray[np.int32]


class LookupResult(Enum):
    """Answer of a lookup for one key."""

    MISS = auto()
    """Not held, or not for this request any more."""
    HIT = auto()
    """Ready: in the primary tier for a manager, in the tier for a secondary tier."""
    HIT_PENDING = auto()
    """Held, and on its way to the primary tier: ask again."""
    RETRY = auto()
    """Not known yet: a probe is unanswered."""


class Medium(Enum):
    """What a tier keeps its blocks on."""

    CPU = "CPU"
    STORAGE = "STORAGE"


class Locality(Enum):
    """Where a tier's medium is, seen from this engine."""

    LOCAL = "LOCAL"
    REMOTE = "REMOTE"


class TierMatcher(NamedTuple):
    """Matches tiers by medium and locality; None matches anything, on either side."""

    medium: Medium | None = None
    locality: Locality | None = None

    def matches(self, medium: Medium | None, locality: Locality | None) -> bool:
        """Return whether a tier with this medium and locality is meant."""
        return (self.medium is None or medium is None or self.medium is medium) and (
            self.locality is None or locality is None or self.locality is locality
        )


@dataclass(frozen=True)
class TierFilter:
    """Which secondary tiers a request may load from: those that any matcher matches."""

    matchers: tuple[TierMatcher, ...] = ()

    ALL: ClassVar[TierFilter]

    def allows(self, medium: Medium | None, locality: Locality | None) -> bool:
        """Return whether a tier with this medium and locality may serve the request."""
        return any(matcher.matches(medium, locality) for matcher in self.matchers)


TierFilter.ALL = TierFilter((TierMatcher(),))


@dataclass(eq=False)
class ReqContext:
    """One request, as every call about it names it.

    Attributes:
        req_id: unique among live requests.
        kv_transfer_params: what the client sent for the transfer layer; kvtier reads the hint in it, see
            `kvtier.hints`.
        load_tier_filter: which secondary tiers the request may load from.
        num_prompt_tokens: length of the prompt, for `prompt_only` admission; None treats every block as prompt.
    """

    req_id: str
    kv_transfer_params: dict[str, Any] | None = None
    load_tier_filter: TierFilter = TierFilter.ALL
    num_prompt_tokens: int | None = None
    _key_positions: dict[OffloadKey, int] = field(default_factory=dict, init=False, repr=False)

    def set_offload_key_position(self, key: OffloadKey, end_token: int) -> None:
        """Record that the block `key` ends before token `end_token` of the request."""
        self._key_positions[key] = end_token

    @property
    def offload_key_positions(self) -> Mapping[OffloadKey, int]:
        """Where the blocks that the engine has keys for end, in tokens, by key; those on the device are among them."""
        return self._key_positions

    def get_offload_key_position(self, key: OffloadKey) -> int | None:
        """Return the end of the block `key` in tokens, or None if it was never recorded."""
        return self._key_positions.get(key)


class OffloadPolicy(Enum):
    """Which of a request's blocks an engine offers for storing."""

    BLOCK_LEVEL = "block_level"
    """Newly computed blocks only."""
    REQUEST_LEVEL = "request_level"
    """Every block of the request, prefix hits included."""


@dataclass
class RequestOffloadingContext:
    """A manager's answer to `on_new_request`."""

    policy: OffloadPolicy = OffloadPolicy.BLOCK_LEVEL


class ScheduleEndContext(NamedTuple):
    """What one scheduler step did, as `on_schedule_end` learns it."""

    new_req_ids: Collection[str] = ()
    preempted_req_ids: Collection[str] = ()


class LoadStoreSpec:
    """Where a worker finds or puts blocks; opaque to everybody but the worker."""


class BlockIDsLoadStoreSpec(LoadStoreSpec):
    """A spec that lists block indices.

    Attributes:
        block_ids: int32 array of shape (n,).
    """

    def __init__(self, block_ids: Sequence[int] | BlockIds) -> None:
        self.block_ids: BlockIds = np.asarray(block_ids, dtype=np.int32)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.block_ids!r})"


class GPULoadStoreSpec(BlockIDsLoadStoreSpec):
    """Engine blocks, ordered by KV group ("GPU" whatever the device is).

    Attributes:
        group_sizes: number of engine blocks per KV group; sums to `len(block_ids)`.
        block_indices: per group, the index within its request of the group's first engine block, so that a
            worker can skip the part of the first offloaded block that lies before it.
    """

    def __init__(
        self,
        block_ids: Sequence[int] | BlockIds,
        group_sizes: Sequence[int] | None = None,
        block_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__(block_ids)
        self.group_sizes: tuple[int, ...] = (len(self.block_ids),) if group_sizes is None else tuple(group_sizes)
        self.block_indices: tuple[int, ...] = (
            (0,) * len(self.group_sizes) if block_indices is None else tuple(block_indices)
        )
        if sum(self.group_sizes) != len(self.block_ids):
            raise ValueError(f"group_sizes={self.group_sizes}: must sum to {len(self.block_ids)} block ids")
        if len(self.block_indices) != len(self.group_sizes):
            raise ValueError(f"block_indices={self.block_indices}: one per group, {len(self.group_sizes)} wanted")


class CPULoadStoreSpec(BlockIDsLoadStoreSpec):
    """Slots of the primary arena, in the order of the keys they were prepared for.

    Attributes:
        sequence: number of this transfer; the worker publishes it in the arena's control page when the copy
            has ended, so that a reset knows when the slots are untouched.
    """

    def __init__(self, block_ids: Sequence[int] | BlockIds, sequence: int = 0) -> None:
        self.block_ids = np.asarray(block_ids, dtype=np.int32)
        self.sequence = sequence


@dataclass
class PrepareStoreOutput:
    """What `prepare_store` decided.

    Attributes:
        keys_to_store: the keys to copy, in the order of the input.
        store_spec: their slots, in the same order.
        evicted_keys: keys that gave way.
    """

    keys_to_store: list[OffloadKey]
    store_spec: CPULoadStoreSpec
    evicted_keys: list[OffloadKey]


@dataclass
class OffloadingEvent:
    """Blocks that entered or left a medium, for engines that publish KV events."""

    keys: list[OffloadKey]
    medium: Medium
    removed: bool
    locality: Locality | None = None
    ownership: str | None = None


@dataclass
class JobMetadata:
    """One asynchronous batch in one tier.

    Attributes:
        job_id: unique in one manager; exactly one `JobResult` answers it.
        keys: the blocks, neighbours in a prefix side by side.
        block_ids: int32 array of shape (len(keys),): slots of the primary arena.
        is_promotion: True reads the tier into the slots, False writes the slots to the tier.
        req_context: the request that caused it.
    """

    job_id: int
    keys: Sequence[OffloadKey]
    block_ids: BlockIds
    is_promotion: bool
    req_context: ReqContext


@dataclass
class JobResult:
    """The one answer to a job.

    Attributes:
        success: True if every block succeeded.
        successful_keys: after a partial failure, those that did succeed; None means all share `success`.
        transfer_time: seconds.
        transfer_bytes: bytes moved.
    """

    job_id: int
    success: bool
    successful_keys: Collection[OffloadKey] | None = None
    transfer_time: float | None = None
    transfer_bytes: int | None = None


@dataclass
class TransferResult:
    """End of one device copy in a worker; `transfer_time` in seconds, `transfer_size` in bytes."""

    job_id: int
    success: bool
    transfer_size: int | None = None
    transfer_time: float | None = None


class Admission(Enum):
    """Which blocks may enter a secondary tier."""

    ALWAYS = "always"
    SECOND_TOUCH = "second_touch"
    PROMPT_ONLY = "prompt_only"


class StoreUsage(NamedTuple):
    """How full a store is; None stands for what it does not know.

    Attributes:
        blocks: held.
        bytes: held, with what the store keeps beside payloads, such as headers.
        capacity_bytes: the most that `bytes` may become.
    """

    blocks: int | None = None
    bytes: int | None = None
    capacity_bytes: int | None = None


class FailureCause(Enum):
    """Why a block could not be served or stored; every miss that is no plain absence has one."""

    ABSENT = "absent"
    CORRUPT = "corrupt"
    FOREIGN = "foreign"
    OLD_FORMAT = "old_format"
    IO_ERROR = "io_error"
    NO_SPACE = "no_space"
    TIER_DOWN = "tier_down"
    CANCELLED = "cancelled"
    UNREACHABLE = "unreachable"
    """A part of the tier is lost (a node of a cluster); the other parts serve."""
    BUSY = "busy"
    """The medium asks for less. The tier pauses its stores for a while; it is not down."""
