"""kvtier keeps the KV cache of language models alive in host memory, on disk and beyond.

Every public name can be imported from here. `import kvtier` loads only this file; a name's module loads at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtier.abc import (
        BlockStore,
        EvictionPolicy,
        FailureCounter,
        OffloadingManager,
        OffloadingSpec,
        OffloadingWorker,
        SecondaryTierManager,
        SlotStore,
        StoreContext,
        TierContext,
    )
    from kvtier.clock import Clock, monotonic_clock
    from kvtier.config import (
        CPUConfig,
        KVCacheGroup,
        OffloadingConfig,
        TieringConfig,
        json_schema,
    )
    from kvtier.errors import (
        BlockNotReadyError,
        CapacityError,
        ConfigError,
        InvariantError,
        KeyFormatError,
        KVTierError,
        OverlappingCallError,
        ProtocolError,
        StoreError,
        StoreUnavailableError,
    )
    from kvtier.events import (
        BlocksEvicted,
        BlocksFailed,
        BlocksLoaded,
        BlocksStored,
        CacheReset,
        CascadeRefused,
        Event,
        JobFinished,
        NullObserver,
        Observer,
        Observers,
        RequestGaveUp,
        TierState,
        TierStateChanged,
        UnexpectedCall,
    )
    from kvtier.keys import (
        OffloadKey,
        get_offload_block_hash,
        get_offload_group_idx,
        make_offload_key,
    )
    from kvtier.namespace import Namespace
    from kvtier.primary.copies import KVCaches
    from kvtier.registry import EvictionPolicyFactory, SecondaryTierFactory, create_secondary_tier
    from kvtier.secondary.example import ExampleSecondaryTierManager
    from kvtier.sizes import format_size, parse_size
    from kvtier.spec.cpu import CPUOffloadingSpec
    from kvtier.spec.factory import OffloadingSpecFactory, create_spec
    from kvtier.spec.tiering import TieringOffloadingSpec
    from kvtier.tiering.manager import TieringOffloadingManager
    from kvtier.tiering.settings import ResetPolicy, TieringSettings
    from kvtier.types import (
        Admission,
        BlockIDsLoadStoreSpec,
        CPULoadStoreSpec,
        FailureCause,
        GPULoadStoreSpec,
        JobMetadata,
        JobResult,
        LoadStoreSpec,
        Locality,
        LookupResult,
        Medium,
        OffloadingEvent,
        OffloadPolicy,
        PrepareStoreOutput,
        ReqContext,
        RequestOffloadingContext,
        ScheduleEndContext,
        StoreUsage,
        TierFilter,
        TierMatcher,
        TransferResult,
    )

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "BlockStore",
    "EvictionPolicy",
    "FailureCounter",
    "OffloadingManager",
    "OffloadingSpec",
    "OffloadingWorker",
    "SecondaryTierManager",
    "SlotStore",
    "StoreContext",
    "TierContext",
    "Clock",
    "monotonic_clock",
    "CPUConfig",
    "KVCacheGroup",
    "OffloadingConfig",
    "TieringConfig",
    "json_schema",
    "BlockNotReadyError",
    "CapacityError",
    "ConfigError",
    "InvariantError",
    "KVTierError",
    "KeyFormatError",
    "OverlappingCallError",
    "ProtocolError",
    "StoreError",
    "StoreUnavailableError",
    "BlocksEvicted",
    "BlocksFailed",
    "BlocksLoaded",
    "BlocksStored",
    "CacheReset",
    "CascadeRefused",
    "Event",
    "JobFinished",
    "NullObserver",
    "Observer",
    "Observers",
    "RequestGaveUp",
    "TierState",
    "TierStateChanged",
    "UnexpectedCall",
    "OffloadKey",
    "get_offload_block_hash",
    "get_offload_group_idx",
    "make_offload_key",
    "Namespace",
    "KVCaches",
    "EvictionPolicyFactory",
    "SecondaryTierFactory",
    "create_secondary_tier",
    "ExampleSecondaryTierManager",
    "format_size",
    "parse_size",
    "CPUOffloadingSpec",
    "OffloadingSpecFactory",
    "create_spec",
    "TieringOffloadingSpec",
    "TieringOffloadingManager",
    "ResetPolicy",
    "TieringSettings",
    "Admission",
    "BlockIDsLoadStoreSpec",
    "CPULoadStoreSpec",
    "FailureCause",
    "GPULoadStoreSpec",
    "JobMetadata",
    "JobResult",
    "LoadStoreSpec",
    "Locality",
    "LookupResult",
    "Medium",
    "OffloadPolicy",
    "OffloadingEvent",
    "PrepareStoreOutput",
    "ReqContext",
    "RequestOffloadingContext",
    "ScheduleEndContext",
    "StoreUsage",
    "TierFilter",
    "TierMatcher",
    "TransferResult",
]

_WHERE = """
kvtier.abc: BlockStore EvictionPolicy FailureCounter OffloadingManager OffloadingSpec OffloadingWorker
kvtier.abc: SecondaryTierManager SlotStore StoreContext TierContext
kvtier.clock: Clock monotonic_clock
kvtier.config: CPUConfig KVCacheGroup OffloadingConfig TieringConfig json_schema
kvtier.errors: BlockNotReadyError CapacityError ConfigError InvariantError KVTierError KeyFormatError
kvtier.errors: OverlappingCallError ProtocolError StoreError StoreUnavailableError
kvtier.events: BlocksEvicted BlocksFailed BlocksLoaded BlocksStored CacheReset CascadeRefused Event
kvtier.events: JobFinished NullObserver Observer Observers RequestGaveUp TierState TierStateChanged UnexpectedCall
kvtier.keys: OffloadKey get_offload_block_hash get_offload_group_idx make_offload_key
kvtier.namespace: Namespace
kvtier.primary.copies: KVCaches
kvtier.registry: EvictionPolicyFactory SecondaryTierFactory create_secondary_tier
kvtier.secondary.example: ExampleSecondaryTierManager
kvtier.sizes: format_size parse_size
kvtier.spec.cpu: CPUOffloadingSpec
kvtier.spec.factory: OffloadingSpecFactory create_spec
kvtier.spec.tiering: TieringOffloadingSpec
kvtier.tiering.manager: TieringOffloadingManager
kvtier.tiering.settings: ResetPolicy TieringSettings
kvtier.types: Admission BlockIDsLoadStoreSpec CPULoadStoreSpec FailureCause GPULoadStoreSpec JobMetadata
kvtier.types: JobResult LoadStoreSpec Locality LookupResult Medium OffloadPolicy OffloadingEvent PrepareStoreOutput
kvtier.types: ReqContext RequestOffloadingContext ScheduleEndContext StoreUsage TierFilter TierMatcher TransferResult
"""
"""Which module defines which public names."""


def _modules_by_name() -> dict[str, str]:
    lines = (line.split(": ") for line in _WHERE.strip().splitlines())
    return {name: module for module, names in lines for name in names.split()}


_MODULE_OF = _modules_by_name()


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562) and keep it."""
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted(__all__)
