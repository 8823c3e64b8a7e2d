"""kvtier's tiers as the storage of SGLang's HiCache."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolHitPolicy, PoolName, PoolTransferResult
from sglang.srt.runtime_context import get_parallel

from kvtier.adapters.memory_parts import copy_from_rows, copy_to_rows
from kvtier.adapters.sglang.host_pages import HostPages, page_keys, parts_of
from kvtier.adapters.sglang.options import SGLangOptions, make_spec
from kvtier.adapters.sglang.transfers import TransferLog
from kvtier.adapters.staged_tiers import StagedTiers
from kvtier.adapters.staging_slots import PageKeys
from kvtier.errors import ConfigError
from kvtier.events import TierState
from kvtier.log import logger

_KV = PoolName.KV.value
MIN_BLOCK_BYTES = 64 * 1024
"""Least bytes in a tier's block where the pools' pages differ: smaller ones would cost more calls than bytes."""


class KVTierHiCache(HiCacheStorage):  # type: ignore[misc]  # SGLang is not installed where types are checked
    """A HiCache storage backend over kvtier's tiers, for `--hicache-storage-backend dynamic`.

    SGLang calls it from its prefetch and backup threads, and from the scheduler's for statistics. No call waits longer
    than `call_deadline`, and whatever a tier does is at worst a miss.
    """

    def __init__(self, storage_config: Any, kwargs: Mapping[str, Any] | None = None) -> None:
        """Check the configuration; the tiers open when SGLang has registered its host pools.

        Args:
            storage_config: SGLang's `HiCacheStorageConfig`.
            kwargs: from SGLang's factory; not used.

        Raises:
            ConfigError: an option is wrong.
        """
        self._config = storage_config
        self._options = SGLangOptions.read(storage_config.extra_config)
        self._pools: dict[str, HostPages] = {}
        self._tiers: StagedTiers | None = None
        self._log = TransferLog()
        # With a block of any size, so that a wrong configuration of a tier stops the start before a pool is pinned.
        make_spec(self._options, storage_config, {}, MIN_BLOCK_BYTES, _attention_groups())

    # -- host pools ---------------------------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Remember the pool of KV pages."""
        super().register_mem_pool_host(mem_pool_host)
        self._pools[_KV] = HostPages(_KV, mem_pool_host, may_be_direct=bool(self._options.interface_v1))

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Remember a pool of a hybrid model. It may come after the tiers are open, and misses if they have no room."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        name = _name(host_pool_name)
        if name == _KV:
            return
        pool = HostPages(name, host_pool)
        if self._tiers is not None and self._tiers.num_bytes < pool.page_bytes:
            allowed = f"at least {2 * pool.page_bytes}, two pages of pool {name}, which is not stored"
            logger.error("kvtier: %s", ConfigError("staging_bytes", self._options.staging_bytes, allowed))
            return
        self._pools[name] = pool

    def on_host_pools_registered(self) -> None:
        """Allocate the staging arena and open the tiers, without waiting for them.

        Raises:
            ConfigError: the configuration does not fit the pools.
            CapacityError: the machine cannot hold the arena.
        """
        if self._tiers is not None:
            return
        sizes = [pool.page_bytes for pool in self._pools.values() if pool.page_bytes]
        if not sizes:
            raise ConfigError("host pools", sorted(self._pools), "a pool with pages")
        block_bytes = self._kv.page_bytes or max(min(sizes), MIN_BLOCK_BYTES)
        spec = make_spec(self._options, self._config, self._kv.identity, block_bytes, _attention_groups())
        largest = max(sizes)
        if spec.num_blocks * spec.block_bytes < 2 * largest:
            raise ConfigError("staging_bytes", self._options.staging_bytes, f"at least {2 * largest}, two pages")
        self._tiers = StagedTiers(spec, self._options.call_deadline)
        logger.info(
            "kvtier: HiCache pages of %d bytes, %s, in tiers %s",
            self._kv.page_bytes,
            "copied from and to the host pool directly" if self._kv.is_direct else "copied as flat tensors",
            ", ".join(tier.name for tier in spec.tiers),
        )

    # -- KV pages, by index in the host pool (v1) ---------------------------------------------------------

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        """Store the pages at `host_indices`; return, per key, whether a tier has it."""
        return self._store(_KV, keys, host_indices)

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        """Load pages into the host pool at `host_indices`; return, per key, whether this worked."""
        return self._load(_KV, keys, host_indices)

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """Return how many of the first keys a tier has."""
        return _leading(self._contains(_KV, keys))

    # -- pages of several pools (v2) ----------------------------------------------------------------------

    def batch_set_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """Store pages of several pools; return the successes by pool."""
        return {t.name: self._store(_name(t.name), t.keys or [], t.host_indices) for t in transfers}

    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """Load pages of several pools; return the successes by pool."""
        return {t.name: self._load(_name(t.name), t.keys or [], t.host_indices) for t in transfers}

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: list[Any] | None = None, extra_info: Any = None
    ) -> PoolTransferResult:
        """Return for which prefixes of `keys` the tiers have the KV pages and all that the other pools need."""
        num_kv = _leading(self._contains(_KV, keys))
        found: dict[str, int] = {PoolName.KV: num_kv} if num_kv else {}
        restorable = set(range(1, num_kv + 1))
        for transfer in pool_transfers or []:
            if transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS or not restorable:
                continue  # groups of pages never limit the others, and kvtier reports none of them
            held = self._contains(_name(transfer.name), keys[:num_kv])
            if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
                window = max(1, len(transfer.keys or ()))
                lengths = {n for n in range(1, num_kv + 1) if all(held[max(0, n - window) : n])}
            else:
                lengths = set(range(1, _leading(held) + 1))
            if lengths:
                found[transfer.name] = max(lengths)
            restorable &= lengths
        return PoolTransferResult(max(restorable, default=0), found, sorted(restorable))

    # -- flat tensors (v0) --------------------------------------------------------------------------------

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Store a flat page."""
        return value is not None and self._store_flat([key], [value])[0]

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Store flat pages; return whether a tier has every one of them."""
        return values is not None and all(self._store_flat(keys, values))

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        """Return a flat page, in `target_location` if that is given; None if no tier has it."""
        return self.batch_get([key], None if target_location is None else [target_location])[0]

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """Return flat pages, each in its target location if there are any; None for a page that no tier has."""
        if self._tiers is None:
            return [None] * len(keys)
        targets = [self._kv.new_page() for _ in keys] if target_locations is None else list(target_locations)
        fits = [self._is_page(target) for target in targets]

        def take(page: int, rows: Sequence[memoryview]) -> None:
            copy_from_rows(rows, parts_of(targets[page]))

        if not all(fits) or len(targets) != len(keys):
            return [None] * len(keys)
        loaded = self._tiers.load(self._keys(_KV, keys), take)
        return [target if is_loaded else None for target, is_loaded in zip(targets, loaded, strict=True)]

    def exists(self, key: str) -> bool:
        """Return whether a tier has a page."""
        return self._contains(_KV, [key])[0]

    # -- the rest -----------------------------------------------------------------------------------------

    def clear(self) -> bool:
        """Make every page stored by this rank so far miss, until the engine ends."""
        if self._tiers is not None:
            self._tiers.start_epoch()
        return True

    def get_stats(self) -> Any:
        """Return pages and speeds since the last call, as SGLang's metrics want them; None if it wants no metrics."""
        return self._log.take() if self._config.enable_storage_metrics else None

    def readings(self) -> dict[str, float]:
        """Return kvtier's own metrics by name, as `get_stats` of kvtier's managers does."""
        return {} if self._tiers is None else self._tiers.readings()

    def wait_for_tiers(self, timeout: float) -> dict[str, tuple[TierState, str]]:
        """Wait until no tier is starting, at most `timeout` seconds; return states and reasons by name.

        SGLang does not call it: until a tier is up, its pages miss.
        """
        return {} if self._tiers is None else self._tiers.wait_until_started(timeout)

    def close(self) -> None:
        """End the tiers and release the arena."""
        if self._tiers is not None:
            self._tiers.close()

    def check_invariants(self) -> None:
        """Raise InvariantError if staging memory is lost or used twice."""
        if self._tiers is not None:
            self._tiers.check_invariants()

    @property
    def _kv(self) -> HostPages:
        return self._pools[_KV]

    def _keys(self, name: str, keys: Sequence[str]) -> list[PageKeys]:
        pool = self._pools[name]
        described = [f"{key}={value}" for key, value in pool.identity.items()]
        if self._config.is_mla_model and _is_sharded(name, pool):
            described.append(f"tp_rank={self._config.tp_rank}")
        pieces = 1 if self._tiers is None else -(-pool.page_bytes // self._tiers.block_bytes)
        return list(page_keys(keys, "\n".join(described), pieces))

    def _contains(self, name: str, keys: Sequence[str]) -> list[bool]:
        pool = self._pools.get(name)
        if self._tiers is None or pool is None:
            return [False] * len(keys)
        if not pool.page_bytes:
            return [True] * len(keys)  # it only numbers pages: the other pools decide
        return self._tiers.contains(self._keys(name, keys))

    def _store(self, name: str, keys: Sequence[str], host_indices: torch.Tensor | None) -> list[bool]:
        def move(tiers: StagedTiers, pool: HostPages, starts: Sequence[int]) -> list[bool]:
            return tiers.store(self._keys(name, keys), lambda page, rows: pool.read(starts[page], rows))

        return self._move(name, keys, host_indices, move, self._log.stored)

    def _load(self, name: str, keys: Sequence[str], host_indices: torch.Tensor | None) -> list[bool]:
        def move(tiers: StagedTiers, pool: HostPages, starts: Sequence[int]) -> list[bool]:
            return tiers.load(self._keys(name, keys), lambda page, rows: pool.write(starts[page], rows))

        return self._move(name, keys, host_indices, move, self._log.loaded)

    def _move(
        self,
        name: str,
        keys: Sequence[str],
        host_indices: torch.Tensor | None,
        move: Callable[[StagedTiers, HostPages, Sequence[int]], list[bool]],
        count: Callable[[int, int, float], None],
    ) -> list[bool]:
        pool = self._pools.get(name)
        if pool is not None and not pool.page_bytes:
            return [True] * len(keys)
        if self._tiers is None or pool is None or host_indices is None:
            return [False] * len(keys)
        if host_indices.numel() != len(keys) * pool.page_size:
            logger.error("kvtier: %d host indices for %d pages of pool %s", host_indices.numel(), len(keys), name)
            return [False] * len(keys)
        begun = time.monotonic()
        moved = move(self._tiers, pool, host_indices[:: pool.page_size].tolist())
        count(sum(moved), sum(moved) * pool.page_bytes, time.monotonic() - begun)
        return moved

    def _store_flat(self, keys: Sequence[str], values: Sequence[torch.Tensor]) -> list[bool]:
        pages = [value.detach().contiguous() for value in values]
        if self._tiers is None or len(pages) != len(keys) or not all(map(self._is_page, pages)):
            return [False] * len(keys)
        return self._tiers.store(self._keys(_KV, keys), lambda page, rows: copy_to_rows(parts_of(pages[page]), rows))

    def _is_page(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor can hold a flat page. With `interface_v1`, pages have another order, and none can."""
        num_bytes = tensor.numel() * tensor.element_size()
        is_flat = tensor.is_contiguous() and tensor.device.type == "cpu" and not self._kv.is_direct
        return is_flat and 0 < num_bytes == self._kv.page_bytes


def _leading(held: Sequence[bool]) -> int:
    return next((index for index, is_held in enumerate(held) if not is_held), len(held))


def _name(pool_name: Any) -> str:
    return str(getattr(pool_name, "value", pool_name))


def _is_sharded(name: str, pool: HostPages) -> bool:
    """Return whether ranks differ in a pool of a model whose KV they share: states, and drafts with attention heads."""
    is_draft = name in (PoolName.DRAFT.value, PoolName.DRAFT_SWA.value)
    return name == PoolName.MAMBA.value or (is_draft and not pool.is_latent)


def _attention_groups() -> int:
    """Return the number of groups of data-parallel attention; 1 outside an engine."""
    try:
        return int(get_parallel().attn_dp_size)
    except (AttributeError, RuntimeError, ValueError, TypeError):
        return 1
