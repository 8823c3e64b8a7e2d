"""Values that managers, tiers, workers and engines exchange: results, contexts, jobs, specs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import islice
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvtier.keys import OffloadKey

BlockIds = NDArray[np.int32]
T = TypeVar("T")

MOST_LISTED = 450
"""Most keys that are asked for in one page of a listing. Twice as many of the longest fit one message of an I/O
process."""


class LookupResult(Enum):
    """Answer of a lookup for one key."""

    MISS = auto()
    """The block is not held, or this request has stopped waiting for it."""
    HIT = auto()
    """The block can be loaded: a manager has it in the primary tier, a secondary tier has it itself."""
    HIT_PENDING = auto()
    """The block is being promoted to the primary tier: ask again."""
    RETRY = auto()
    """Not known yet, since a tier has not answered: ask again."""


class Medium(Enum):
    """Medium of a tier's blocks."""

    CPU = "CPU"
    STORAGE = "STORAGE"


class Locality(Enum):
    """Whether a tier's medium is on the engine's machine."""

    LOCAL = "LOCAL"
    REMOTE = "REMOTE"


class TierMatcher(NamedTuple):
    """Matches tiers by medium and locality; None, of the matcher or the tier, matches everything."""

    medium: Medium | None = None
    locality: Locality | None = None

    def matches(self, medium: Medium | None, locality: Locality | None) -> bool:
        """Return whether it matches a tier with this medium and locality."""
        return (self.medium is None or medium is None or self.medium is medium) and (
            self.locality is None or locality is None or self.locality is locality
        )


@dataclass(frozen=True)
class TierFilter:
    """Allows a request to load from those secondary tiers that any matcher matches."""

    matchers: tuple[TierMatcher, ...] = ()

    ALL: ClassVar[TierFilter]

    def allows(self, medium: Medium | None, locality: Locality | None) -> bool:
        """Return whether the request may load from a tier with this medium and locality."""
        return any(matcher.matches(medium, locality) for matcher in self.matchers)


TierFilter.ALL = TierFilter((TierMatcher(),))


@dataclass(eq=False)
class ReqContext:
    """One request.

    Attributes:
        req_id: unique among live requests.
        kv_transfer_params: parameters that the client sent with the request; kvtier reads the hint in them
            (`kvtier.hints`).
        load_tier_filter: secondary tiers from which the request may load.
        num_prompt_tokens: length of the prompt, for `prompt_only` admission; if None, all blocks count as prompt.
    """

    req_id: str
    kv_transfer_params: dict[str, Any] | None = None
    load_tier_filter: TierFilter = TierFilter.ALL
    num_prompt_tokens: int | None = None
    _key_positions: dict[OffloadKey, int] = field(default_factory=dict, init=False, repr=False)

    def set_offload_key_position(self, key: OffloadKey, end_token: int) -> None:
        """Record that the last token of the block `key` is token `end_token - 1` of the request."""
        self._key_positions[key] = end_token

    @property
    def offload_key_positions(self) -> Mapping[OffloadKey, int]:
        """Where the blocks that the engine has keys for end, in tokens, by key; those on the device are among them."""
        return self._key_positions

    def get_offload_key_position(self, key: OffloadKey) -> int | None:
        """Return the recorded `end_token` of the block `key`; None if there is none."""
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
    """New and preempted requests of one scheduler step."""

    new_req_ids: Collection[str] = ()
    preempted_req_ids: Collection[str] = ()


class LoadStoreSpec:
    """Places of blocks, for a worker; opaque to all other code."""


class BlockIDsLoadStoreSpec(LoadStoreSpec):
    """Places of blocks, as a list of indices.

    Attributes:
        block_ids: int32 array of shape (n,).
    """

    def __init__(self, block_ids: Sequence[int] | BlockIds) -> None:
        self.block_ids: BlockIds = np.asarray(block_ids, dtype=np.int32)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.block_ids!r})"


