"""The spec with only the primary tier: it checks the configuration and owns one arena, one manager and one worker."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np

from kvtier import forks
from kvtier.abc import OffloadingSpec, OffloadingWorker, SecondaryTierManager, TierContext
from kvtier.clock import Clock, monotonic_clock
from kvtier.config import CPUConfig, OffloadingConfig, engine_blocks_per_block, parse_config, primary_blocks
from kvtier.errors import ConfigError, OverlappingCallError
from kvtier.events import Observer, Observers
from kvtier.log import logger
from kvtier.namespace import Namespace
from kvtier.primary.arena import Arena, Progress, align_block_bytes
from kvtier.primary.copies import KVCaches
from kvtier.primary.manager import CPUPrimaryTierOffloadingManager
from kvtier.recording.recorder import RecordedManager
from kvtier.recording.stream import Recorder
from kvtier.registry import POLICIES, WORKERS
from kvtier.sizes import parse_size
from kvtier.spans import EVENTS as SPAN_EVENTS
from kvtier.spans import Spans
from kvtier.spec.first_interface import config_from_pair
from kvtier.tier_config import TierConfig
from kvtier.tiering.manager import TieringOffloadingManager
from kvtier.tiering.settings import TieringSettings
from kvtier.types import Admission

MadeTiers = Sequence[tuple[TierConfig, SecondaryTierManager]]
"""Started tiers, with their configurations."""


class CPUOffloadingSpec(forks.ProcessBound, OffloadingSpec):
    """Stores KV blocks in host memory only. `kvtier.config.CPUConfig` has the keys of its configuration.

    The constructor checks, and allocates nothing. The first `get_manager` or `get_worker` creates the arena, unless it
    was given.

    Attributes:
        config: the engine's part of the configuration.
        vllm_config: the first object of vLLM's earlier pair, for tiers that ask for it; None if no pair was given.
        extra_config: the user's part, as it was given.
        user_config: the user's part, checked.
        block_bytes: bytes per offloaded block, a multiple of the page size.
        num_blocks: blocks in the primary tier.
        engine_blocks_per_block: engine blocks per offloaded block.
        offload_prompt_only: whether engines should offer blocks of prompts only.
        tier_context: the context for secondary tiers; its `arena_fd` is None until there is an arena.
        secondary_tier_configs: the configured tiers' mappings, in order.
    """

    config_type: ClassVar[type[CPUConfig]] = CPUConfig

    def __init__(
        self,
        config: OffloadingConfig | Any,
        kv_cache_config: Any = None,
        *,
        progress: Progress | None = None,
        clock: Clock = monotonic_clock,
        observers: Sequence[Observer] = (),
        inline_io: bool = False,
        arena: Arena | None = None,
    ) -> None:
        """Check the configuration.

        Args:
            config: the engine's part, or the first object of vLLM's earlier pair.
            kv_cache_config: the second object of that pair.
            progress: called while the arena's memory is allocated, by the thread that allocates it.
            clock: another clock for tests.
            observers: sinks of events.
            inline_io: whether tiers do their I/O on the caller's thread when polled, for tests and simulations.
            arena: an existing arena, of an earlier spec or another process. This spec owns it from now on, unless the
                constructor raises.

        Raises:
            ConfigError: a key has a wrong value, or the arena has another shape.
        """
        is_pair = not isinstance(config, OffloadingConfig)
        self.vllm_config = config if is_pair else None
        self.config: OffloadingConfig = config_from_pair(config, kv_cache_config) if is_pair else config
        self.extra_config: Mapping[str, Any] = self.config.extra_config
        self.user_config: CPUConfig = parse_config(self.extra_config, self.config_type)
        self.engine_blocks_per_block = engine_blocks_per_block(self.user_config, self.config.groups)
        self.block_bytes = align_block_bytes(self.config.engine_block_bytes * self.engine_blocks_per_block)
        self.num_blocks = primary_blocks(self.user_config, self.block_bytes)
        self.offload_prompt_only = bool(self.user_config.offload_prompt_only)
        self.secondary_tier_configs: list[Mapping[str, Any]] = []
        self.observers = Observers(observers)
        self.tier_context = TierContext(
            namespace=self._namespace(),
            clock=clock,
            observer=self.observers,
            tokens_per_block=self.tokens_per_block,
            retain_share=self.user_config.retain_share,
            tenant_quotas=self.user_config.tenant_quotas,
            inline_io=inline_io,
        )
        self._policy = POLICIES.load(self.user_config.eviction_policy)
        self._progress = progress
        self._arena = arena
        if arena is not None:
            self._check_arena(arena)
            self.tier_context = replace(self.tier_context, arena_fd=arena.fd)
        self._manager: TieringOffloadingManager | None = None
        self._worker: OffloadingWorker | None = None
        self._worker_tensors: list[Any] = []
        self._closed = False
        forks.register(self)

    def leave_to_parent(self) -> None:
        """In a forked child, close a spec with an arena, which belongs to the parent; one without can be used."""
        self._closed = self._closed or self._arena is not None

    @property
    def tokens_per_block(self) -> int:
        """Tokens per offloaded block, in the group with the smallest engine block."""
        return min(group.tokens_per_block for group in self.config.groups) * self.engine_blocks_per_block

    @property
    def settings(self) -> TieringSettings:
        """Deadlines and budgets of the tiering manager."""
        return self.user_config.settings(self.tokens_per_block, self.config.enable_kv_cache_events)

    def get_manager(self) -> TieringOffloadingManager:
        """Return the manager. The first call creates it and the arena, and starts the tiers without waiting for them.

        Raises:
            CapacityError: the machine cannot hold the arena.
            ConfigError: a tier refuses its options.
        """
        if self._manager is None:
            self._check_open()
            try:
                self._manager = self._make_manager(self.arena)
            except BaseException:
                self._release_arena()
                raise
        return self._manager

    def get_worker(self, kv_caches: KVCaches) -> OffloadingWorker:
        """Return the worker over the engine's KV caches. The first call creates it.

        Args:
            kv_caches: numpy arrays or torch tensors, and the places of each group's pages in them.

        Raises:
            CapacityError: the machine cannot hold the arena.
            ConfigError: no worker is registered for the tensors, they do not fit the blocks, or they are not those of
                the first call.
        """
        if self._worker is None:
            self._check_open()
            self._worker = self._make_worker(kv_caches)
            self._worker_tensors = list(kv_caches.tensors)
        elif not _are_same(self._worker_tensors, kv_caches.tensors):
            raise ConfigError("kv_caches", f"{len(kv_caches.tensors)} tensors", "the tensors of the first call")
        return self._worker

    @property
    def arena(self) -> Arena:
        """The primary tier's memory, created at the first use.

        Raises:
            CapacityError: the machine cannot hold it.
            ConfigError: the machine does not offer the memory that the configuration requires.
            RuntimeError: the spec has been shut down.
        """
        if self._arena is None:
            self._check_open()
            folder = self.user_config.arena_path
            self._arena = Arena.create(
                self.num_blocks,
                self.block_bytes,
                huge_pages=self.user_config.huge_pages,
                folder=None if folder is None else Path(folder),
                progress=self._progress,
            )
            logger.info("kvtier: %s", self._arena.describe_memory())
            self.tier_context = replace(self.tier_context, arena_fd=self._arena.fd)
        return self._arena

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the spec has been shut down, or its arena belongs to the parent process")

    def shutdown(self) -> None:
        """Release manager, worker and arena, in this order, even if one of them raises. A second call does nothing.

        Raises:
            OverlappingCallError: another thread is in a call of the manager. Nothing was released; call again.
        """
        with ExitStack() as stack:
            if self._arena is not None:
                stack.callback(self._arena.close)
            if self._worker is not None:
                stack.callback(self._worker.shutdown)
            stack.callback(self._forget)
            try:
                if self._manager is not None:
                    self._manager.shutdown()
            except OverlappingCallError:
                stack.pop_all()
                raise

    def _forget(self) -> None:
        self._closed = True
        self._arena = self._manager = self._worker = None

    def _check_arena(self, arena: Arena) -> None:
        found, wanted = (arena.num_blocks, arena.block_bytes), (self.num_blocks, self.block_bytes)
        if found != wanted:
            raise ConfigError("arena", found, f"{wanted} (blocks, bytes per block) expected")

    def _release_arena(self) -> None:
        """Close the arena, unless a worker uses it."""
        if self._arena is not None and self._worker is None:
            self._arena.close()
            self._arena = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _make_manager(self, arena: Arena) -> TieringOffloadingManager:
        return self._manager_over(self._make_primary(arena))

    def _make_primary(self, arena: Arena) -> CPUPrimaryTierOffloadingManager:
        return CPUPrimaryTierOffloadingManager(
            self.num_blocks,
            arena.view,
            self._policy(self.num_blocks),
            control=arena.control,
            world_size=self.config.world_size,
        )

    def _manager_over(
        self, primary: CPUPrimaryTierOffloadingManager, tiers: MadeTiers = ()
    ) -> TieringOffloadingManager:
        """Make the manager over the primary tier and started secondary tiers. With `record`, it records its calls."""
        keywords: dict[str, Any] = {
            "names": [config.name for config, _ in tiers],
            "admissions": [config.admission or Admission.ALWAYS for config, _ in tiers],
            "probe_deadlines": [config.probe_deadline for config, _ in tiers],
            "settings": self.settings,
            "clock": self.tier_context.clock,
            "observer": self.observers,
        }
        secondary, user = [tier for _, tier in tiers], self.user_config
        if user.spans:
            keywords["watcher"] = spans = Spans(self.tier_context.clock)
            self.observers.add(spans, *SPAN_EVENTS)
        if user.record is None:
            return TieringOffloadingManager(primary, secondary, **keywords)
        limit = parse_size("record_limit", user.record_limit)
        recorder = Recorder(user.record, self.recording_header(tiers), self.tier_context.clock, limit)
        return RecordedManager(primary, secondary, recorder=recorder, **keywords)

    def recording_header(self, tiers: MadeTiers = ()) -> dict[str, Any]:
        """Return the header of a recording: what a replay needs of the configuration, and nothing about the model."""
        settings = self.settings
        return {
            "tokens_per_block": self.tokens_per_block,
            "block_bytes": self.block_bytes,
            "primary_blocks": self.num_blocks,
            "policy": self.user_config.eviction_policy,
            "load_deadline": settings.load_deadline,
            "probe_deadline": settings.probe_deadline,
            "lease_timeout": settings.lease_timeout,
            "promotion_budget": settings.promotion_budget,
            "prefill_rate": settings.prefill_rate,
            "retain_share": settings.retain_share,
            "tenant_quotas": settings.tenant_quotas,
            "tiers": [
                {
                    "name": config.name,
                    "admission": (config.admission or Admission.ALWAYS).value,
                    "policy": str(config.options.get("eviction_policy", "")),
                    "joins_stores": tier.joins_stores,
                    "capacity_bytes": _capacity_of(config),
                    "probe_deadline": tier.probe_deadline if config.probe_deadline is None else config.probe_deadline,
                }
                for config, tier in tiers
            ],
        }

    def _make_worker(self, kv_caches: KVCaches) -> OffloadingWorker:
        make_worker = WORKERS.load(device_of(kv_caches))
        arena, rank = self.arena, self.config.rank
        return make_worker(self._share_of(arena.view), kv_caches, self.engine_blocks_per_block, arena.control, rank)

    @property
    def share_bytes(self) -> int:
        """Bytes of a block that one worker copies."""
        return self.config.engine_block_bytes * self.engine_blocks_per_block // self.config.num_shares

    def _share_of(self, view: memoryview) -> memoryview:
        """Return the part of every slot that this worker copies, shape (num_blocks, `share_bytes`)."""
        if self.config.num_shares == 1:
            return view
        start = self.config.share * self.share_bytes
        return np.asarray(view)[:, start : start + self.share_bytes].data

    def _namespace(self) -> Namespace | None:
        """Return the engine's namespace, with what this spec decides about the bytes of a block."""
        namespace = self.config.namespace
        if namespace is None:
            return None
        groups = [[group.tokens_per_block, list(group.layer_names)] for group in self.config.groups]
        decided: dict[str, str | int] = {
            "kvtier.block_bytes": self.block_bytes,
            "kvtier.engine_blocks_per_block": self.engine_blocks_per_block,
            "kvtier.groups": json.dumps(groups, separators=(",", ":")),
            "kvtier.world_size": self.config.world_size,
            "kvtier.rank": self.config.rank,
        }
        return Namespace({**namespace.identity, **decided}, namespace.epoch)


def device_of(kv_caches: KVCaches) -> str:
    """Return the registered name of the worker for these tensors. Their types' packages decide; nothing is imported.

    Raises:
        ConfigError: there are no tensors, or no worker is registered for their package.
    """
    for kind in type(kv_caches.tensors[0]).__mro__ if len(kv_caches.tensors) else ():
        package = kind.__module__.partition(".")[0]
        name = "cpu-numpy" if package == "numpy" else package
        if name in WORKERS:
            return name
    kinds = sorted({type(tensor).__qualname__ for tensor in kv_caches.tensors})
    raise ConfigError("kv_caches.tensors", kinds, f"tensors of a registered worker: {', '.join(WORKERS.names())}")


def _are_same(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    return len(ours) == len(theirs) and all(mine is other for mine, other in zip(ours, theirs, strict=True))


def _capacity_of(config: TierConfig) -> int | None:
    """Return a tier's capacity in bytes; None if its options have none, or one of another meaning."""
    try:
        return parse_size("capacity", config.options.get("capacity"))
    except ConfigError:
        return None
