"""All contracts, on one page.

Managers and secondary tiers run on the engine's scheduler thread and never wait. Workers run in the device's process.
Stores run in a tier's I/O process and may block.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from kvtier.clock import Clock, monotonic_clock
from kvtier.errors import StoreError
from kvtier.events import NullObserver, Observer, TierState
from kvtier.key_tables import KeySlots
from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.types import (
    Answer,
    FailureCause,
    GPULoadStoreSpec,
    JobMetadata,
    JobResult,
    KeyPage,
    LoadStoreSpec,
    Locality,
    LookupResult,
    Medium,
    OffloadingEvent,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    StoreUsage,
    TransferResult,
)

__all__ = [
    "BlockStore",
    "Clock",
    "EvictionPolicy",
    "FailureCounter",
    "Observer",
    "OffloadingManager",
    "OffloadingSpec",
    "OffloadingWorker",
    "SecondaryTierManager",
    "SlotStore",
    "StoreContext",
    "TierContext",
]


class EvictionPolicy(ABC):
    """Orders keys by how soon they should be evicted. It knows neither slots, pins nor I/O, and has no clock.

    Keys come in prefix order (head first). A policy that orders by recency makes the tail of one call older than its
    head, so that evictions shorten a prefix from its end.

    `now` is the time, in seconds, at which the request came that uses the keys. All calls for one request have the same
    `now`, two requests never have, and it may be earlier than that of the call before. Policies may ignore it, and
    their methods need not even take it.

    Caller guarantees: `insert` gets only keys not held; `evict` and `remove` get only keys held; no key comes twice in
    one call.
    Implementer must: hold exactly the keys inserted and not yet evicted or removed; only hash and compare keys.
    """

    may_decline: bool = True
    """Whether `candidates` may end early. A tier sets it before each call with `incoming`."""

    num_evictable: Callable[[Sequence[OffloadKey]], int] = len
    """Returns how many of the held keys that it is given may be evicted, from the first one on. A tier sets it before
    each call of `candidates`, since jobs and requests may be using blocks. A policy need not ask, because the tier
    skips what may not be evicted. One that knows which blocks depend on one another should: else a block goes that a
    skipped one needs, and both are lost."""

    def __init__(self, capacity: int) -> None:
        """Args: capacity: most keys that will be held at once, at least 1."""
        self.capacity = capacity

    def use_slots(self, slots: KeySlots) -> None:
        """Learn where the slots of held keys are found, before the first call; a policy need not use them.

        Args:
            slots: while a policy is told something about keys that it holds or is to hold, they have slots here, from
                0 to below `capacity`.
        """
        return

    @abstractmethod
    def insert(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Start to hold `keys`; this counts one use of each."""

    @abstractmethod
    def touch(self, keys: Sequence[OffloadKey], now: float = 0.0) -> bool | None:
        """Count one more use of each of `keys`; keys not held are ignored.

        A call without keys only tells, by `now`, for which request the next `candidates` is called.

        Returns:
            True if the policy has noticed that it holds all of `keys`, which saves the caller a look; else nothing.
        """

    @abstractmethod
    def evict(self, keys: Sequence[OffloadKey]) -> None:
        """Stop holding `keys`, which `candidates` yielded; the policy may remember them (ghosts)."""

    @abstractmethod
    def remove(self, keys: Sequence[OffloadKey]) -> None:
        """Stop holding `keys`, for reasons of the caller, and forget everything about them."""

    @abstractmethod
    def candidates(self, incoming: Sequence[OffloadKey] = ()) -> Iterator[OffloadKey]:
        """Yield the held keys, best victim first; change nothing.

        Without `incoming`, all held keys are yielded. With it, a policy that may decline may end earlier: the keys left
        are worth more than the tail of `incoming`, which is then not stored, or is the next victim.

        Args:
            incoming: the keys that are about to be inserted, in prefix order.

        The caller does not change the policy while it iterates.
        """

    def settle(self, keys: Sequence[OffloadKey]) -> None:
        """Order `keys` by recency, tail first, after a request that gave them in several calls; count no use."""
        return

    def line_up(self, keys: Sequence[OffloadKey]) -> None:
        """Do the same for a request that goes on. A policy that knows which blocks depend on one another need not."""
        return

    @abstractmethod
    def clear(self) -> None:
        """Forget everything."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of keys held."""

    @abstractmethod
    def __contains__(self, key: object) -> bool:
        """Return whether `key` is held (a ghost is not)."""

    def check_invariants(self) -> None:
        """Raise InvariantError if the state contradicts itself."""
        return