class GPULoadStoreSpec(BlockIDsLoadStoreSpec):
    """Engine blocks, ordered by KV group. The device need not be a GPU.

    Attributes:
        group_sizes: number of engine blocks per KV group; the sum is `len(block_ids)`.
        block_indices: per group, the index in its request of the group's first engine block. If this is not the first
            engine block of an offloaded block, the worker skips the part before it.
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
    """Slots of the primary arena, in the order of the keys.

    Attributes:
        sequence: number of this transfer. The worker writes it to the arena's control page when the copy has ended,
            so that a reset knows when the slots can be used again.
    """

    def __init__(self, block_ids: Sequence[int] | BlockIds, sequence: int = 0) -> None:
        self.block_ids = np.asarray(block_ids, dtype=np.int32)
        self.sequence = sequence


@dataclass
class PrepareStoreOutput:
    """Result of `prepare_store`.

    Attributes:
        keys_to_store: the keys to copy, in the order of the input.
        store_spec: their slots, in the same order.
        evicted_keys: keys that were evicted for them.
    """

    keys_to_store: list[OffloadKey]
    store_spec: CPULoadStoreSpec
    evicted_keys: list[OffloadKey]


@dataclass
class OffloadingEvent:
    """Blocks that were stored in or removed from a medium, for engines that publish KV events.

    Attributes:
        metadata_only: a removal of blocks that were never there, because their stores failed. Engines forget what they
            have noted for these blocks, and publish nothing.
    """

    keys: list[OffloadKey]
    medium: Medium
    removed: bool
    locality: Locality | None = None
    ownership: str | None = None
    metadata_only: bool = False


@dataclass
class JobMetadata:
    """A job: an asynchronous copy of blocks between the primary arena and one tier.

    Attributes:
        job_id: unique per manager; exactly one `JobResult` answers it.
        keys: the blocks, in prefix order.
        block_ids: int32 array of shape (len(keys),): slots of the primary arena.
        is_promotion: True to copy from the tier to the slots, False to copy from the slots to the tier.
        req_context: the request that caused it; the first one, if there are `shares`.
        shares: each request and the number of its blocks, in the order of `keys`, if a store has blocks of several
            requests. Only tiers that set `joins_stores` get such jobs.
    """

    job_id: int
    keys: Sequence[OffloadKey]
    block_ids: BlockIds
    is_promotion: bool
    req_context: ReqContext
    shares: Sequence[tuple[ReqContext, int]] = ()

    def by_request(self) -> Iterator[tuple[ReqContext, list[OffloadKey]]]:
        """Yield each request with its keys, in order."""
        keys = iter(self.keys)
        for req_context, count in self.shares or ((self.req_context, len(self.keys)),):
            yield req_context, list(islice(keys, count))


@dataclass
class JobResult:
    """The answer to a job.

    Attributes:
        success: True if every block succeeded.
        successful_keys: blocks that succeeded in a job that failed partly; None if all succeeded or all failed.
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
    """Result of one copy of a worker's; `transfer_time` in seconds, `transfer_size` in bytes."""

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
    """How full a store is; None where that is not known.

    Attributes:
        blocks: number of blocks held.
        bytes: bytes held, with everything that the store keeps besides payloads, such as headers.
        capacity_bytes: upper limit of `bytes`.
        compressed_blocks: blocks that were stored compressed since the store was opened.
        unwritten_bytes, unread_bytes: bytes that need not be written, or read, for this reason.
    """

    blocks: int | None = None
    bytes: int | None = None
    capacity_bytes: int | None = None
    compressed_blocks: int = 0
    unwritten_bytes: int = 0
    unread_bytes: int = 0


class KeyPage(NamedTuple):
    """Some of the keys that a store or a tier holds.

    Attributes:
        keys: about as many as were asked for, at most `2 * MOST_LISTED`; there may be none although more follow.
        cursor: what to ask with for the next page; None if there is none.
    """

    keys: Sequence[OffloadKey]
    cursor: bytes | None


class AnswerState(Enum):
    """Whether a tier has answered."""

    OPEN = "open"
    DONE = "done"
    FAILED = "failed"


@dataclass(eq=False)
class Answer(Generic[T]):
    """A tier's answer to a question that needs I/O. It is open until one of the tier's later polls.

    Attributes:
        value: set if the state is DONE.
    """

    state: AnswerState = AnswerState.OPEN
    value: T | None = None

    def settle(self, value: T) -> None:
        """Be DONE, unless it has failed before."""
        if self.state is AnswerState.OPEN:
            self.state, self.value = AnswerState.DONE, value

    def fail(self) -> None:
        """Be FAILED, unless it is DONE."""
        if self.state is AnswerState.OPEN:
            self.state = AnswerState.FAILED


class FailureCause(Enum):
    """Why a block could not be loaded or stored. Every failure has a cause; a plain miss has none."""

    ABSENT = "absent"
    CORRUPT = "corrupt"
    FOREIGN = "foreign"
    OLD_FORMAT = "old_format"
    IO_ERROR = "io_error"
    NO_SPACE = "no_space"
    TIER_DOWN = "tier_down"
    CANCELLED = "cancelled"
    UNREACHABLE = "unreachable"
    """A part of the tier (a node of a cluster) cannot be reached; the other parts work."""
    BUSY = "busy"
    """The medium asked for fewer requests. The tier pauses its stores for a while; it is not down."""
