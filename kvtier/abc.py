"""Every contract on one page.

Who runs where: managers and `SecondaryTierManager`s live on the engine's scheduler thread and never wait;
workers live next to the device; stores live in a tier's I/O process and block.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from kvtier.clock import Clock, monotonic_clock
from kvtier.events import NullObserver, Observer, TierState
from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.types import (
    FailureCause,
    GPULoadStoreSpec,
    JobMetadata,
    JobResult,
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
    """Orders keys by how soon they should go; knows no slot, pin or I/O, and owns no clock.

    Keys come in prefix order (head first). A policy that cares for recency makes the tail of one call older
    than its head, so that eviction eats a prefix from its end.

    `now` is when the request came that uses the keys, in seconds: all calls for one request have the same, no two
    requests do, and it may lie before that of an earlier call. Policies to which time means nothing ignore it; one
    whose methods do not take it at all works, too.

    Caller guarantees: `insert` only keys not held, `evict`, `remove` only keys held; no key twice in one call.
    Implementer must: hold exactly the keys inserted and not yet evicted or removed; hash and compare keys only.
    """

    def __init__(self, capacity: int) -> None:
        """Args: capacity: most keys that will be held at once, at least 1."""
        self.capacity = capacity

    @classmethod
    def for_sample(cls, capacity: int, share: float) -> Self:
        """Return a policy that will be shown a share, in (0, 1], of the keys only: a shadow.

        Policies with constants that count uses, and not uses for each key held, scale them.
        """
        return cls(capacity)

    @abstractmethod
    def insert(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Start holding `keys`: one use of each."""

    @abstractmethod
    def touch(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Count one more use of each of `keys`; keys not held are ignored.

        A call without keys says which request the next `candidates` is for.
        """

    @abstractmethod
    def evict(self, keys: Sequence[OffloadKey]) -> None:
        """Stop holding `keys`, which this policy proposed; it may remember that it did (ghosts)."""

    @abstractmethod
    def remove(self, keys: Sequence[OffloadKey]) -> None:
        """Stop holding `keys` at the caller's wish and forget everything about them."""

    @abstractmethod
    def candidates(self, incoming: Sequence[OffloadKey] = ()) -> Iterator[OffloadKey]:
        """Yield the held keys, best victim first; change nothing.

        Without `incoming` all of them come. With it, a policy may end earlier: those left are worth more than the
        tail of `incoming`, for which there is then no room.

        Args:
            incoming: the keys that are about to be inserted, in prefix order.

        The caller does not change the policy while it iterates.
        """

    def settle(self, keys: Sequence[OffloadKey]) -> None:
        """Put `keys`, which one finished use brought in several calls, in tail-first order; no use is counted."""
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
    """Counts failed blocks by cause; shared by a store's threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[FailureCause] = Counter()

    def count(self, cause: FailureCause, blocks: int = 1) -> None:
        """Add `blocks` failures of one cause."""
        with self._lock:
            self._counts[cause] += blocks

    def take(self) -> dict[FailureCause, int]:
        """Return the counts since the last call and start at zero."""
        with self._lock:
            counts, self._counts = dict(self._counts), Counter()
        return counts


@dataclass(frozen=True)
class StoreContext:
    """What a store learns of the tier it serves.

    Attributes:
        namespace: blocks of any other namespace must be invisible.
        block_bytes: payload bytes of every block.
        failures: where the store counts blocks it could not serve, by cause.
    """

    namespace: Namespace
    block_bytes: int
    failures: FailureCounter = field(default_factory=FailureCounter)


class BlockStore(ABC):
    """Blocking bytes by key; the location is the key (network stores, shared filesystems).

    Runs in the tier's I/O process, called by several threads at once. Faults of the medium are raised as
    StoreError (the whole call failed) or returned as False (that block failed); both are misses. After a
    StoreUnavailableError the store is closed, and opened anew some time later (slot stores, too).
    A plain store keeps opaque values: kvtier seals each with a header and checks it on the way back. A store
    that can move header and payload without joining them sets `seals_itself` and uses `kvtier.stores.integrity`.
    """

    seals_itself: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def open(cls, options: Mapping[str, Any], context: StoreContext) -> Self:
        """Connect to the medium.

        Args:
            options: the tier's own options, already checked.

        Raises:
            StoreUnavailableError: the medium cannot be used now; the tier tries again later.
        """

    @abstractmethod
    def contains(self, keys: Sequence[OffloadKey]) -> Sequence[bool]:
        """Return, per key, whether a value is held."""

    @abstractmethod
    def write(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> Sequence[bool]:
        """Store `buffers[i]` under `keys[i]`; return, per key, whether a later read will find it.

        The buffers must not be kept after the call returns.
        """

    @abstractmethod
    def read_into(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> Sequence[bool]:
        """Fill `buffers[i]` with the value of `keys[i]`; return, per key, whether it was filled exactly.

        A value of another length than its buffer is a failure. A buffer whose result is False may hold anything.
        """

    @abstractmethod
    def delete(self, keys: Sequence[OffloadKey]) -> None:
        """Forget `keys`; absent ones are ignored."""

    def usage(self) -> StoreUsage | None:
        """Return how full the store is, as far as it knows at once: it is asked often, and must not ask its medium."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Release everything; no call follows."""


class SlotStore(ABC):
    """Blocking bytes by slot (local devices); index, capacity and eviction are the tier's, in the scheduler's process.

    Runs in the tier's I/O process, called by several threads at once, never for one slot at the same time.
    Verifies by itself: `read_into` returns True only for bytes that were stored under that key and namespace.
    """

    @classmethod
    @abstractmethod
    def open(cls, options: Mapping[str, Any], context: StoreContext) -> Self:
        """Open the medium, alone: nobody else may write it until `close` or the end of the process.

        Raises:
            StoreUnavailableError: locked by another process, full, missing or foreign.
        """

    @property
    @abstractmethod
    def num_slots(self) -> int:
        """Slots that fit the capacity; slot indices are below it."""

    @abstractmethod
    def recover(self) -> Iterator[tuple[Sequence[int], Sequence[OffloadKey]]]:
        """Yield batches of (slots, keys) that a former process left, oldest first; payloads are not read.

        Called once, before any other I/O. A key appears once, a slot appears once.
        """

    @abstractmethod
    def write(self, slots: Sequence[int], keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> Sequence[bool]:
        """Replace what the slots hold; return, per slot, whether a later read will find it."""

    @abstractmethod
    def read_into(
        self, slots: Sequence[int], keys: Sequence[OffloadKey], buffers: Sequence[memoryview]
    ) -> Sequence[bool]:
        """Fill `buffers[i]` (block_bytes each) from `slots[i]`; True only if it verified as `keys[i]`.

        A slot that fails verification is invalidated, so that `recover` never reports it again.
        """

    def prepare(self) -> tuple[int, int] | None:
        """Do a few milliseconds of work that will make later calls quicker; None when there is nothing to do any more.

        Called again and again, by one thread, while others read and write.

        Returns:
            (bytes prepared so far, bytes in total).
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Release everything; no call follows."""


@dataclass(frozen=True)
class TierContext:
    """What a tier learns of the engine it serves.

    Attributes:
        namespace: identity of the blocks; None if the engine did not say (persistent tiers then refuse to start).
        arena_fd: descriptor of the memfd behind the primary view, mapped by I/O processes; None if the view is
            plain memory, which only this process can reach.
        clock, observer: time, and where events go.
        tokens_per_block: tokens in one offloaded block, for predictions.
        policies: eviction policies by name, in addition to the built-in ones.
        retain_share: share of a tier's slots that blocks may hold which hints ask to keep, 0 to 1.
        tenant_quotas: whether no tenant that a hint names takes more than its share while others want theirs.
        inline_io: run stores on the caller's thread when the tier is polled: deterministic, for tests, manual
            clocks and the simulator.
    """

    namespace: Namespace | None = None
    arena_fd: int | None = None
    clock: Clock = monotonic_clock
    observer: Observer = field(default_factory=NullObserver)
    tokens_per_block: int = 0
    policies: Mapping[str, type[EvictionPolicy]] = field(default_factory=dict)
    retain_share: float = 0.25
    tenant_quotas: bool = False
    inline_io: bool = False


class SecondaryTierManager(ABC):
    """One secondary tier, as the tiering manager sees it.

    All methods run on the scheduler's thread and return without I/O and without waiting, except `drain_jobs`
    and `shutdown`, which the manager calls with a deadline of its own.

    Attributes:
        medium, locality: for `load_tier_filter`; None matches every filter.
        verifies_payloads: True if a load never succeeds with bytes other than those stored under that key in the
            current namespace and epoch. The manager keeps digests for tiers that do not, and trusts them only
            with blocks whose digest it knows.
        persistent: blocks of earlier engines may be here: a request waits a moment for such a tier to open.
        probe_deadline: longest a request waits for this tier while its `lookup` answers RETRY, in seconds; longer
            before the first answer, shorter when waits were in vain. Configurations may set another.
    """

    medium: ClassVar[Medium | None] = None
    locality: ClassVar[Locality | None] = None
    verifies_payloads: ClassVar[bool] = False
    persistent: ClassVar[bool] = False
    probe_deadline: ClassVar[float] = 0.25

    @classmethod
    def class_for(cls, options: Mapping[str, Any]) -> type[SecondaryTierManager]:
        """Return the class that serves these options, not checked yet: this one, unless they choose another."""
        return cls

    @classmethod
    def check_options(
        cls, options: Mapping[str, Any], block_bytes: int, policies: Mapping[str, type[EvictionPolicy]]
    ) -> None:
        """Refuse what cannot work here; called where a spec is made, in every process of an engine.

        What is refused here stops the engine's start; what a constructor or `start` refuses leaves the tier out.

        Args:
            options: the constructor's keyword arguments, of the right names and types.
            block_bytes: bytes of one block.
            policies: registered eviction policies that the options name.

        Raises:
            ConfigError: a value, a package, a file or a variable of the environment is wrong or missing.
        """
        return

    def __init__(self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str) -> None:
        """Set up without side effects; threads, processes and connections start in `start`.

        Args:
            offloading_spec: the engine's spec; kvtier's own carries a `tier_context`.
            primary_kv_view: the primary arena, shape (num_blocks, block_bytes), bytes; slot s is `view[s]`.
            tier_type: name under which the tier was configured.
        """
        self.offloading_spec = offloading_spec
        self.primary_kv_view = primary_kv_view
        self.tier_type = tier_type

    @property
    def state(self) -> TierState:
        """Health of the tier; a tier that is not UP answers MISS and takes no job."""
        return TierState.UP

    @property
    def state_reason(self) -> str:
        """Why the tier is in its state, in a few words; empty if there is nothing to say."""
        return ""

    @property
    def progress(self) -> int:
        """A number that grows when a part of any job is done; for tiers whose jobs may take longer than a deadline.

        A tier with jobs, of which for `tier_deadline` none has ended and this has not grown, is not used.
        """
        return 0

    def start(self) -> None:
        """Begin working, without waiting; called once before any other call. A tier may be STARTING for a while."""
        return

    @abstractmethod
    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Return HIT if the block is here and loadable, MISS if not, RETRY while not known or in transfer.

        Called thousands of times per step; answers from memory.
        """

    @abstractmethod
    def submit_store(self, job_metadata: JobMetadata) -> None:
        """Start copying the job's blocks into this tier.

        Caller guarantees: the slots stay pinned until the job's result is collected.
        Implementer must: return without I/O; report exactly one JobResult; a call that raises has not taken the
        job and touches no slot afterwards. Blocks already here count as successful. A job that cannot be taken now
        fails at the next `get_finished_jobs`.
        """

    @abstractmethod
    def submit_load(self, job_metadata: JobMetadata) -> None:
        """Start copying the job's blocks from this tier into the slots.

        Caller guarantees: the slots are allocated to this job alone until its result is collected.
        Implementer must: return without I/O; report exactly one JobResult, partial success included, and not
        touch the slots after it.
        """

    def cancel_loads(self, job_ids: Collection[int]) -> None:
        """Learn that nobody waits for these load jobs any more, some of which may have ended.

        What has not begun may fail now, so that others come earlier. Each job still has its one result, and its slots
        stay the tier's until then.
        """
        return

    @abstractmethod
    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Return the results that arrived since the last call."""

    def can_store(self, num_blocks: int) -> bool:
        """Return whether the tier would take a store job of this size now (back-pressure is a value)."""
        return True

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Note that `keys` were used; a recency hint, no I/O."""
        return

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Learn of a request; return how its blocks should be offered."""
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Release what is kept for a request; no call names it afterwards, though its jobs may still be running."""
        return

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """End of a scheduler step: flush what was batched."""
        return

    def has_pending_work(self) -> bool:
        """Return whether the tier has work of its own beyond its jobs; kvtier's manager steps on for jobs only."""
        return False

    @abstractmethod
    def drain_jobs(self) -> None:
        """Wait until no I/O touches primary memory; every submitted job's result is then available.

        Jobs not yet started may be cancelled (their results say so); a running copy is never cut short.
        """

    def start_epoch(self, epoch: bytes) -> None:
        """Forget: blocks stored before this call must miss from now on. Called with no job in flight.

        Args:
            epoch: random salt, to be joined to the namespace (`Namespace.with_epoch`).
        """
        return

    def take_events(self) -> Iterable[OffloadingEvent]:
        """Return KV events collected since the last call."""
        return ()

    def get_stats(self) -> Mapping[str, float]:
        """Return what this tier knows of itself, by name: numbers.

        Names of `kvtier.metrics` with `Source.TIER` (blocks, bytes, capacity_blocks and so on) reach engines; others,
        gauges of your own, only `OffloadingManager.get_stats`. A name that the manager reads itself is ignored.
        """
        return {}

    def shutdown(self) -> None:
        """Release everything, within the tier's own deadline; no call follows."""
        return

    def check_invariants(self) -> None:
        """Raise InvariantError if the state contradicts itself."""
        return


class OffloadingManager(ABC):
    """Decides, on the scheduler's thread, what is stored and loaded; never waits, moves no bytes.

    `complete_*` for a key in an unexpected state is counted (`UnexpectedCall`), never raised.
    """

    @abstractmethod
    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Return whether one block can be loaded now (HIT), soon (HIT_PENDING), maybe (RETRY) or not (MISS).

        No key answers HIT_PENDING or RETRY for ever.
        """

    def get_load_source(self, key: OffloadKey, req_context: ReqContext) -> str:
        """Return the name of the tier that a HIT of this request comes from, "primary" if no promotion was needed."""
        return "primary"

    @abstractmethod
    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> LoadStoreSpec:
        """Pin `keys` until `complete_load` and return their slots, in the order of `keys`.

        Raises:
            BlockNotReadyError: a key is not ready; nothing was pinned.
        """

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Count one use of `keys`, given in prefix order; unknown ones are ignored."""
        return

    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Unpin `keys`, whose copy to the device has ended, well or not."""
        return

    @abstractmethod
    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput | None:
        """Choose slots for those of `keys` that are not held, evicting as needed.

        Args:
            keys: in prefix order; a key given twice counts once.

        Returns:
            The longest head that can be placed (possibly nothing to store); None if not one block can be.

        Raises:
            KeyFormatError: a key has the wrong length or type.
        """

    def complete_store(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        """Make stored blocks loadable, or forget them if the copy failed. `keys` may come in any order."""
        return

    @abstractmethod
    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Learn of a request before any other call names it."""

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Learn that a request is over; completions of its transfers may still follow."""
        return

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """End of a scheduler step: plan promotions, collect results, flush what was batched."""
        return

    def has_pending_work(self) -> bool:
        """Return whether the engine must keep stepping even without requests to schedule."""
        return False

    def take_events(self) -> Iterable[OffloadingEvent]:
        """Return KV events collected since the last call."""
        return ()

    def get_stats(self) -> Mapping[str, float] | None:
        """Return counters and gauges by the names that `kvtier.metrics` declares, or None if there are none."""
        return None

    def reset_cache(self) -> None:
        """Forget every block, because the weights may have changed; bounded in time."""
        return

    def shutdown(self) -> None:
        """Release everything, bounded in time; idempotent."""
        return


class OffloadingWorker(ABC):
    """Moves blocks between the device and the primary arena, next to the device."""

    @abstractmethod
    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """Start copying engine blocks into slots; return False if the transfer could not be started.

        Args:
            src_spec: engine blocks by KV group, in prefix order.
            dst_spec: slots, one per offloaded block, in the same order.
        """

    @abstractmethod
    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """Start copying slots into engine blocks; return False if the transfer could not be started."""

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
    """A validated configuration that makes a manager (scheduler's process) and a worker (next to the device)."""

    @classmethod
    def build_metric_definitions(cls, extra_config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metrics that the manager may report, by name."""
        return {}

    @abstractmethod
    def get_manager(self) -> OffloadingManager:
        """Return the manager, made at the first call."""

    @abstractmethod
    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        """Return the worker over the engine's KV caches, made at the first call."""

    def shutdown(self) -> None:
        """Release manager, worker and arena; idempotent."""
        return