class FailureCounter:
    """Counts failed blocks by cause; safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[FailureCause] = Counter()

    def count(self, cause: FailureCause, blocks: int = 1) -> None:
        """Add `blocks` failures of one cause."""
        with self._lock:
            self._counts[cause] += blocks

    def take(self) -> dict[FailureCause, int]:
        """Return the counts since the last call."""
        if not self._counts:
            return {}
        with self._lock:
            counts, self._counts = dict(self._counts), Counter()
        return counts


@dataclass(frozen=True)
class StoreContext:
    """What a store knows of its tier.

    Attributes:
        namespace: the store must not show blocks of any other namespace.
        block_bytes: payload bytes of every block.
        failures: counts the blocks that the store could not read or write, by cause.
        huge_pages: whether the buffers lie in huge pages. Direct I/O from them needs no private memory.
        compressed: whether blocks may be shorter, because they are compressed; only for stores of kvtier's that can.
    """

    namespace: Namespace
    block_bytes: int
    failures: FailureCounter = field(default_factory=FailureCounter)
    huge_pages: bool = False
    compressed: bool = False

    @property
    def whole_bytes(self) -> int | None:
        """Length of a block, if shorter payloads are compressed ones; None if there are none."""
        return self.block_bytes if self.compressed else None


class BlockStore(ABC):
    """A blocking store of bytes by key, whose key says where a block is (network stores, shared filesystems).

    It runs in the tier's I/O process; several threads call it at once. It reports faults of the medium by StoreError
    (the whole call failed) or by False (that block failed); both are misses. After a StoreUnavailableError the tier
    closes the store and opens it again later. This holds for slot stores, too.
    A plain store keeps opaque values: kvtier adds a header to each and checks it after a read. A store that can move
    header and payload without joining them sets `seals_itself` and uses `kvtier.stores.integrity`.
    """

    seals_itself: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def open(cls, options: Mapping[str, Any], context: StoreContext) -> Self:
        """Connect to the medium.

        Args:
            options: the tier's own options, checked.

        Raises:
            StoreUnavailableError: the medium cannot be used now. The tier tries again later.
        """

    @abstractmethod
    def contains(self, keys: Sequence[OffloadKey]) -> Sequence[bool]:
        """Return, per key, whether the store has a value."""

    @abstractmethod
    def write(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> Sequence[bool]:
        """Store `buffers[i]` under `keys[i]`; return, per key, whether later reads will find it.

        The store must not keep the buffers after the call.
        """

    @abstractmethod
    def read_into(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> Sequence[bool]:
        """Read the value of `keys[i]` into `buffers[i]`; return, per key, whether this worked.

        A value of another length than its buffer is a failure. After a failure the buffer may hold any bytes.
        """

    @abstractmethod
    def delete(self, keys: Sequence[OffloadKey]) -> None:
        """Delete the values of `keys`; absent keys are ignored. If one may still be there, raise StoreError."""

    def ask_held(self, keys: Sequence[OffloadKey]) -> Sequence[bool]:
        """As `contains`, but raise StoreError if the answer for one key is not certain: absent values count as gone."""
        return self.contains(keys)

    def keep(self, keys: Sequence[OffloadKey], seconds: float) -> Sequence[bool] | None:
        """Evict the values of `keys` after all others, for about `seconds`; None if the store cannot.

        It is no promise: the medium may be full of such values, or shared with others.

        Returns:
            Per key, whether the store has a value.
        """
        return None

    def list_keys(self, cursor: bytes, most: int) -> KeyPage | None:
        """Return some of the keys held in this namespace; None if the store cannot tell.

        Args:
            cursor: b"" for the first page, then the `cursor` of the page before; it outlives the store's process.
            most: about how many keys to return, 1 to `MOST_LISTED`.

        A key that is held from the first page to the last comes at least once. Others may come or not, and a key may
        come twice.

        Raises:
            StoreError: the medium failed, or the cursor is not one of this store.
        """
        return None

    def usage(self) -> StoreUsage | None:
        """Return how full the store is, without I/O: it is called often. None if that is not known."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Release everything; no call follows."""


class SlotStore(ABC):
    """A blocking store of bytes by slot (local devices). The tier, in the scheduler's process, keeps index and policy.

    It runs in the tier's I/O process. Several threads call it at once, but never two for one slot.
    It verifies payloads: `read_into` returns True only for bytes that were stored under that key and namespace.
    """

    @classmethod
    @abstractmethod
    def open(cls, options: Mapping[str, Any], context: StoreContext) -> Self:
        """Open and lock the medium: nobody else may write it until `close` or the end of the process.

        Raises:
            StoreUnavailableError: it is locked by another process, full, missing, or no store of kvtier's.
        """

    @property
    @abstractmethod
    def num_slots(self) -> int:
        """Number of slots; slot indices are below it."""

    @abstractmethod
    def recover(self) -> Iterator[tuple[Sequence[int], Sequence[OffloadKey]]]:
        """Yield batches of (slots, keys) that a former process stored, oldest first, without reading payloads.

        Called once, before any other I/O. No key and no slot is yielded twice.
        """

    @abstractmethod
    def write(self, slots: Sequence[int], keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> Sequence[bool]:
        """Overwrite the slots; return, per slot, whether later reads will find the block."""

    @abstractmethod
    def read_into(
        self, slots: Sequence[int], keys: Sequence[OffloadKey], buffers: Sequence[memoryview]
    ) -> Sequence[bool]:
        """Read `slots[i]` into `buffers[i]` (block_bytes each); return, per slot, whether it held `keys[i]`, intact.

        A slot that fails this check is invalidated: `recover` never yields it again.
        """

    def delete(self, slots: Sequence[int], keys: Sequence[OffloadKey]) -> None:
        """Empty the slots that hold `keys`: neither `read_into` nor `recover`, in a later process, finds the blocks.

        Raises:
            StoreError: a block may still be there, or the store cannot delete.
        """
        raise StoreError(f"{type(self).__name__} cannot delete")

    def prepare(self) -> tuple[int, int] | None:
        """Do a few milliseconds of work that makes later calls quicker.

        One thread calls it repeatedly while others read and write.

        Returns:
            (bytes prepared so far, bytes in total); None when nothing is left to do.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Release everything; no call follows."""


@dataclass(frozen=True)
class TierContext:
    """What a tier knows of its engine.

    Attributes:
        namespace: identity of the blocks; None if the engine did not give one (persistent tiers then do not start).
        arena_fd: descriptor of the memfd behind the primary view, which I/O processes map; None if the view is memory
            of this process only.
        arena_is_foreign: whether that file is somebody else's, who keeps the arena's blocks at its beginning.
        clock: source of time.
        observer: gets the events.
        tokens_per_block: tokens in one offloaded block, for predictions.
        policies: eviction policies by name, in addition to the built-in ones.
        retain_share: largest share of a tier's slots for blocks that hints ask to keep, 0 to 1.
        tenant_quotas: True if each tenant that a hint names gets an equal share while others want theirs.
        inline_io: run stores on the caller's thread when the tier is polled. This is deterministic, for tests, manual
            clocks and the simulator.
    """

    namespace: Namespace | None = None
    arena_fd: int | None = None
    arena_is_foreign: bool = False
    clock: Clock = monotonic_clock
    observer: Observer = field(default_factory=NullObserver)
    tokens_per_block: int = 0
    policies: Mapping[str, type[EvictionPolicy]] = field(default_factory=dict)
    retain_share: float = 0.25
    tenant_quotas: bool = False
    inline_io: bool = False


class SecondaryTierManager(ABC):
    """One secondary tier, as the tiering manager sees it.

    All methods run on the scheduler's thread and return without I/O and without waiting. `drain_jobs` and `shutdown`
    may wait; the manager bounds their time.

    Attributes:
        medium, locality: for `load_tier_filter`; None matches every filter.
        verifies_payloads: True if a load never succeeds with bytes other than those stored under that key in the
            current namespace and epoch. For other tiers the manager keeps digests, and loads only blocks whose digest
            it knows.
        persistent: True if the tier may have blocks of earlier engines. Requests then wait a moment while it opens.
        joins_stores: True if one store job may have blocks of several requests, as `JobMetadata.shares` says. The
            blocks whose copies from the device end in one step are then one job, or several large ones.
        deletes, lists_keys: True if `delete` and `list_keys` may be called.
        probe_deadline: longest that a request waits while `lookup` answers RETRY, in seconds. The manager waits longer
            before the tier's first answer, and shorter after waits in vain. A configuration may set another value.
    """

    medium: ClassVar[Medium | None] = None
    locality: ClassVar[Locality | None] = None
    verifies_payloads: ClassVar[bool] = False
    persistent: ClassVar[bool] = False
    joins_stores: ClassVar[bool] = False
    deletes: ClassVar[bool] = False
    lists_keys: ClassVar[bool] = False
    probe_deadline: ClassVar[float] = 0.25

    @classmethod
    def class_for(cls, options: Mapping[str, Any]) -> type[SecondaryTierManager]:
        """Return the class for these options, which are not checked yet: this one, unless an option chooses another."""
        return cls

    @classmethod
    def check_options(
        cls, options: Mapping[str, Any], block_bytes: int, policies: Mapping[str, type[EvictionPolicy]]
    ) -> None:
        """Refuse options that cannot work here. Called when a spec is made, in every process of an engine.

        An error here stops the engine's start. After an error of the constructor or of `start`, the engine runs
        without the tier.

        Args:
            options: keyword arguments of the constructor, with names and types checked.
            block_bytes: bytes of one block.
            policies: registered eviction policies that the options name.

        Raises:
            ConfigError: a value, a package, a file or a variable of the environment is wrong or missing.
        """
        return

    def __init__(self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str) -> None:
        """Set up without side effects: threads, processes and connections belong into `start`.

        Args:
            offloading_spec: the engine's spec; kvtier's own carries a `tier_context`.
            primary_kv_view: the primary arena, shape (num_blocks, block_bytes), bytes; slot s is `view[s]`.
            tier_type: name of the tier in the configuration.
        """
        self.offloading_spec = offloading_spec
        self.primary_kv_view = primary_kv_view
        self.tier_type = tier_type

    @property
    def state(self) -> TierState:
        """Health of the tier. A tier that is not UP answers MISS and takes no jobs."""
        return TierState.UP

    @property
    def state_reason(self) -> str:
        """Why the tier is in its state, in a few words; may be empty."""
        return ""

    @property
    def progress(self) -> int:
        """A number that grows when a part of any job is done, for tiers whose jobs may take longer than
        `tier_deadline`.

        The manager stops using a tier with jobs if for `tier_deadline` no job ends and this number does not grow.
        """
        return 0

    def start(self) -> None:
        """Start to work, without waiting; called once, before all calls below. The tier may be STARTING for a while."""
        return

    @abstractmethod
    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Return HIT if the block can be loaded, MISS if not, RETRY while that is not known or the block is in
        transfer.

        Called thousands of times per step, so it must answer from memory.
        """

    @abstractmethod
    def submit_store(self, job_metadata: JobMetadata) -> None:
        """Start copying the job's blocks into this tier.

        Caller guarantees: the slots stay pinned until the job's result is collected.
        Implementer must: return without I/O; report exactly one JobResult, except if the call raises: then the job is
        not taken, and no slot is touched afterwards. Blocks that the tier already has count as successful. A job that
        the tier cannot take now fails at the next `get_finished_jobs`.
        """

    @abstractmethod
    def submit_load(self, job_metadata: JobMetadata) -> None:
        """Start copying the job's blocks from this tier into the slots.

        Caller guarantees: no other job uses the slots until the job's result is collected.
        Implementer must: return without I/O; report exactly one JobResult, also after a partial success; not touch the
        slots after that.
        """

    def cancel_loads(self, job_ids: Collection[int]) -> None:
        """Learn that no request waits for these load jobs any more. Some may have ended.

        Blocks that are not begun may fail now, so that other jobs begin earlier. Each job still gets exactly one
        result, and the tier may use its slots until then.
        """
        return

    @abstractmethod
    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Return the results that arrived since the last call."""

    def can_store(self, num_blocks: int) -> bool:
        """Return whether the tier would take a store job of this size now (back-pressure)."""
        return True

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Count one use of `keys`, without I/O."""
        return

    def pin(self, keys: Collection[OffloadKey]) -> Answer[Collection[OffloadKey]] | None:
        """Keep those of `keys` that can be loaded now from eviction, until as many calls of `unpin`.

        A tier whose medium evicts by itself does what it can, for a bounded time: its blocks may miss all the same.

        Returns:
            None if there is nothing to wait for, else an answer that a later `get_finished_jobs` settles. Its value:
            the keys that the medium holds; others are misses, whatever `lookup` said before.
        """
        return None

    def unpin(self, keys: Collection[OffloadKey]) -> None:
        """Undo one `pin` of each of `keys`; keys that are not pinned are ignored."""
        return

    def ask_held(self, keys: Collection[OffloadKey]) -> Answer[Collection[OffloadKey]] | None:
        """Ask the medium which of `keys` it holds. It changes nothing: what is found may be evicted at once.

        `lookup` may answer MISS for a block that is there, after a fault; this does not.

        Returns:
            None if the tier has an index, so that `lookup` is certain. Else an answer that a later `get_finished_jobs`
            settles; it fails if the medium does not say.
        """
        return None

    def delete(self, keys: Collection[OffloadKey]) -> Answer[Collection[OffloadKey]]:
        """Begin to delete blocks for every user of the medium; called only if `deletes` is True.

        Blocks in transfer, and blocks that an unanswered job or a `pin` holds, may stay.
        Implementer must: return without I/O; settle the answer in a later `get_finished_jobs`. It fails if the store
        does or the tier goes down. Its value: those of `keys` that no lookup or load, in this process or a later one,
        finds any more, unless they are stored again; absent keys are among them.
        """
        raise NotImplementedError

    def list_keys(self, cursor: bytes, most: int) -> Answer[KeyPage]:
        """Begin to read some of the keys that the tier holds; called only if `lists_keys` is True.

        Args: as `BlockStore.list_keys`, which says what a listing contains.
        Implementer must: return without I/O; settle the answer in a later `get_finished_jobs`.
        """
        raise NotImplementedError

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Learn of a new request; return which of its blocks the engine should offer."""
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Drop what is kept for a request. No later call names it, but its jobs may still run."""
        return

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Learn that a scheduler step ends; send what was batched."""
        return

    def has_pending_work(self) -> bool:
        """Return whether the tier has work besides its jobs. kvtier's manager lets the engine step for jobs only."""
        return False

    @abstractmethod
    def drain_jobs(self) -> None:
        """Wait until no I/O touches primary memory. After that, the result of every submitted job is available.

        Jobs that are not begun may be cancelled (they fail); a running copy must end by itself.
        """

    def start_epoch(self, epoch: bytes) -> None:
        """From now on, miss for all blocks stored before this call. Called while no job is in flight.

        Args:
            epoch: random salt for the namespace (`Namespace.with_epoch`).
        """
        return

    def take_events(self) -> Iterable[OffloadingEvent]:
        """Return KV events collected since the last call."""
        return ()

    def get_stats(self) -> Mapping[str, float]:
        """Return gauges and counters of this tier, by name.

        Names of `kvtier.metrics` with `Source.TIER` (blocks, bytes, capacity_blocks and so on) are exported by engines.
        Other names, gauges of your own, appear only in `OffloadingManager.get_stats`. Names that the manager reads
        itself are ignored.
        """
        return {}

    def shutdown(self) -> None:
        """Release everything, in bounded time; no call follows."""
        return

    def check_invariants(self) -> None:
        """Raise InvariantError if the state contradicts itself."""
        return


class OffloadingManager(ABC):
    """Decides which blocks are stored and loaded, on the scheduler's thread; never waits and moves no bytes.

    `complete_*` for a key in an unexpected state is no error; it is counted as an `UnexpectedCall`.
    """

    @abstractmethod
    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Return whether one block can be loaded now (HIT), soon (HIT_PENDING), maybe (RETRY) or not (MISS).

        HIT_PENDING and RETRY end after a bounded time.
        """

    def get_load_source(self, key: OffloadKey, req_context: ReqContext) -> str:
        """Return the name of the tier from which this request's HIT came, "primary" if no promotion was needed."""
        return "primary"

    @abstractmethod
    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> LoadStoreSpec:
        """Pin `keys` until `complete_load` and return their slots, in the order of `keys`.

        Raises:
            BlockNotReadyError: a key is not ready; no key was pinned.
        """

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Count one use of `keys`, given in prefix order; unknown keys are ignored."""
        return

    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        """Unpin `keys` after their copy to the device; if it failed, forget them in the primary tier.

        So the request's next lookups do not find the blocks that it could not load.
        """
        return

    @abstractmethod
    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput | None:
        """Choose slots for those of `keys` that are not held, and evict others as needed.

        Args:
            keys: in prefix order; a key given twice counts once.

        Returns:
            Slots for as many keys from the head as possible, none if all are held; None if not even one block fits.

        Raises:
            KeyFormatError: a key has the wrong length or type.
        """

    def complete_store(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        """Make stored blocks ready to load, or drop them if the copy failed. `keys` may be in any order."""
        return

    @abstractmethod
    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Learn of a new request, before any other call names it."""

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Learn that a request is over; its transfers may still be completed later."""
        return

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Learn that a scheduler step ends; plan promotions, collect results, send what was batched."""
        return

    def has_pending_work(self) -> bool:
        """Return whether the engine must keep stepping even without requests to schedule."""
        return False

    def take_events(self) -> Iterable[OffloadingEvent]:
        """Return KV events collected since the last call."""
        return ()

    def get_stats(self) -> Mapping[str, float] | None:
        """Return counters and gauges, by the names of `kvtier.metrics`; None if there are none."""
        return None

    def reset_cache(self) -> None:
        """Forget every block, in bounded time, since the weights may have changed."""
        return

    def on_reset_flushed(self) -> None:
        """Reuse the slots of copies that were running at the last `reset_cache`: the workers have ended all of them."""
        return

    def shutdown(self) -> None:
        """Release everything, in bounded time; idempotent."""
        return


class OffloadingWorker(ABC):
    """Moves blocks between the device and the primary arena, in the device's process."""

    @abstractmethod
    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """Start copying engine blocks into slots; return False if the transfer could not be started.

        Args:
            src_spec: engine blocks by KV group, in prefix order.
            dst_spec: slots, one per offloaded block, in the same order.
        """

    @abstractmethod
    def submit_load(
        self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec, expedited: bool = False
    ) -> bool:
        """Start copying slots into engine blocks; return False if the transfer could not be started.

        Args:
            expedited: the engine waits for this load within the step, so it should not queue behind other loads.
        """

    @abstractmethod
    def get_finished(self) -> list[TransferResult]:
        """Return the transfers that ended since the last call, each once."""

    @abstractmethod
    def wait(self, job_ids: set[int]) -> None:
        """Block until the named transfers have ended."""

    def shutdown(self) -> None:
        """Wait for running copies and release everything."""
        return


class OffloadingSpec(ABC):
    """A checked configuration that makes a manager (in the scheduler's process) and a worker (in the device's)."""

    @classmethod
    def build_metric_definitions(cls, extra_config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metrics that the manager may report, by name."""
        return {}

    @abstractmethod
    def get_manager(self) -> OffloadingManager:
        """Return the manager; the first call makes it."""

    @abstractmethod
    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        """Return the worker over the engine's KV caches; the first call makes it."""

    def shutdown(self) -> None:
        """Release manager, worker and arena; idempotent."""
        return
